"""The traced program: a pool under load from several threads, with marks of what each was told.

Two volumes; the origin of one is created with it, the other's was there.  The pool is opened, loaded, closed, opened
again and loaded again; with some seeds the program then ends in the middle of things.

The seed also says what else happens (:func:`scenario`):

``plain``   nothing
``faults``  disks fail for a while, so that acknowledged writes are stranded in files of their own, and the log is
            renewed; at last a sync of an origin fails, which is final until the next opening
``full``    the store is small, and drops snapshots
``redirected``  one volume is thin; the other is a clone, and the file that was there its base's
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbdsnap.engine import preserver, reclaim, stamps
from nbdsnap.engine.deletion import Deletions, Doomed
from nbdsnap.engine.device import Device
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.engine.records import JsonObject
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.origin import Origin
from tests.crash.marks import Marks
from tests.crash.tracer import WORKING_FOLDER
from tests.support import load
from tests.support.faultyio import FaultyIO
from tests.support.history import content

SIZES = {"new": 200 * 1024 + 700, "old": 96 * 1024}

SLICE_CHUNKS = 8
"""What the engine preserves or reclaims with one commit: few, so that an operation may span several commits."""

LOG_SIZE = 64 << 10
"""Small, so that the intent log wraps, and fills up."""

STORE_LIMIT = 40 * 4096
"""Of a full store: half of what the volumes hold."""

RETRY_S = 0.01
"""Between two tries to apply what a failing disk did not take."""

SCENARIOS = ("plain", "faults", "full", "redirected")

BASE = "base"
BASE_SNAPSHOT = "base@content"
"""What the clone is made of: nobody writes to that volume."""

SYNC_HELPERS = ("sync", "sync_in_place", "sync_latest", "_sync_now", "_write_header", "fdatasync")
"""Functions whose callers say more about why they sync."""

OPERATIONS_PER_RUN = 1_000_000
BARE_FIRST = OPERATIONS_PER_RUN // 2
"""More than a run has: operations of different runs on one pool have different numbers."""


def scenario(seed: int) -> str:
    return SCENARIOS[seed % len(SCENARIOS)]


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


def open_pool(io: FileIO | None = None, *, redirected: bool = False, **options: Any) -> Pool:
    """What a server does at its start, in the working folder."""
    pool = Pool.open(Path("pool"), PoolOptions(log_size=LOG_SIZE, **options), create=True, io=io)
    try:
        if redirected:
            _ensure_redirected(pool)
            return pool
        for name, size in SIZES.items():
            pool.volume_ensure(name, origin_path(name), size)
    except BaseException:
        pool.close()
        raise
    return pool


def _ensure_redirected(pool: Pool) -> None:
    pool.volume_ensure("new", None, SIZES["new"], thin=True)
    pool.volume_ensure(BASE, origin_path("old"), SIZES["old"])
    if not pool.snapshot_list(BASE):
        pool.snapshot_create([BASE_SNAPSHOT])
    if all(info.name != "old" for info in pool.volume_list()):
        pool.clone(BASE_SNAPSHOT, "old")


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
    sync, sync_directory = FileIO.fdatasync, FileIO.fsync_directory

    def place() -> str:
        frame = sys._getframe(2)
        while frame.f_code.co_name in SYNC_HELPERS and frame.f_back is not None:
            frame = frame.f_back
        return f"{frame.f_globals['__name__'].removeprefix('nbdsnap.')}.{frame.f_code.co_name}"

    def fdatasync(self: FileIO, fd: int) -> None:
        marks.site(place())
        sync(self, fd)

    def fsync_directory(self: FileIO, path: Path) -> None:
        marks.site(f"{place()}: directory")
        sync_directory(self, path)

    FileIO.fdatasync = fdatasync  # type: ignore[method-assign]
    FileIO.fsync_directory = fsync_directory  # type: ignore[method-assign]


class FailingIO(FaultyIO):
    """Disks that fail at times drawn from a seed: a file's operations of one kind are counted, and some of them
    fail."""

    def __init__(self, seed: str) -> None:
        super().__init__()
        rng = random.Random(seed)
        self._armed = False
        self._counts: Counter[tuple[str, str]] = Counter()
        self._failing: dict[tuple[str, str], set[int]] = {}
        for name in SIZES:  # each failing write of an intent is followed by one more for each try
            first = rng.randint(5, 60)
            self._failing["write", f"{name}.img"] = set(range(first, first + rng.randint(2, 8)))
        self._failing["write", "store.data"] = {rng.randint(2, 20)}
        self._failing["sync", "intent.log"] = {rng.randint(2, 8), rng.randint(9, 40)}
        self._failing["sync", f"{rng.choice(sorted(SIZES))}.img"] = {rng.randint(60, 200)}

    def _meet(self, operation: str, fd: int, offset: int = 0, length: int = 1 << 62) -> None:
        if not self._armed:
            return
        what = operation, self._names.get(fd, "")
        self._counts[what] += 1
        if self._counts[what] in self._failing.get(what, ()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def arm(self) -> None:
        """A volume that can't replay its acknowledged writes at a start is not served: not while the pool is opened."""
        self._armed = True

    def heal(self) -> None:
        self._armed = False

    def fdatasync(self, fd: int) -> None:
        self._meet("sync", fd)
        FileIO.fdatasync(self, fd)


def tell_of_drops(journal: MarkJournal) -> None:
    """Mark what a full store drops, like a deletion."""
    mark = Deletions.mark

    def told(self: Deletions, choose: Callable[[], Doomed]) -> Doomed:
        if getattr(choose, "__name__", "") != "_choose":
            return mark(self, choose)
        names: list[str] = []

        def chosen() -> Doomed:
            doomed = choose()
            names.extend(f"{state.name}@{one.name}" for state, snapshots in doomed.items() for one in snapshots)
            journal.record("delete", names=names, dropped=True)
            return doomed

        doomed = mark(self, chosen)
        journal.record("deleted", names=names)
        return doomed

    Deletions.mark = told  # type: ignore[method-assign]


def _go_on_bare(pool: Pool, journal: MarkJournal, plan: load.Plan) -> None:
    """Delete all snapshots, and write where nothing has to be preserved."""
    names = [f"{info.volume}@{info.name}" for info in pool.snapshot_list() if info.volume in SIZES]
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
    tell_of_drops(journal)
    what = scenario(seed)
    preserver.RETRY_S = RETRY_S
    for phase in range(2):
        first = (2 * run + phase) * OPERATIONS_PER_RUN
        io = FailingIO(f"{seed} {run} {phase}") if what == "faults" else FileIO()
        options = {"store_limit": STORE_LIMIT, "on_full": "drop-snapshots"} if what == "full" else {}
        pool = open_pool(io, redirected=what == "redirected", **options)
        if isinstance(io, FailingIO):
            io.arm()
        plan = load.Plan(
            SIZES, seed, count, first=first, prefix=f"{'ab'[phase]}{run}-", tolerant=what in ("faults", "full")
        )
        load.run(PoolTarget(pool), journal, plan, readers=1)
        if what in ("plain", "redirected"):
            _go_on_bare(pool, journal, plan)
        if phase == 1 and (seed + run) % 2:
            os._exit(0)
        if isinstance(io, FailingIO):
            io.heal()  # or a stop that is not clean would pass for one
        all_well = not any(info.error for info in pool.volume_list()) and pool.status().problem is None
        if all_well:
            journal.record("close")
        pool.close()
        if all_well:
            journal.record("closed")


if __name__ == "__main__":
    main(*itertools.islice(sys.argv, 1, None))
