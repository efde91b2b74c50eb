"""A repair that a power cut interrupts: begun again, it gives what it would have given; nothing is lost meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nbdsnap.engine.offline import OfflinePool
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.engine.repair import plan_repair, repair
from nbdsnap.errors import NbdsnapError
from tests.crash.campaign import MAPPED
from tests.crash.explorer import StateId, ViolationError, build, explore, explore_until_found, scratch_root
from tests.crash.pool_workload import LOG_SIZE, adapt_engine
from tests.crash.recording import Recording
from tests.crash.repair_workload import CHUNK, DAMAGED, KINDS, kind
from tests.crash.tracer import record
from tests.model import profiles
from tests.support.device import read
from tests.support.initramfs import REPOSITORY

STATES = 30
"""Of each kind of damage, times the profile's scale."""

HARMLESS = {
    "store.intentlog._create": "no log is made by a repair",
}

Content = dict[str, list[bytes | None]]
"""Export -> its chunks; None: reading it is an error."""


def record_repair(scratch: Path, seed: int) -> Recording:
    disk = scratch / "disk"
    disk.mkdir()
    program = [sys.executable, "-m", "tests.crash.repair_workload"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*program, "build", str(seed)], cwd=disk, env=environment, check=True)
    return record([*program, "repair", str(seed)], disk, scratch / "trace", mapped=MAPPED)


class RepairVerifier:
    """``baseline``: what the pool holds after a repair that nothing interrupted."""

    def __init__(self, recording: Recording, seed: int, baseline: Content | None) -> None:
        adapt_engine()
        self._damaged = f"pool/{DAMAGED[kind(seed)]}"
        self._content = recording.files[self._damaged]
        self._repaired = next(mark.time for mark in recording.marks)
        self.baseline = baseline

    def __call__(self, folder: Path, time: int) -> None:
        os.chdir(folder)
        kept = [path for path in (self._damaged, f"{self._damaged}.damaged") if Path(path).exists()]
        if not any(Path(path).read_bytes() == self._content for path in kept):
            raise ViolationError("what was damaged is gone")
        with OfflinePool(Path("pool")) as offline:
            plan = plan_repair(offline)
            if plan.steps and time > self._repaired:
                raise ViolationError(f"it was repaired, and is not: {[step.detail for step in plan.steps]}")
            repair(offline, plan)
        found = read_pool()
        if self.baseline is not None and found != self.baseline:
            where = [name for name in found if found[name] != self.baseline.get(name)]
            raise ViolationError(f"not what an uninterrupted repair gives: {where or 'other snapshots'}")


def read_pool() -> Content:
    pool = Pool.open(Path("pool"), PoolOptions(log_size=LOG_SIZE))
    try:
        problems = [problem for problem in pool.check(data=True).problems if problem.kind != "lost"]
        if problems:
            raise ViolationError(f"check: {problems}")
        return {export.name: _chunks(pool, export.name, export.size) for export in pool.exports()}
    finally:
        pool.close()


def _chunks(pool: Pool, name: str, size: int) -> list[bytes | None]:
    device = pool.open_device(name)
    chunks: list[bytes | None] = []
    for offset in range(0, size, CHUNK):
        try:
            chunks.append(read(device, offset, CHUNK))
        except NbdsnapError:
            chunks.append(None)
    device.close()
    return chunks


def baseline_of(recording: Recording, seed: int) -> Content:
    """From the last state, with everything on the disk."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="nbdsnap-crash-", dir=scratch_root()) as folder:
        build(recording, StateId(recording.end, "kept", 0), Path(folder))
        try:
            RepairVerifier(recording, seed, None)(Path(folder), recording.end)
            return read_pool()
        finally:
            os.chdir(before)


@pytest.mark.parametrize("seed", range(len(KINDS)), ids=KINDS)
def test_power_cuts_of_a_repair(seed: int, tmp_path: Path) -> None:
    seed += len(KINDS) * profiles.seed()
    recording = record_repair(tmp_path, seed)
    baseline = baseline_of(recording, seed)
    report = explore(
        recording,
        lambda: RepairVerifier(recording, seed, baseline),
        seed=seed,
        count=STATES * profiles.scale(),
    )
    assert not report.violations, str(report)
    assert report.states > 5, str(report)


def test_each_sync_of_a_repair_left_out_is_found(tmp_path: Path) -> None:
    unnoticed: set[str] = set()
    for seed in range(len(KINDS)):
        scratch = tmp_path / str(seed)
        scratch.mkdir()
        recording = record_repair(scratch, seed)
        baseline = baseline_of(recording, seed)
        for name in recording.syncs():
            report = explore_until_found(
                recording,
                lambda recording=recording, seed=seed, baseline=baseline: RepairVerifier(recording, seed, baseline),  # type: ignore[misc]
                seed=1,
                drop=lambda operation, name=name: operation.name == name,  # type: ignore[misc]
                rounds=(40, 160),
            )
            if not report.violations:
                unnoticed.add(name)
            else:
                unnoticed.discard(name)
    assert unnoticed <= HARMLESS.keys(), f"without these, nothing goes wrong: {sorted(unnoticed - HARMLESS.keys())}"
