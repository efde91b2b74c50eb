"""Thin volumes and clones, as far as a pool is concerned: making, opening, freeing from the base, and deleting them.

* Making one is a transaction that writes its record: whatever its size.
* A clone's record names its base: ``(volume number, epoch)``.  Such a snapshot can't be deleted or dropped, hence
  neither can its volume.
* A base's volume has a lower number than its clone, unless a repair made it up: so opening them in order of the numbers
  finds every base opened.
* Freeing a clone from its base (*flatten*) copies what it still reads from there into slots of its own, in steps; each
  leaves the clone as it was.  At the end one transaction makes it a thin volume.
* Deleting one takes its name away and marks its record, in a transaction; then its slots are freed, in steps.  What one
  process leaves undone, the next one does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace

from nbdsnap.engine.base import Base, ZeroBase
from nbdsnap.engine.chain import ChainBase, OriginBase, SnapshotChunks
from nbdsnap.engine.device import Device
from nbdsnap.engine.diff import ChangeMap
from nbdsnap.engine.flatten import Flattening, Progress
from nbdsnap.engine.livechunks import LiveChunks
from nbdsnap.engine.preserver import Preserver
from nbdsnap.engine.records import SnapshotRecord, VolumeRecord, VolumeState
from nbdsnap.engine.redirected import RedirectedVolume
from nbdsnap.engine.redirected_snapshot import RedirectedSnapshotDevice
from nbdsnap.engine.snapshot import SnapshotDevice
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import (
    ConflictError,
    CorruptionError,
    InUseError,
    NbdsnapError,
    OriginChangedError,
    OriginError,
)
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.index import Index, IndexWriter
from nbdsnap.store.layout import MAX_CHUNKS, MAX_SLOTS

log = logging.getLogger(__name__)

DELETE_SLOTS = 16384
"""Slots that one transaction of a deletion frees: some tens of milliseconds in which writes wait."""


class Clones:
    """Of one pool.  ``lock`` is the pool's, ``volumes`` its states, by name."""

    def __init__(
        self,
        lock: threading.RLock,
        volumes: Mapping[str, VolumeState],
        index: Index,
        store: ChunkStore,
        io: FileIO,
        preserver: Preserver,
        workers: Executor,
    ) -> None:
        self._lock = lock
        self._volumes = volumes
        self._index = index
        self._store = store
        self._io = io
        self._preserver = preserver
        self._workers = workers
        self._deleting: list[VolumeRecord] = []

    # Opening

    def open(self, record: VolumeRecord, snapshots: list[SnapshotRecord]) -> RedirectedVolume:
        """Raises where its base can't be read."""
        chunks = LiveChunks(record.number, self._index, self._store, self._base_of(record))
        return RedirectedVolume(record, snapshots, chunks, self._io, self._preserver, self._workers)

    def open_snapshot(
        self,
        volume: Volume,
        snapshot: SnapshotRecord,
        maps: Mapping[str, ChangeMap],
        closed: Callable[[], None],
    ) -> Device:
        if not isinstance(volume, RedirectedVolume):
            return SnapshotDevice(volume, snapshot, self._index, self._store, maps, closed)
        chunks = volume.chunks
        return RedirectedSnapshotDevice(
            self._snapshot_chunks(volume, snapshot), lambda: chunks.base, snapshot.size, maps, closed
        )

    def _snapshot_chunks(self, volume: RedirectedVolume, snapshot: SnapshotRecord) -> SnapshotChunks:
        name = f"{volume.name}@{snapshot.name}"
        return SnapshotChunks(
            name, volume.record.number, snapshot.epoch, self._index, self._store, lambda: volume.generation
        )

    def _base_of(self, record: VolumeRecord) -> Base:
        levels: list[SnapshotChunks] = []
        last: Base = ZeroBase()
        place = record.base
        while place is not None:
            state, snapshot = self.find(*place)
            if state.problem is not None:
                raise _unreadable(state, snapshot, state.problem)
            if isinstance(state, RedirectedVolume):
                levels.append(self._snapshot_chunks(state, snapshot))
                place = state.record.base
            else:
                assert isinstance(state, Volume)
                last = OriginBase(SnapshotDevice(state, snapshot, self._index, self._store, {}, _nothing))
                place = None
        return ChainBase(levels, last, self._index) if levels else last

    def find(self, number: int, epoch: int) -> tuple[VolumeState, SnapshotRecord]:
        """A base."""
        for state in list(self._volumes.values()):
            if state.record.number == number:
                for snapshot in state.snapshots:
                    if snapshot.epoch == epoch:
                        return state, snapshot
        raise CorruptionError("the snapshot that the volume is a clone of is not there", hint="run: nbdsnap check")

    def base_name(self, record: VolumeRecord) -> str | None:
        """``VOLUME@NAME``."""
        if record.base is None:
            return None
        try:
            state, snapshot = self.find(*record.base)
        except CorruptionError:
            return None
        return f"{state.name}@{snapshot.name}"

    def names_by_base(self) -> dict[tuple[int, int], list[str]]:
        """The clones of each snapshot that has any, sorted."""
        found: dict[tuple[int, int], list[str]] = {}
        for name, state in sorted(self._volumes.items()):
            if state.record.base is not None:
                found.setdefault(state.record.base, []).append(name)
        return found

    def dependents(self, state: VolumeState) -> list[VolumeState]:
        """The clones of its snapshots, theirs, and so on, each after what it depends on."""
        found: dict[int, VolumeState] = {state.record.number: state}
        for other in sorted(self._volumes.values(), key=lambda one: one.record.number):
            if other.record.base is not None and other.record.base[0] in found:
                found[other.record.number] = other
        del found[state.record.number]
        return list(found.values())

    # Freeing a clone from its base

    def flatten(self, volume: RedirectedVolume, progress: Progress | None) -> None:
        """On any thread but the preserver's."""
        work = Flattening(self._index, self._store, volume)

        def step() -> bool:
            if self._volumes.get(volume.name) is not volume:
                raise ConflictError(f"volume {volume.name} was deleted meanwhile")
            volume.check_not_rolling_back()
            if volume.record.base is None or work.step():
                return volume.record.base is not None
            self._detach(volume)
            return False

        while self._preserver.run(step):
            if progress is not None:
                progress(work.done_bytes, volume.size)
        if progress is not None:
            progress(volume.size, volume.size)

    def _detach(self, volume: RedirectedVolume) -> None:
        """Nothing of the base is needed any more."""
        record = replace(volume.record, base=None, kind="thin")
        self._index.update(lambda txn: txn.put_volume(record.number, record.to_json()))
        with self._lock:
            volume.record = record
        volume.chunks.rebase(ZeroBase())
        for clone in self.dependents(volume):
            if isinstance(clone, RedirectedVolume):
                clone.chunks.rebase(self._base_of(clone.record))

    # Deleting a volume

    def mark_deleted(self, state: VolumeState) -> None:
        """In one transaction.  On the preserver's thread."""
        record = replace(state.record, deleting=True)
        self._index.update(lambda txn: txn.put_volume(record.number, record.to_json()))
        self._deleting.append(record)

    def reclaim(self, number: int) -> None:
        """Free the slots of a volume that is marked as deleted.  On any thread but the preserver's."""
        while self._preserver.run(lambda: self._reclaim_step(number)):
            pass

    def put_aside(self, record: VolumeRecord) -> None:
        """One that an earlier process marked as deleted."""
        self._deleting.append(record)

    def resume(self) -> None:
        for record in list(self._deleting):
            self._workers.submit(self._go_on, record)

    def _go_on(self, record: VolumeRecord) -> None:
        try:
            self.reclaim(record.number)
        except ConflictError:
            log.info("volume %s: its deletion goes on at the next start", record.name)
        except (OSError, NbdsnapError) as error:
            log.error("volume %s: the space of the deleted volume is not given back: %s", record.name, error)

    def _reclaim_step(self, number: int) -> bool:
        """One transaction.  Whether there is more to do."""

        def change(txn: IndexWriter) -> tuple[list[int], bool]:
            slots: list[int] = []
            chunks: list[int] = []
            for chunk, slot in txn.current(number).items(0, MAX_CHUNKS):
                chunks.append(chunk)
                if slot < MAX_SLOTS:
                    slots.append(slot)
                if len(chunks) == DELETE_SLOTS:
                    break
            txn.current(number).change((chunk, None) for chunk in chunks)
            txn.change_slots(freed=slots)
            if len(chunks) < DELETE_SLOTS:
                txn.delete_volume(number)
                return slots, False
            return slots, True

        slots, more = self._index.update(change)
        if not more:
            self._deleting = [record for record in self._deleting if record.number != number]
        self._store.free(slots)
        return more


def _unreadable(state: VolumeState, snapshot: SnapshotRecord, problem: NbdsnapError) -> NbdsnapError:
    """It is not the clone's own origin that was changed: there is nothing of it to be accepted."""
    kind = OriginError if isinstance(problem, OriginChangedError) else type(problem)
    return kind(f"the base {state.name}@{snapshot.name} can't be read: {problem}", hint=problem.advice)


def check_no_clones(clones: Mapping[tuple[int, int], list[str]], state: VolumeState, snapshot: SnapshotRecord) -> None:
    """InUseError where the snapshot has any."""
    names = clones.get((state.record.number, snapshot.epoch))
    if names:
        raise InUseError(
            f"{state.name}@{snapshot.name} has clones: {', '.join(names)}",
            hint="delete them first, or free them with: nbdsnap volume flatten",
        )


def _nothing() -> None:
    """A base's snapshot is kept by its clone, not counted as open."""
