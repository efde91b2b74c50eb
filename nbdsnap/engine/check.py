"""Does the pool keep its invariants?  Each is checked from what lies on disk, against an independent count.

A violated one is a :class:`~nbdsnap.models.Problem`, whose ``kind`` is one of:

=============  ===========================================================================
``index``      a part of the index can't be read (only on a pool that no process has open)
``log``        the intent log is damaged: acknowledged writes may be lost (likewise)
``store``      the file of preserved chunks is missing (likewise)
``record``     a volume's, snapshot's or the pool's own record is damaged or contradicts another
``changed``    the table ``changed`` is not ``preserved`` turned around
``slot``       a slot is used twice, or used and not marked so, or beyond the store's end
``leak``       a slot is marked as used, and no record points at it
``usage``      the counts of ``usage`` differ from the records
``live``       the table ``current``, or its count, contradicts the volume (thin volumes and clones)
``useless``    a record serves no snapshot
``checksum``   a preserved chunk does not read back as it was written (with ``--data``)
``lost``       a preserved or live chunk was lost, and marked as such: reading it is an error
=============  ===========================================================================
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from nbdsnap.engine.records import SnapshotRecord, VolumeRecord
from nbdsnap.engine.snapshot import is_intact
from nbdsnap.errors import CorruptionError
from nbdsnap.models import Problem
from nbdsnap.store import chunkset
from nbdsnap.store.chunkstore import coalesce
from nbdsnap.store.index import JsonObject, Record
from nbdsnap.store.layout import (
    BASE_SLOT,
    BLOCK,
    BLOCK_SHIFT,
    CHUNK,
    CHUNK_SHIFT,
    LOST_SLOT,
    MAX_SLOTS,
    ZERO_SLOT,
    chunk_count,
)

Progress = Callable[[int, int], None]
"""Called with (done, total) slots."""

PROGRESS_STEP = 4096
"""Slots between two reports of progress."""


class Tables(Protocol):
    """What a check reads: :class:`~nbdsnap.store.index.IndexReader`, or :class:`~nbdsnap.store.salvage.Salvage`."""

    def volumes(self) -> Iterator[tuple[int, JsonObject]]: ...
    def snapshots(self) -> Iterator[tuple[int, int, JsonObject]]: ...
    def records(self, volume: int) -> Iterator[Record]: ...
    def changed(self, volume: int, first_epoch: int, end_epoch: int) -> Iterator[tuple[int, int, int]]: ...
    def slots(self) -> Iterator[tuple[int, int]]: ...
    def usage(self, volume: int) -> Iterator[tuple[int, int, int]]: ...
    def current_items(self, volume: int) -> Iterator[tuple[int, int]]: ...
    def live_slots(self, volume: int) -> int: ...


class Source(Protocol):
    """The index, or what stands for it.  Each ``read`` may see a later state."""

    def read(self) -> AbstractContextManager[Tables]: ...


class Chunks(Protocol):
    """Where preserved chunks are read from: :class:`~nbdsnap.store.chunkstore.ChunkStore`, or what stands for it."""

    @property
    def file_slots(self) -> int: ...

    def read_into(self, buffer: memoryview, slot: int) -> None: ...


class Checker:
    """One check of one pool, as of one read.  ``data``: verify the checksum of every preserved chunk as well.

    ``newer``: for a pool in use: the record as it is now, None where it is gone.
    """

    def __init__(
        self,
        source: Source,
        store: Chunks,
        *,
        data: bool = False,
        progress: Progress | None = None,
        newer: Callable[[int, Record], Record | None] | None = None,
    ) -> None:
        self._source = source
        self._store = store
        self._data = data
        self._progress = progress
        self._newer = newer
        self._buffer = memoryview(bytearray(CHUNK))
        self._seen: dict[int, int] = {}
        """Block of slots -> set of the slots that a record points at."""
        self._done = 0

    def problems(self) -> Iterator[Problem]:
        with self._source.read() as tables:
            try:
                volumes, snapshots = load_records(tables)
            except CorruptionError as error:
                yield Problem(kind="record", detail=str(error))
                return
            self._total = sum(members.bit_count() for _, members in tables.slots())
            for number in snapshots.keys() - volumes.keys():
                yield Problem(kind="record", detail=f"snapshots of volume number {number}, which does not exist")
            bases = {(number, one.epoch) for number, of in snapshots.items() for one in of if not one.deleting}
            for number, volume in volumes.items():
                yield from self._check_volume(tables, volume, snapshots.get(number, []))
                if volume.base is not None and not volume.deleting and volume.base not in bases:
                    detail = f"volume {volume.name}: the snapshot that it is a clone of is not there"
                    yield Problem(kind="record", detail=detail, volume=volume.name)
            yield from self._check_slots(tables)
        if self._progress:
            self._progress(self._total, self._total)

    def _check_volume(self, tables: Tables, volume: VolumeRecord, snapshots: list[SnapshotRecord]) -> Iterator[Problem]:
        names = [snapshot.name for snapshot in snapshots if not snapshot.deleting]
        for name in {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ():
            yield Problem(kind="record", detail=f"two snapshots {volume.name}@{name}", volume=volume.name)
        if snapshots and snapshots[-1].epoch >= volume.epoch:
            detail = f"volume {volume.name}: its epoch {volume.epoch} is not after its snapshots'"
            yield Problem(kind="record", detail=detail, volume=volume.name)
        changed: dict[tuple[int, int], int] = {}
        usage: dict[tuple[int, int], int] = {}
        served = Served(volume, snapshots)
        unreadable = _Unreadable(served)
        previous = Record(-1, 0, 0, 0)
        for record in tables.records(volume.number):
            before = previous.epoch if previous.chunk == record.chunk else 0
            where = record.epoch, record.chunk >> BLOCK_SHIFT
            changed[where] = changed.get(where, 0) | 1 << (record.chunk & (BLOCK - 1))
            if record.has_slot:
                usage[before, record.epoch] = usage.get((before, record.epoch), 0) + 1
            yield from self._check_record(served, record, before)
            yield from unreadable.add(self._fault(volume.number, record), record, before)
            previous = record
        yield from unreadable.end()
        yield from _compare_changed(tables, volume, changed)
        if usage != {(before, epoch): slots for before, epoch, slots in tables.usage(volume.number)}:
            detail = f"volume {volume.name}: the counts of shared slots are wrong"
            yield Problem(kind="usage", detail=detail, volume=volume.name)
        yield from self._check_live(tables, volume)

    def _check_live(self, tables: Tables, volume: VolumeRecord) -> Iterator[Problem]:
        """Live chunks have no checksums: what they hold can't be verified."""
        count = 0
        lost: list[int] = []
        end = volume.largest if volume.resizing else volume.size
        limit = chunk_count(end) if volume.origin is None else 0
        for chunk, slot in tables.current_items(volume.number):
            what = f"volume {volume.name}, live chunk {chunk}"
            if chunk >= limit and slot != ZERO_SLOT:  # a clone that was made smaller: its base has data there
                yield Problem(kind="live", detail=f"{what}: beyond the volume's size", volume=volume.name)
            if slot < MAX_SLOTS:
                count += 1
                if self._is_seen(slot):
                    detail = f"{what}: its slot {slot} is another chunk's as well"
                    yield Problem(kind="slot", detail=detail, volume=volume.name)
                self._count_done()
            elif slot == LOST_SLOT:
                lost.append(chunk)
        for first, length in coalesce(lost):
            offset, size = first << CHUNK_SHIFT, length << CHUNK_SHIFT
            detail = f"{volume.name}, bytes {offset} to {offset + size - 1}: {_UNREADABLE['lost']}"
            yield Problem(kind="lost", detail=detail, volume=volume.name, offset=offset, length=size)
        if count != tables.live_slots(volume.number):
            detail = f"volume {volume.name}: the count of its live slots is wrong"
            yield Problem(kind="live", detail=detail, volume=volume.name)

    def _is_seen(self, slot: int) -> bool:
        """Whether something points at the slot already; from now on something does."""
        block, bit = slot >> BLOCK_SHIFT, 1 << (slot & (BLOCK - 1))
        seen = self._seen.get(block, 0)
        self._seen[block] = seen | bit
        return bool(seen & bit)

    def _count_done(self) -> None:
        self._done += 1
        if self._progress and self._done % PROGRESS_STEP == 0:
            self._progress(min(self._done, self._total), self._total)

    def _check_record(self, served: Served, record: Record, before: int) -> Iterator[Problem]:
        volume = served.volume
        what = f"volume {volume.name}, chunk {record.chunk}, epoch {record.epoch}"
        if served.is_beyond(record):
            yield Problem(kind="record", detail=f"{what}: beyond the volume's size or epoch", volume=volume.name)
        if served.is_useless(before, record.epoch):
            yield Problem(kind="useless", detail=f"{what}: no snapshot needs it", volume=volume.name)
        if record.slot == BASE_SLOT and volume.origin is not None:
            yield Problem(kind="record", detail=f"{what}: as in its base, but it has none", volume=volume.name)
        if record.has_slot and self._is_seen(record.slot):
            detail = f"{what}: its slot {record.slot} is another chunk's as well"
            yield Problem(kind="slot", detail=detail, volume=volume.name, **served.range(record, before))
        self._count_done()

    def _fault(self, volume: int, record: Record) -> str | None:
        """The kind of problem that keeps the record's content from being read."""
        if record.slot == LOST_SLOT:
            return "lost"
        return "checksum" if self._data and not self._reads_back(volume, record) else None

    def _reads_back(self, volume: int, record: Record) -> bool:
        """Whether the record's content is intact, or the record is gone by now and its slot reused."""
        if reads_back(self._store, volume, record, self._buffer):
            return True
        if self._newer is None:
            return False
        present = self._newer(volume, record)
        return present is None or (
            present.slot != record.slot and reads_back(self._store, volume, present, self._buffer)
        )

    def _check_slots(self, tables: Tables) -> Iterator[Problem]:
        marked = dict(tables.slots())
        end = self._store.file_slots  # it never shrinks
        for block, seen in sorted(self._seen.items()):
            beyond = seen & ~chunkset.span(0, min(max(end - (block << BLOCK_SHIFT), 0), BLOCK))
            for first, stop in chunkset.runs(beyond):
                yield _slots_problem("slot", block, first, stop, "in use, and beyond the store's end")
        for block in sorted(marked.keys() | self._seen.keys()):
            used, seen = marked.get(block, 0), self._seen.get(block, 0)
            for first, end in chunkset.runs(seen & ~used):
                yield _slots_problem("slot", block, first, end, "in use, and not marked so")
            for first, end in chunkset.runs(used & ~seen):
                yield _slots_problem("leak", block, first, end, "marked as used, and no record points there")


