"""Snapshots by schedule: taken when they are due, and dropped when there are enough newer ones.

All that is due at one moment under one name is taken at one instant, whatever volumes it is of; where that fails, each
volume is tried alone.  What failed is tried again every minute, until the next is due.  While no server runs nothing is
taken; afterwards one snapshot makes up for all that were missed.

:meth:`SnapshotTimer.tick` does what is due at a moment; the thread around it only waits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from nbdsnap.engine.schedule import Schedule
from nbdsnap.errors import NbdsnapError

if TYPE_CHECKING:
    from nbdsnap.engine.pool import Pool

log = logging.getLogger(__name__)

LOOK_S = 15.0
"""Seconds after which to look at the clock again at the latest: somebody may have set it."""

AGAIN = timedelta(minutes=1)

Schedules = Mapping[str, Sequence[Schedule]]
"""By volume."""


def wall_clock() -> datetime:
    return datetime.now(UTC)


class SnapshotTimer:
    def __init__(self, pool: Pool, schedules: Schedules, clock: Callable[[], datetime] = wall_clock) -> None:
        self._pool = pool
        self._schedules = {volume: list(rules) for volume, rules in schedules.items() if rules}
        self._clock = clock
        self._done: dict[tuple[str, str], datetime] = {}
        """(volume, label) -> what was taken last: it may have been deleted since."""
        self._failed: set[tuple[str, str]] = set()
        """(volume, name) of what has failed, and was told."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="snapshot-timer", daemon=True)

    def start(self) -> None:
        if self._schedules:
            self._thread.start()

    def stop(self) -> None:
        """Nothing uses the pool afterwards.  Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        due = self._clock()
        while not self._stop.is_set():
            if self._clock() >= due:
                try:
                    due = self.tick()
                except Exception:
                    log.exception("snapshots by schedule")
                    due = self._clock() + AGAIN
            left = (due - self._clock()).total_seconds()
            self._stop.wait(min(max(left, 0.0), LOOK_S))

    def tick(self) -> datetime:
        """Take and drop what is due now.  When to be called again."""
        now = self._clock()
        groups: dict[str, list[tuple[str, Schedule, datetime]]] = {}
        for volume, rules in self._schedules.items():
            for schedule in rules:
                due = self._missing(volume, schedule, now)
                if due is not None:
                    groups.setdefault(schedule.name(due), []).append((volume, schedule, due))
        complete = True
        for name, group in groups.items():
            complete = self._take(name, group) and complete
        self._prune()
        following = min(schedule.next_due(now) for rules in self._schedules.values() for schedule in rules)
        return following if complete else min(following, now + AGAIN)

    def _missing(self, volume: str, schedule: Schedule, now: datetime) -> datetime | None:
        try:
            created, names = self._pool.snapshot_names(volume)
        except NbdsnapError:
            return None  # somebody has deleted it
        return schedule.missing(now, names, max(created, self._done.get((volume, schedule.label), created)))

    def _take(self, name: str, group: Sequence[tuple[str, Schedule, datetime]]) -> bool:
        """Whether all of it was taken."""
        try:
            self._pool.snapshot_create([f"{volume}@{name}" for volume, _, _ in group])
        except (NbdsnapError, OSError) as error:
            if len(group) > 1:
                taken = [self._take(name, [one]) for one in group]  # each of them, whatever became of the others
                return all(taken)
            ((volume, _, _),) = group
            if (volume, name) not in self._failed:
                log.error("the snapshot %s@%s is due, and can't be taken: %s", volume, name, error)
                self._failed.add((volume, name))
            return False
        for volume, schedule, due in group:
            self._done[volume, schedule.label] = due
            self._failed.discard((volume, name))
        log.info("took %s of %s", name, ", ".join(volume for volume, _, _ in group))
        return True

    def _prune(self) -> None:
        try:
            report = self._pool.prune(self._schedules)
        except (NbdsnapError, OSError) as error:
            log.error("old snapshots can't be dropped: %s", error)
            return
        if report.names:
            log.info("dropped %s", ", ".join(report.names))
