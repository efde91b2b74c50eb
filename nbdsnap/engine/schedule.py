"""When snapshots are due, what they are called, and which of them a schedule keeps; without a clock and without a pool.

A schedule is a label, the times at which its snapshots are due (a cron expression, in UTC, so that no hour comes twice)
and how many it keeps.  A snapshot's name says which schedule it is of and when it was due: ``hourly-20261122T2200Z``.
That is all there is to remember: after a restart, the names say what has been done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cronsim import CronSim, CronSimError

KNOWN = {
    "hourly": "0 * * * *",
    "daily": "0 0 * * *",
    "weekly": "0 0 * * 1",
    "monthly": "0 0 1 * *",
    "yearly": "0 0 1 1 *",
}
"""Labels that need no times; a week begins on Monday."""

MAX_KEEP = 100_000
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DUE = "%Y%m%dT%H%MZ"
_DUE_LENGTH = len("20261122T2200Z")


@dataclass(frozen=True)
class Schedule:
    """``at``: a cron expression of minute, hour, day of the month, month, and day of the week."""

    label: str
    at: str
    keep: int

    def last_due(self, now: datetime) -> datetime:
        """The latest time that has come."""
        minute = now.replace(second=0, microsecond=0)
        return next(CronSim(self.at, minute + timedelta(minutes=1), reverse=True))

    def next_due(self, now: datetime) -> datetime:
        """The first time that has yet to come."""
        return next(CronSim(self.at, now))

    def name(self, due: datetime) -> str:
        return f"{self.label}-{due.strftime(_DUE)}"

    def due_of(self, name: str) -> datetime | None:
        """When the snapshot of that name was due; None where it is not of this schedule."""
        label, due = name[: -_DUE_LENGTH - 1], name[-_DUE_LENGTH:]
        if label != self.label or name != f"{label}-{due}":
            return None
        try:
            return datetime.strptime(due, _DUE).replace(tzinfo=UTC)
        except ValueError:
            return None

    def missing(self, now: datetime, names: Iterable[str], since: datetime) -> datetime | None:
        """The due time to take a snapshot for now, where there is one: the latest, however many were missed.

        ``names``: of the snapshots that are there; ``since``: what was due up to then needs none.
        """
        last = self.last_due(now)
        newest = max((due for name in names if (due := self.due_of(name)) is not None), default=since)
        return last if last > max(newest, since) else None

    def excess(self, names: Iterable[str]) -> list[str]:
        """Of the snapshots that are there, those that it does not keep, oldest first."""
        own = sorted((due, name) for name in names if (due := self.due_of(name)) is not None)
        return [name for _, name in own[: max(0, len(own) - self.keep)]]


def parse_schedules(value: Mapping[str, Any]) -> tuple[Schedule, ...]:
    """Those of ``{ hourly = 24, nightly = { at = "30 3 * * *", keep = 7 } }``; ValueError where anything is wrong."""
    return tuple(_parse(label, rule) for label, rule in value.items())


def _parse(label: str, rule: Any) -> Schedule:
    if not _LABEL.fullmatch(label):
        raise ValueError(f"{label!r} is no label: at most 64 of letters, digits and ._-")
    if isinstance(rule, dict):
        unknown = rule.keys() - {"at", "keep"}
        if unknown or rule.keys() != {"at", "keep"}:
            raise ValueError(f"{label} needs the keys 'at' and 'keep', and no others")
        at, keep = rule["at"], rule["keep"]
    elif label in KNOWN:
        at, keep = KNOWN[label], rule
    else:
        raise ValueError(f"{label} needs its times: {{ at = '30 3 * * *', keep = 7 }}")
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= MAX_KEEP:
        raise ValueError(f"{label} keeps 1 to {MAX_KEEP} snapshots, not {keep!r}")
    if not isinstance(at, str):
        raise ValueError(f"{label}: {at!r} is no string")
    try:
        next(CronSim(at, datetime(2000, 1, 1, tzinfo=UTC)))
    except (CronSimError, StopIteration) as error:
        raise ValueError(f"{label}: {at!r} is no time of day or date as cron writes it ({error or 'never'})") from None
    return Schedule(label, at, keep)
