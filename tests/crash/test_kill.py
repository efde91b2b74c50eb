"""A server that is killed loses nothing that it acknowledged, and no snapshot changes.

Rounds on one pool: load over several connections, SIGKILL at a random moment, start, and everything is compared with
the journal of all rounds.  ``NBDSNAP_TEST_PROFILE=long`` makes it hundreds of rounds.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.model import profiles
from tests.support import load
from tests.support.device import read
from tests.support.expectation import Expectation
from tests.support.targets import ServerTarget

SIZES = {"a": 1 << 20, "b": 300 * 1024 + 5}
ROUNDS = 4
"""Times the profile's scale."""

MAX_DELAY_S = 0.5
"""Before the kill: from the first moments of the load to its steady state."""

MANY = 100_000
"""Operations: the load never ends by itself."""


@pytest.mark.parametrize("seed", [profiles.seed()])
def test_nothing_acknowledged_is_lost(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    target = ServerTarget(tmp_path, SIZES)
    past = _Past(seed)
    try:
        for number in range(ROUNDS * profiles.scale()):
            journal = load.MemoryJournal()
            plan = load.Plan(SIZES, seed, MANY, first=(number + 1) * MANY, prefix=f"r{number}-")
            _load_and_kill(target, journal, plan, rng.random() * MAX_DELAY_S)
            target.start()
            past.compare(target, journal)
            if number % 5 == 4:
                target.restart()
                past.compare(target, load.MemoryJournal())
        target.stop()
    finally:
        target.abandon()


def _load_and_kill(target: ServerTarget, journal: load.MemoryJournal, plan: load.Plan, delay_s: float) -> None:
    work = load.Load(target, journal, plan, connections=2, readers=1)
    work.start()
    threading.Event().wait(delay_s)  # the moment of the kill is what this test is about
    target.kill()
    work.abort()


class _Past:
    """What is known of the pool when no client is on it: what it held after the last round."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.volumes = {name: bytes(size) for name, size in SIZES.items()}
        self.images: dict[str, bytes] = {}

    def compare(self, target: ServerTarget, journal: load.MemoryJournal) -> None:
        """Check what one more round left, and remember it."""
        events = journal.timed()
        expected = Expectation(self.volumes, events, journal.images, self._seed)
        expected.check_instants()
        found = {f"{info.volume}@{info.name}" for info in target.snapshot_list()}
        doomed = {name for _, fields in events if fields["event"] == "delete" for name in fields["names"]}
        old = {name for name in found if name not in expected.snapshots.create}
        assert self.images.keys() - doomed <= old <= self.images.keys(), "a snapshot of an earlier round is lost"
        expected.snapshots.check(found - old, len(events))
        for name, history in expected.volumes.items():
            self.volumes[name] = _read_all(target, name)
            history.check_after_kill(self.volumes[name], len(events))
            assert target.raw(name).read_bytes() == self.volumes[name]
        self._compare_snapshots(target, found, {**self.images, **journal.images})
        report = target.check()
        assert report.ok, report.problems

    def _compare_snapshots(self, target: ServerTarget, found: set[str], known: dict[str, bytes]) -> None:
        self.images = {name: _read_all(target, name) for name in found}
        for name, image in self.images.items():
            assert image == known.get(name, image), f"{name} has changed"
        if len(found) > load.MAX_SNAPSHOTS * 2:
            doomed = sorted(found)[: load.MAX_SNAPSHOTS]
            target.snapshot_delete(doomed)
            for name in doomed:
                del self.images[name]


def _read_all(target: ServerTarget, name: str) -> bytes:
    device = target.open(name)
    try:
        return read(device, 0, device.size)
    finally:
        target.close(device)
