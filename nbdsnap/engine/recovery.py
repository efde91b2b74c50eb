"""Replaying what was acknowledged before the process or the machine stopped.

At start, before any client: the intents of the log, in order, are preserved for and applied like writes that just came
in.  Doing so twice does no harm: a chunk that was preserved before is not preserved again, and the last intent of a
chunk wins.  Then the origins are synced, and the log begins a new life, empty.

A volume that can't take its intents now (its origin is missing, its disk or the store is full) is not served, and its
intents are saved in a file of their own, for the next start: the others need not wait.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from nbdsnap.engine.device import Op, OpKind
from nbdsnap.engine.preserver import Preserver
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import NbdsnapError
from nbdsnap.store.intentlog import Intent
from nbdsnap.store.stranded import StrandedIntents

log = logging.getLogger(__name__)

Failure = NbdsnapError | OSError


def recover(
    stranded: StrandedIntents, preserver: Preserver, volumes: dict[int, Volume], known: Iterable[int]
) -> dict[int, Failure]:
    """Apply the log's intents to ``volumes`` (by number), and save those of the other ``known`` ones.

    Before the preserver's thread is started.  Returns why some of ``volumes`` can't be served, by number.
    """
    logged: dict[int, list[Intent]] = {}
    for intent in preserver.log.replay():
        logged.setdefault(intent.volume, []).append(intent)
    failures: dict[int, Failure] = {}
    done: list[int] = []
    for number in known:
        saved = stranded.load(number)
        fresh = logged.get(number, [])
        if not saved and not fresh:
            continue
        failure = _apply(preserver, volumes[number], [*saved, *fresh]) if number in volumes else None
        if number in volumes and failure is None:
            log.info("volume %s: replayed %d acknowledged writes", volumes[number].name, len(saved) + len(fresh))
            if saved:
                done.append(number)
            continue
        if failure is not None:
            log.error("volume %s can't take its acknowledged writes: %s", volumes[number].name, failure)
            failures[number] = failure
        if fresh:
            stranded.add(number, fresh)
    preserver.log.begin_life()
    stranded.remove(*done)
    return failures


def _apply(preserver: Preserver, volume: Volume, intents: list[Intent]) -> Failure | None:
    """The first failure, where there is one."""
    failures: list[BaseException] = []

    def done(failure: BaseException | None) -> None:
        if failure is not None:
            failures.append(failure)

    for intent in intents:
        preserver.submit(volume, Op(OpKind.WRITE, intent.offset, len(intent.data), done, intent.data))
    try:
        preserver.drain([volume])
        volume.sync_in_place()
    except (OSError, NbdsnapError) as error:
        failures.append(error)
    if not failures:
        return None
    first = failures[0]
    return first if isinstance(first, (OSError, NbdsnapError)) else NbdsnapError(str(first))