class Served:
    """Which snapshots of a volume a record serves."""

    def __init__(self, volume: VolumeRecord, snapshots: list[SnapshotRecord]) -> None:
        self.volume = volume
        self._epochs = [snapshot.epoch for snapshot in snapshots]  # one that is being deleted may still have records
        self._snapshots = snapshots
        self._size = max([volume.largest, *(snapshot.size for snapshot in snapshots)])

    def is_beyond(self, record: Record) -> bool:
        """Whether the volume can't have such a record."""
        return record.epoch >= self.volume.epoch or record.chunk >= chunk_count(self._size)

    def is_useless(self, before: int, epoch: int) -> bool:
        """Whether no snapshot is in (before, epoch]."""
        return bisect_right(self._epochs, epoch) == bisect_right(self._epochs, before)

    def names(self, before: int, epoch: int) -> list[str]:
        """Of the live snapshots in (before, epoch], as VOLUME@NAME."""
        served = self._snapshots[bisect_right(self._epochs, before) : bisect_right(self._epochs, epoch)]
        return [f"{self.volume.name}@{snapshot.name}" for snapshot in served if not snapshot.deleting]

    def bytes(self, first: int, end: int | None) -> tuple[int, int]:
        """Offset and length of the chunks [first, end), as far as the volume goes."""
        offset = min(first << CHUNK_SHIFT, self._size)
        stop = self._size if end is None else min(end << CHUNK_SHIFT, self._size)
        return offset, max(stop - offset, 0)

    def range(self, record: Record, before: int) -> dict[str, Any]:
        """For a Problem: what one record stands for."""
        offset, length = self.bytes(record.chunk, record.chunk + 1)
        return {"snapshots": self.names(before, record.epoch), "offset": offset, "length": length}


