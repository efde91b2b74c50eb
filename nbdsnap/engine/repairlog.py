"""Repair of the intent log, and of the files of stranded intents.

A damaged log keeps its pool from being opened, because what can't be read was acknowledged.  The repair keeps what can
be read and is certain to be wanted, in the volumes' files of stranded intents, for the next start; the log itself is
set aside, under the name ``intent.log.damaged``, and the next start makes a new one.

* A damaged record: those before it and those behind it are kept.  A later write does not need an earlier one.
* A damaged header: it alone says which records were retired.  To replay one that was would put old data over newer, so
  none is kept.  What lies in the log is named, as what may be lost.

Snapshots lose nothing: their content is preserved before an intent is applied, never taken from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nbdsnap.engine.offline import log_damage, stranded_files
from nbdsnap.errors import NbdsnapError
from nbdsnap.models import RepairStep
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.intentlog import Intent, IntentLog, read_intents, save_intents, scan
from nbdsnap.store.layout import DEFAULT_LOG_SIZE, LOG_FILE
from nbdsnap.store.stranded import StrandedIntents


@dataclass
class LogPlan:
    steps: list[RepairStep] = field(default_factory=list)
    actions: list[Callable[[], None]] = field(default_factory=list)

    def execute(self) -> None:
        for action in self.actions:
            action()


def plan_log(io: FileIO, pool: Path) -> LogPlan:
    plan = LogPlan()
    for path in stranded_files(pool):
        intents, damage = read_intents(io, path)
        if damage is not None:
            detail = f"{damage}: keep the {len(intents)} acknowledged writes before that; what is behind it is lost"
            plan.steps.append(RepairStep(kind="log", detail=detail))
            plan.actions.append(lambda path=path, intents=intents: _cut(io, path, intents))  # type: ignore[misc]
    path = pool / LOG_FILE
    damage = log_damage(io, path) if path.exists() else None
    if damage is not None:
        kept = _certain(io, path)
        plan.steps.append(RepairStep(kind="log", detail=f"{damage}: {_outlook(io, path, kept)}"))
        plan.actions.append(lambda: _set_aside(io, pool, kept or []))
    return plan


def _certain(io: FileIO, path: Path) -> list[Intent] | None:
    """The intents that are not retired and can be read; None where that can't be told."""
    try:
        log = IntentLog(io, path, DEFAULT_LOG_SIZE)
    except NbdsnapError:
        return None
    io.close(log.fd)
    return [intent for life, intent in scan(io, path) if life == log.life and intent.sequence >= log.tail_sequence]


def _outlook(io: FileIO, path: Path, kept: list[Intent] | None) -> str:
    if kept is not None:
        return f"keep the {len(kept)} acknowledged writes that can be read; at least one is lost"
    found = scan(io, path)
    newest = [intent for life, intent in found if life == found[-1][0]]
    if not newest:
        return "there are no writes in it"
    return (
        f"which of the {len(newest)} writes in it had arrived can't be told; up to so many are lost: {_where(newest)}"
    )


def _where(intents: Iterable[Intent]) -> str:
    spans: dict[int, tuple[int, int]] = {}
    for intent in intents:
        low, high = spans.get(intent.volume, (intent.offset, 0))
        spans[intent.volume] = min(low, intent.offset), max(high, intent.offset + len(intent.data))
    return "; ".join(
        f"volume number {number}, within bytes {low} to {high - 1}" for number, (low, high) in spans.items()
    )


def _cut(io: FileIO, path: Path, intents: list[Intent]) -> None:
    save_intents(io, path, intents)


def _set_aside(io: FileIO, pool: Path, kept: list[Intent]) -> None:
    stranded = StrandedIntents(io, pool)
    for number in {intent.volume for intent in kept}:
        stranded.add(number, [intent for intent in kept if intent.volume == number])
    path = pool / LOG_FILE
    io.rename(path, path.with_name(f"{LOG_FILE}.damaged"))
    io.fsync_directory(pool)
