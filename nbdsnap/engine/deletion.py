"""Deleting snapshots, for whoever asks, and for want of space.

A deletion has two parts.  *Marking* is one transaction: from then on the snapshots are gone for everyone, after a
crash too.  *Reclaiming* frees what only they needed, in steps of one transaction each
(:mod:`nbdsnap.engine.reclaim`), between which writes go on.  What one process leaves undone, the next one does.

All that is under way is reclaimed by one thread, a step of each in turn, so a small deletion does not wait for a large
one.  While clients are connected it rests after each step for PAUSES times as long as that took: they share the disks,
the preserver and the interpreter with it.

When the store is full
----------------------
With ``on_full = "drop-snapshots"``, a write that finds no room for what it must preserve has it made
(:meth:`Deletions.make_room`): first the deletions that are under way go on, then snapshots are dropped, whole, one at a
time, until there is room.  The lowest priority goes first, then the oldest; never one that is held, open, or of
priority KEEP.  Reclaiming goes only as far as is needed at once: the rest follows between the next batches.

All steps happen on the preserver's thread.  :meth:`start`, :meth:`resume` and :meth:`stop` are for any other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from nbdsnap.engine import accounting
from nbdsnap.engine.preserver import Preserver
from nbdsnap.engine.reclaim import Part, parts, reclaim_slice
from nbdsnap.engine.records import SnapshotRecord, VolumeState
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import ConflictError, InUseError, NbdsnapError
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.index import Index, IndexWriter

log = logging.getLogger(__name__)

MIN_PRIORITY = -128
KEEP = 127
"""The highest priority: such a snapshot is never dropped."""

PAUSES = 1.5
"""How long to rest after a step while clients are connected, in terms of the step.  benchmarks/bulkdelete.py measures
what they notice."""

Doomed = dict[VolumeState, list[SnapshotRecord]]
"""Snapshots to be deleted, by volume, ascending by epoch."""


@dataclass(eq=False)
class Reclaiming:
    """A deletion under way: what is ``left`` to be looked at.  A step that fails leaves it as it is, and ends ``done``
    with its error."""

    volume: str
    left: list[Part]
    done: Future[None] = field(default_factory=Future)


class Deletions:
    """Of one pool.  ``lock`` is the pool's, ``volumes`` its states, by name; ``has_clients`` says whether any export is
    open."""

    def __init__(
        self,
        lock: threading.RLock,
        volumes: dict[str, VolumeState],
        index: Index,
        store: ChunkStore,
        preserver: Preserver,
        has_clients: Callable[[], bool],
    ) -> None:
        self._lock = lock
        self._volumes = volumes
        self._index = index
        self._store = store
        self._preserver = preserver
        self._has_clients = has_clients
        self._under_way: list[Reclaiming] = []
        self._queue: deque[Reclaiming] = deque()
        """Of those, what the thread takes its next step from; under ``_wake``."""
        self._unfinished: set[Future[None]] = set()
        self._wake = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def would_free(self, doomed: Doomed) -> int:
        """Bytes."""
        freed = 0
        for state, snapshots in doomed.items():
            with self._index.read() as reader:
                usage = list(reader.usage(state.record.number))
            freed += accounting.freed_by_deleting(usage, state.epochs, {snapshot.epoch for snapshot in snapshots})
        return freed

    def mark(self, choose: Callable[[], Doomed]) -> Doomed:
        """Delete what ``choose``, called under the lock, names: all or none."""
        with self._lock:
            doomed = choose()
            before = {state: state.snapshots for state in doomed}
            for state, snapshots in doomed.items():
                gone = {snapshot.epoch for snapshot in snapshots}
                state.set_snapshots([snapshot for snapshot in state.snapshots if snapshot.epoch not in gone])

        def change(txn: IndexWriter) -> None:
            for state, snapshots in doomed.items():
                for snapshot in snapshots:
                    marked = replace(snapshot, deleting=True)
                    txn.put_snapshot(state.record.number, snapshot.epoch, marked.to_json())

        try:
            self._index.update(change)
        except BaseException:
            with self._lock:
                for state, present in before.items():
                    state.set_snapshots(present)
            raise
        with self._lock:
            for state, snapshots in doomed.items():
                state.deleting.extend(snapshots)
                for snapshot in snapshots:
                    snapshot.deleting = True
                if isinstance(state, Volume) and before[state][-1].deleting:
                    state.forget_exclusive()
        return doomed

    # Reclaiming

    def start(self, volume: str, doomed: list[SnapshotRecord]) -> Future[None]:
        """Begin to free what only ``doomed`` (marked; ascending) of that volume needed, beside everything else.

        The result comes when all is free, or when that has to wait for the next start.
        """
        work = self._begin(volume, doomed)
        work.done.add_done_callback(partial(_log_failure, work))
        work.done.add_done_callback(self._unfinished.discard)
        self._unfinished.add(work.done)
        with self._wake:
            self._queue.append(work)
            self._wake.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="reclaim", daemon=True)
                self._thread.start()
        return work.done

    def resume(self) -> None:
        """Go on with what an earlier process began, beside everything else."""
        for name, state in list(self._volumes.items()):
            if state.deleting:
                self.start(name, list(state.deleting))

    def wait(self, report: Callable[[], None], interval_s: float) -> None:
        """Until all is free that is to be freed now; ``report`` is called every so often.  Raises what one failed
        with."""
        unfinished = set(self._unfinished)
        while unfinished:
            done, unfinished = futures.wait(unfinished, interval_s)
            for one in done:
                one.result()
            report()

    def unneeded_bytes(self) -> int:
        """What they have yet to give back."""
        unneeded = 0
        for state in list(self._volumes.values()):
            with self._index.read() as reader:
                usage = list(reader.usage(state.record.number))
            with self._lock:
                unneeded += accounting.shares(usage, state.epochs).unneeded
        return unneeded

    def stop(self) -> None:
        """After the preserver has stopped: what is left is the next start's."""
        with self._wake:
            self._stopping.set()
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._stopping.is_set())
                if not self._queue:
                    return
                work = self._queue.popleft()
            try:
                seconds, more = self._preserver.run(partial(self._timed_step, work))
            except BaseException as error:
                work.done.set_exception(error)
                continue
            if more:
                with self._wake:
                    self._queue.append(work)
            else:
                work.done.set_result(None)
            if self._has_clients():
                self._stopping.wait(seconds * PAUSES)

    def _timed_step(self, work: Reclaiming) -> tuple[float, bool]:
        began = time.monotonic()
        more = self._step(work)
        return time.monotonic() - began, more

    def _begin(self, volume: str, doomed: list[SnapshotRecord]) -> Reclaiming:
        work = Reclaiming(volume, parts([snapshot.epoch for snapshot in doomed], self._volumes[volume].epochs))
        self._under_way.append(work)
        return work

    def _step(self, work: Reclaiming) -> bool:
        """One transaction.  Whether there is more to do."""
        if not work.left:
            return False
        state = self._volumes[work.volume]  # each time: the volume may have been opened meanwhile
        slots, left = reclaim_slice(self._index, state.record.number, state.epochs, work.left)
        gone = {part.snapshot for part in work.left} - {part.snapshot for part in left}
        work.left = left
        if not left:
            self._under_way.remove(work)
        with self._lock:
            state.deleting = [snapshot for snapshot in state.deleting if snapshot.epoch not in gone]
        self._store.free(slots)
        return bool(left)

    # A full store

    def make_room(self, slots: int) -> bool:
        """Go some way towards ``slots`` free slots; False where there is no way.

        At most one snapshot is dropped: without it, the caller may need less.
        """
        before = self._store.used_slots
        within = self._store.slots_within_limit
        goal = before - slots if within is None or before + slots <= within else within - slots
        try:
            while self._under_way and self._store.used_slots > goal:
                self._step(self._under_way[0])
            return self._store.used_slots <= goal or self._drop_next() or self._store.used_slots < before
        except (OSError, NbdsnapError) as error:
            log.error("no room can be made in the exception store: %s", error)
            return False

    def _drop_next(self) -> bool:
        doomed = self.mark(self._choose)
        for state, snapshots in doomed.items():
            for snapshot in snapshots:
                log.warning(
                    "the exception store is full: dropped the snapshot %s@%s (priority %d, taken %s)",
                    state.name,
                    snapshot.name,
                    snapshot.priority,
                    snapshot.created.isoformat(timespec="seconds"),
                )
            self.start(state.name, snapshots)
        return bool(doomed)

    def _choose(self) -> Doomed:
        """The next snapshot to be dropped, if there is one."""
        bases = {state.record.base for state in self._volumes.values()}
        found = [
            (snapshot.priority, snapshot.created, snapshot.epoch, state.name)
            for state in self._volumes.values()
            for snapshot in state.snapshots
            if not (snapshot.held or snapshot.connections or snapshot.priority >= KEEP)
            and state.record.rollback != snapshot.epoch
            and (state.record.number, snapshot.epoch) not in bases
        ]
        if not found:
            return {}
        _, _, epoch, name = min(found)
        state = self._volumes[name]
        return {state: [snapshot for snapshot in state.snapshots if snapshot.epoch == epoch]}


def _log_failure(work: Reclaiming, done: Future[None]) -> None:
    error = done.exception()
    if isinstance(error, ConflictError):
        log.info("volume %s: the deletion of snapshots goes on at the next start", work.volume)
    elif error is not None:
        log.error("volume %s: the space of deleted snapshots is not given back: %s", work.volume, error)


def check_deletable(state: VolumeState, snapshot: SnapshotRecord) -> None:
    """InUseError where the snapshot is open or held."""
    name = f"{state.name}@{snapshot.name}"
    if state.record.rollback == snapshot.epoch:
        raise InUseError(f"volume {state.name} is being rolled back to {name}", hint="try again when that is done")
    if snapshot.connections:
        raise InUseError(f"{name} is open: {snapshot.connections} connections", hint="disconnect its clients first")
    if snapshot.held:
        raise InUseError(f"{name} is held", hint=f"release it first: nbdsnap snapshot release {name}")