_UNREADABLE = {"checksum": "its content is damaged", "lost": "its content was lost to earlier damage"}


class _Unreadable:
    """Collects the chunks whose content can't be read into ranges: one problem each."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._kind: str | None = None
        self._interval = (0, 0)
        self._first = self._end = 0

    def add(self, kind: str | None, record: Record, before: int) -> Iterator[Problem]:
        if kind is None:
            return
        interval = before, record.epoch
        if kind != self._kind or record.chunk != self._end or interval != self._interval:
            yield from self.end()
            self._kind, self._interval, self._first = kind, interval, record.chunk
        self._end = record.chunk + 1

    def end(self) -> Iterator[Problem]:
        if self._kind is None:
            return
        offset, length = self._served.bytes(self._first, self._end)
        names = self._served.names(*self._interval)
        what = f"{', '.join(names) or self._served.volume.name}, bytes {offset} to {offset + length - 1}"
        yield Problem(
            kind=self._kind,
            detail=f"{what}: {_UNREADABLE[self._kind]}",
            volume=self._served.volume.name,
            snapshots=names,
            offset=offset,
            length=length,
        )
        self._kind = None


def reads_back(store: Chunks, volume: int, record: Record, buffer: memoryview) -> bool:
    """Whether the content of ``record`` is what was preserved.  ``buffer``: a chunk, to work in."""
    if record.slot == BASE_SLOT:
        return is_intact(volume, record, buffer[:0])
    if record.slot == ZERO_SLOT:
        buffer[:] = bytes(CHUNK)
    elif record.has_slot:
        try:
            store.read_into(buffer, record.slot)
        except OSError:
            return False
    else:
        return False
    return is_intact(volume, record, buffer)


def load_records(tables: Tables) -> tuple[dict[int, VolumeRecord], dict[int, list[SnapshotRecord]]]:
    """The volumes, and their snapshots ascending, by the volumes' numbers."""
    volumes = {number: VolumeRecord.from_json(number, value) for number, value in tables.volumes()}
    snapshots: dict[int, list[SnapshotRecord]] = {}
    for number, epoch, value in tables.snapshots():
        snapshots.setdefault(number, []).append(SnapshotRecord.from_json(epoch, value))
    return volumes, snapshots


def _compare_changed(tables: Tables, volume: VolumeRecord, expected: dict[tuple[int, int], int]) -> Iterator[Problem]:
    def problem(epoch: int, block: int, what: str) -> Problem:
        detail = f"volume {volume.name}, epoch {epoch}, block {block}: {what}"
        return Problem(kind="changed", detail=detail, volume=volume.name)

    for epoch, block, members in tables.changed(volume.number, 0, 1 << 32):
        if expected.pop((epoch, block), 0) != members:
            yield problem(epoch, block, "a wrong set")
    for epoch, block in expected:
        yield problem(epoch, block, "missing")


def _slots_problem(kind: str, block: int, first: int, end: int, what: str) -> Problem:
    base = block << BLOCK_SHIFT
    return Problem(kind=kind, detail=f"slots {base + first} to {base + end - 1}: {what}")
