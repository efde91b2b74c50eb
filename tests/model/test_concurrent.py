"""Many at once: writers, snapshots taken and deleted, and readers of snapshots that race with overwrites.

No barrier is set up.  Afterwards the journal says what each snapshot may hold: all that was acknowledged before it
was asked for, nothing that was begun after it was there, and between the two no later operation without an earlier
one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.profiles import scale, seed
from tests.support import load
from tests.support.device import read
from tests.support.expectation import Expectation
from tests.support.targets import EngineTarget, ServerTarget, Target

SIZES = {"a": 1 << 20, "b": 300 * 1024 + 5}
OPERATIONS = 150
"""Of each writer, times the profile's scale."""

MAX_OPERATIONS = 2000
"""Each payload is kept for the check: a longer run has more seeds instead."""


def _seeds() -> range:
    return range(seed(), seed() + 1 + OPERATIONS * scale() // MAX_OPERATIONS)


@pytest.mark.parametrize("kind", [EngineTarget, ServerTarget])
@pytest.mark.parametrize("number", _seeds())
def test_snapshots_are_instants(kind: Callable[..., Target], number: int, tmp_path: Path) -> None:
    target = kind(tmp_path, SIZES)
    try:
        _load_and_check(target, number)
        target.stop()
    finally:
        target.abandon()


def _load_and_check(target: Target, number: int) -> None:
    journal = load.MemoryJournal()
    plan = load.Plan(SIZES, number, min(OPERATIONS * scale(), MAX_OPERATIONS), writers=3)
    load.run(target, journal, plan, connections=3, readers=2)
    events = journal.timed()
    expected = Expectation({name: bytes(size) for name, size in SIZES.items()}, events, journal.images, number)
    expected.check_instants()
    found = {f"{info.volume}@{info.name}" for info in target.snapshot_list()}
    expected.snapshots.check(found, len(events))
    for name, history in expected.volumes.items():
        history.check_after_kill(_read_all(target, name), len(events))
    for name in found:
        assert _read_all(target, name) == journal.images[name], f"{name} has changed"
    assert target.check().ok
    target.snapshot_delete(sorted(found))
    assert target.check().ok
    assert target.status().store.used_bytes == 0


def _read_all(target: Target, name: str) -> bytes:
    device = target.open(name)
    try:
        return read(device, 0, device.size)
    finally:
        target.close(device)
