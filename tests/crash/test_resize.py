"""A resize and power cuts: the volume has one size or the other, the file the same; and no snapshot changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine import resize
from nbdsnap.engine.pool import Pool
from tests.crash.campaign import record_run
from tests.crash.explorer import ViolationError, explore, explore_until_found
from tests.crash.pool_workload import open_pool, origin_path
from tests.crash.recording import Recording
from tests.crash.resize_workload import VOLUME, adapt
from tests.model import profiles
from tests.support.transfers import content

STATES = 150
"""Times the profile's scale."""

NEEDED = {"engine.preservation._preserve", "sync old.img", "sync pool/index.mdb"}
"""Syncs whose loss a resize must suffer from."""


@pytest.fixture(autouse=True)
def steps_as_before() -> Iterator[None]:
    before = resize.STEP_BYTES
    yield
    resize.STEP_BYTES = before


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record_run("tests.crash.resize_workload", VOLUME)


class Verifier:
    def __init__(self, recording: Recording) -> None:
        adapt()
        self._recording = recording

    def __call__(self, folder: Path, time: int) -> None:
        os.chdir(folder)
        taken: list[str] = []
        allowed: list[str] | None = None
        for mark in self._recording.marks_before(time):
            event, image = mark.fields["event"], mark.fields.get("image", "")
            if event == "taken":
                taken.append(image)
            elif event == "writing":
                allowed = None
            elif event == "resize":
                assert allowed is not None
                allowed = [*allowed, image]
            else:
                allowed = [image]
        pool = open_pool()
        try:
            live = self._check(pool, taken, allowed)
        finally:
            pool.close()
        if origin_path(VOLUME).read_bytes() != live:
            raise ViolationError("the raw file is not what the live volume was")

    def _check(self, pool: Pool, taken: list[str], allowed: list[str] | None) -> bytes:
        live = content(pool, VOLUME)
        if allowed is not None and live not in [self._recording.attachments[name] for name in allowed]:
            raise ViolationError(f"the volume is none of {allowed}")
        for name in taken:
            image = self._recording.attachments[name]
            if content(pool, f"{VOLUME}@{name}") != image:
                raise ViolationError(f"snapshot {name} has changed")
            changed = bytearray(len(live))
            for extent in pool.diff(f"{VOLUME}@{name}"):
                changed[extent.offset : extent.offset + extent.length] = b"\1" * extent.length
            old = image.ljust(len(live), b"\0")
            if any(one != other and not mark for one, other, mark in zip(old, live, changed, strict=False)):
                raise ViolationError(f"the diff from {name} leaves something out")
        report = pool.check(data=True)
        if not report.ok:
            raise ViolationError(f"check: {report.problems}")
        pool.volume_resize(VOLUME, 2 * len(live))
        if content(pool, VOLUME) != live.ljust(2 * len(live), b"\0"):
            raise ViolationError("what was cut off comes back")
        pool.volume_resize(VOLUME, len(live), shrink=True)
        return live


@pytest.mark.slow
def test_power_cuts(recording: Recording) -> None:
    report = explore(
        recording, lambda: Verifier(recording), seed=profiles.seed(), count=STATES * profiles.scale(), workers=2
    )
    assert not report.violations, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NEEDED))
def test_each_sync_left_out_is_found(recording: Recording, name: str) -> None:
    assert name in recording.syncs(), recording.syncs().keys()
    report = explore_until_found(
        recording, lambda: Verifier(recording), seed=1, drop=lambda operation: operation.name == name, rounds=(60, 250)
    )
    assert report.violations
