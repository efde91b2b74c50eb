"""The traced program: a pool under load from several threads, with marks of what each was told.

Two volumes; the origin of one is created with it, the other's was there.  The pool is opened, loaded, closed, opened
again and loaded again; with an odd seed the program then ends in the middle of things.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbdsnap.engine import preserver, reclaim, stamps
from nbdsnap.engine.device import Device
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.engine.records import JsonObject
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.origin import Origin
from tests.crash.marks import Marks
from tests.crash.tracer import WORKING_FOLDER
from tests.support import load
from tests.support.history import content

SIZES = {"new": 200 * 1024 + 700, "old": 96 * 1024}

SLICE_CHUNKS = 8
"""What the engine preserves or reclaims with one commit: few, so that an operation may span several commits."""

LOG_SIZE = 128 << 10
"""Small, so that the intent log wraps, and fills up."""

SYNC_HELPERS = ("sync", "sync_in_place", "_sync_now", "_write_header")
"""Functions whose callers say more about why they sync."""

OPERATIONS_PER_RUN = 1_000_000
BARE_FIRST = OPERATIONS_PER_RUN // 2
"""More than a run has: operations of different runs on one pool have different numbers."""


def initial_content(name: str) -> bytes:
    """What a volume holds at first."""
    return content(7, 0, SIZES[name]) if name == "old" else bytes(SIZES[name])


def origin_path(name: str) -> Path:
    """Below the working folder: the pool keeps this path."""
    return Path(WORKING_FOLDER) / f"{name}.img"


def adapt_engine(marks: Marks | None = None) -> None:
    """Make the engine commit in small slices, here and where its pools are verified.

    Inodes can't be made again in a disk state, so they are left out of the origins' stamps.  Modification times can, if
    the trace knows them.
    """
    preserver.SLICE_CHUNKS = reclaim.SLICE_CHUNKS = SLICE_CHUNKS
    original = stamps.stamp_of

    def stamp_of(origin: Origin) -> JsonObject:
        stamp = original(origin)
        stamp.pop("inode", None)
        if marks is not None:
            marks.modified(origin.path.name, stamp["mtime_ns"])
        return stamp

    stamps.stamp_of = stamp_of


def open_pool() -> Pool:
    """What a server does at its start, in the working folder."""
    pool = Pool.open(Path("pool"), PoolOptions(log_size=LOG_SIZE), create=True)
    try:
        for name, size in SIZES.items():
            pool.volume_ensure(name, origin_path(name), size)
    except BaseException:
        pool.close()
        raise
    return pool


class MarkJournal:
    """A :class:`~tests.support.load.Journal` in the trace."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    def record(self, event: str, **fields: Any) -> None:
        self._marks.mark(event=event, **fields)

    def keep(self, name: str, content: bytes) -> None:
        self._marks.attach(name, content)


class PoolTarget:
    """The pool, as the load wants it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.open = pool.open_device

    def close(self, device: Device) -> None:
        device.close()

    def snapshot_create(self, names: Sequence[str]) -> None:
        self._pool.snapshot_create(names)

    def snapshot_delete(self, names: Sequence[str]) -> None:
        self._pool.snapshot_delete(names)


def name_syncs(marks: Marks) -> None:
    """Mark the place in the code of each sync that goes through the seam."""
    original = FileIO.fdatasync

    def fdatasync(self: FileIO, fd: int) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_name in SYNC_HELPERS and frame.f_back is not None:
            frame = frame.f_back
        marks.site(f"{frame.f_globals['__name__'].removeprefix('nbdsnap.')}.{frame.f_code.co_name}")
        original(self, fd)

    FileIO.fdatasync = fdatasync  # type: ignore[method-assign]


def _go_on_bare(pool: Pool, journal: MarkJournal, plan: load.Plan) -> None:
    """Delete all snapshots, and write where nothing has to be preserved."""
    names = [f"{info.volume}@{info.name}" for info in pool.snapshot_list()]
    journal.record("delete", names=names)
    pool.snapshot_delete(names)
    journal.record("deleted", names=names)
    load.run(PoolTarget(pool), journal, replace(plan, first=plan.first + BARE_FIRST, count=5, snapshots=0))


def main(seed_text: str, count_text: str, run_text: str) -> None:
    seed, count, run = int(seed_text), int(count_text), int(run_text)
    marks = Marks()
    adapt_engine(marks)
    name_syncs(marks)
    journal = MarkJournal(marks)
    for phase in range(2):
        first = (2 * run + phase) * OPERATIONS_PER_RUN
        pool = open_pool()
        plan = load.Plan(SIZES, seed, count, first=first, prefix=f"{'ab'[phase]}{run}-")
        load.run(PoolTarget(pool), journal, plan, readers=1)
        if seed % 3 == 0:
            _go_on_bare(pool, journal, plan)
        if phase == 1 and (seed + run) % 2:
            os._exit(0)
        journal.record("close")
        pool.close()
        journal.record("closed")


if __name__ == "__main__":
    main(*itertools.islice(sys.argv, 1, None))
