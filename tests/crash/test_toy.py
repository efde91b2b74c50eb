"""The harness, tested: on a toy store it finds nothing wrong, and every planted bug."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.crash.explorer import Report, explore, explore_until_found
from tests.crash.recording import Recording
from tests.crash.toy.store import BUGS
from tests.crash.toy.verify import make_verify
from tests.crash.tracer import record

SEED = 20060801
RECORDINGS = 4
MAPPED = ("*.mdb-lock",)


def _record(scratch: Path, bug: str = "") -> Recording:
    folder = scratch / "disk"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.crash.toy.workload", str(folder / "toy"), str(SEED), bug]
    return record(command, folder, scratch / "trace", mapped=MAPPED)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return _record(tmp_path_factory.mktemp("toy"))


def test_a_correct_store_survives_every_state(recording: Recording) -> None:
    report = explore(recording, lambda: make_verify(recording), seed=SEED, count=1500)
    assert not report.violations, str(report)
    assert report.states > 500, str(report)


@pytest.mark.parametrize("bug", BUGS)
def test_a_mistake_of_order_is_found(bug: str, tmp_path: Path) -> None:
    recording = _record(tmp_path, bug)
    assert explore_until_found(recording, lambda: make_verify(recording, bug), seed=SEED).violations


def test_each_sync_left_out_is_found(recording: Recording, tmp_path: Path) -> None:
    """In one of a few recordings: where a sync matters only at one moment, not every run has that moment."""
    unnoticed = set(recording.syncs())
    assert unnoticed >= {"flush: log", "checkpoint: store", "checkpoint: data", "checkpoint: log", "create: directory"}
    for attempt in range(RECORDINGS):
        unnoticed = {name for name in unnoticed if not _explore_without(recording, name).violations}
        if not unnoticed:
            return
        scratch = tmp_path / str(attempt)
        scratch.mkdir()
        recording = _record(scratch)
    assert unnoticed == set()


def _explore_without(recording: Recording, name: str) -> Report:
    return explore_until_found(
        recording, lambda: make_verify(recording), seed=SEED, drop=lambda operation: operation.name == name
    )
