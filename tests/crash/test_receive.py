"""A receive and power cuts: the snapshot is there, and is the volume's content; or nothing has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine import rollback
from nbdsnap.engine.pool import Pool
from nbdsnap.transfer import receive
from tests.crash.campaign import record_run
from tests.crash.explorer import ViolationError, explore, explore_until_found
from tests.crash.pool_workload import open_pool, origin_path
from tests.crash.receive_workload import SIZE, VOLUME, adapt
from tests.crash.recording import Recording
from tests.model import profiles
from tests.support.transfers import content

STATES = 150
"""Times the profile's scale."""

NEEDED = {"engine.receiving.finish", "engine.preservation._preserve", "sync pool/index.mdb"}
"""Syncs whose loss a receive must suffer from."""


@pytest.fixture(autouse=True)
def sizes_as_before() -> Iterator[None]:
    before = rollback.STEP_BYTES, receive.BATCH_BYTES
    yield
    rollback.STEP_BYTES, receive.BATCH_BYTES = before


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record_run("tests.crash.receive_workload", VOLUME)


class Verifier:
    def __init__(self, recording: Recording) -> None:
        adapt()
        self._recording = recording

    def __call__(self, folder: Path, time: int) -> None:
        os.chdir(folder)
        needed: list[str] = []
        coming = ""
        live: str | None = None
        for mark in self._recording.marks_before(time):
            event, image = mark.fields["event"], mark.fields.get("image", "")
            match event:
                case "taken":
                    needed.append(image)
                case "writing":
                    live = None
                case "settled":
                    live = image
                case "receive":
                    coming = image
                case "undone":
                    coming = ""
                case "received":
                    needed.append(image)
                    live, coming = image, ""
        pool = open_pool()
        try:
            self._check(pool, needed, coming, live)
        finally:
            pool.close()

    def _check(self, pool: Pool, needed: list[str], coming: str, live: str | None) -> None:
        found = [info.name for info in pool.snapshot_list(VOLUME)]
        arrived = coming in found
        if set(found) != {*needed, *([coming] if arrived else [])}:
            maybe = set(found) ^ set(needed)
            if not maybe <= {"mine"}:  # it may be there a moment before the mark
                raise ViolationError(f"snapshots {found} where {needed} belong, and perhaps {coming!r}")
        images = self._recording.attachments
        for name in found:
            if name in images and content(pool, f"{VOLUME}@{name}") != images[name]:
                raise ViolationError(f"snapshot {name} is not what it was")
        expected = coming if arrived else live
        if expected is not None and content(pool, VOLUME) != images[expected]:
            raise ViolationError(f"the volume is not {expected}")
        pool.settle()
        if origin_path(VOLUME).read_bytes() != content(pool, VOLUME):
            raise ViolationError("the raw file is not what the live volume is")
        report = pool.check(data=True)
        if not report.ok:
            raise ViolationError(f"check: {report.problems}")
        if pool.volume_show(VOLUME).receiving is not None or len(content(pool, VOLUME)) != SIZE:
            raise ViolationError("it is still receiving")
        pool.snapshot_delete([f"{info.volume}@{info.name}" for info in pool.snapshot_list()])


@pytest.mark.slow
def test_power_cuts(recording: Recording) -> None:
    report = explore(
        recording, lambda: Verifier(recording), seed=profiles.seed(), count=STATES * profiles.scale(), workers=2
    )
    assert not report.violations, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NEEDED))
def test_each_sync_left_out_is_found(recording: Recording, name: str) -> None:
    assert name in recording.syncs(), sorted(recording.syncs())
    report = explore_until_found(
        recording, lambda: Verifier(recording), seed=1, drop=lambda operation: operation.name == name, rounds=(60, 250)
    )
    assert report.violations
