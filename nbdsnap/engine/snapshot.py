"""A snapshot, opened: an immutable view of a volume at the end of an epoch.

Reading without locks
---------------------
A chunk comes from the first record at or after the snapshot's epoch, or, where there is none, from the live data.  A
record never changes while the snapshot lives.  Live data may be overwritten between the look into the index and the
read; but the preserver commits the record, then raises the volume's ``generation``, and only then overwrites.  So:

1. note the generation, look up the records;
2. read the recorded chunks from the store, all others from the live data;
3. generation unchanged: done.  Else look up again: a chunk that has a record now is read from the store; one that
   still has none was not overwritten before this second look, hence not during the read.

Every chunk read from the store is checked against its checksum.  A rollback to the newest snapshot takes the records of
what is in place again away, raises the generation, and only then are the slots written again.  So a chunk that is not
what its record says is looked up again where the generation has moved; else it is damaged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import xxhash

from nbdsnap.engine.device import STATE_HOLE, STATE_ZERO, Extent, Op
from nbdsnap.engine.diff import ChangeMap
from nbdsnap.engine.records import SnapshotRecord
from nbdsnap.engine.volume import Volume, data_and_holes
from nbdsnap.errors import ConflictError, CorruptionError
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.index import Index, Record, checksum_seed
from nbdsnap.store.layout import CHUNK, CHUNK_SHIFT, LOST_SLOT, ZERO_SLOT, chunk_count

log = logging.getLogger(__name__)

EXTENT_TRIES = 3
"""How often a map of extents is made again because the volume was written meanwhile, before live data counts as
data."""


class _Flags(NamedTuple):
    """What a map says of a chunk by where its data is."""

    nothing: int
    preserved: int
    live: int


_ALLOCATION = _Flags(nothing=STATE_HOLE | STATE_ZERO, preserved=0, live=0)
_DEPTH = _Flags(nothing=0, preserved=1, live=2)


class SnapshotDevice:
    """The :class:`~nbdsnap.engine.device.Device` of a snapshot.  ``closed`` is called once."""

    read_only = True

    def __init__(
        self,
        volume: Volume,
        record: SnapshotRecord,
        index: Index,
        store: ChunkStore,
        bases: Mapping[str, ChangeMap],
        closed: Callable[[], None],
    ) -> None:
        self.name = f"{volume.name}@{record.name}"
        self.size = record.size
        self._volume = volume
        self._epoch = record.epoch
        self._index = index
        self._store = store
        self._bases = bases
        self._closed: Callable[[], None] | None = closed
        self._close_lock = threading.Lock()

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        return self._read(buffer, offset, self._volume.read_in_place_now, self._store.read_now)

    def read(self, buffer: memoryview, offset: int) -> None:
        self._read(buffer, offset, self._read_live, self._read_stored)

    def write_now(self, offset: int, data: memoryview) -> bool:
        raise ConflictError(f"{self.name} is a snapshot: it never changes")

    def writes_now(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool]:
        return [False] * len(writes)

    def flush_now(self) -> bool:
        return True

    def submit(self, op: Op) -> None:
        op.done(ConflictError(f"{self.name} is a snapshot: it never changes") if op.length else None)

    def extents(self, offset: int, length: int) -> list[Extent]:
        return self._map(offset, length, _ALLOCATION)

    def depths(self, offset: int, length: int) -> list[Extent]:
        return self._map(offset, length, _DEPTH)

    def changes(self, base: str, offset: int, length: int) -> Iterator[Extent]:
        return self._bases[base].extents(offset, length)

    def is_sparse(self) -> bool:
        return self._volume.is_sparse()

    def cache(self, offset: int, length: int) -> None:
        end = offset + length
        position = offset
        for record in self._lookup(offset, end):
            start = record.chunk << CHUNK_SHIFT
            if start > position:
                self._volume.cache_in_place(position, start - position)
            if record.has_slot:
                self._store.will_need(record.slot)
            position = start + CHUNK
        if position < end:
            self._volume.cache_in_place(position, end - position)

    def close(self) -> None:
        with self._close_lock:
            closed, self._closed = self._closed, None
        if closed is not None:
            closed()

    # Reading

    def _lookup(self, offset: int, end: int) -> list[Record]:
        with self._index.read() as reader:
            cursor = reader.cursor(self._volume.record.number)
            return cursor.lookup(offset >> CHUNK_SHIFT, chunk_count(end), self._epoch)

    def _read_live(self, buffer: memoryview, offset: int) -> bool:
        self._volume.origin.read_into(buffer, offset)
        return True

    def _read_stored(self, buffer: memoryview, slot: int) -> bool:
        self._store.read_into(buffer, slot)
        return True

    def _read(
        self,
        buffer: memoryview,
        offset: int,
        live: Callable[[memoryview, int], bool],
        stored: Callable[[memoryview, int], bool],
    ) -> bool:
        """Fill ``buffer``; ``live`` and ``stored`` read from the origin and the store, or return False, as this does
        then."""
        while True:
            generation = self._volume.generation
            try:
                return self._read_as_of(generation, buffer, offset, live, stored)
            except CorruptionError as error:
                if self._volume.generation == generation:
                    log.error("%s", error)
                    raise

    def _read_as_of(
        self,
        generation: int,
        buffer: memoryview,
        offset: int,
        live: Callable[[memoryview, int], bool],
        stored: Callable[[memoryview, int], bool],
    ) -> bool:
        volume = self._volume
        end = offset + len(buffer)
        records = self._lookup(offset, end)
        position = offset
        for record in records:
            start = record.chunk << CHUNK_SHIFT
            if start > position and not live(buffer[position - offset : start - offset], position):
                return False
            position = start + CHUNK
        if position < end and not live(buffer[position - offset :], position):
            return False
        if not self._read_records(buffer, offset, records, stored):
            return False
        if volume.generation == generation:
            return True
        known = {record.chunk for record in records}
        later = [record for record in self._lookup(offset, end) if record.chunk not in known]
        return self._read_records(buffer, offset, later, stored)

    def _read_records(
        self, buffer: memoryview, offset: int, records: list[Record], stored: Callable[[memoryview, int], bool]
    ) -> bool:
        """Fill in the recorded chunks, as far as they are inside the buffer; one read for neighbouring slots."""
        end = offset + len(buffer)
        run: list[Record] = []
        for record in records:
            start = record.chunk << CHUNK_SHIFT
            if start < offset or start + CHUNK > end:
                if not self._read_part(buffer, offset, record, stored):
                    return False
                continue
            if run and (record.slot != run[-1].slot + 1 or record.chunk != run[-1].chunk + 1 or not record.has_slot):
                if not self._read_run(buffer, offset, run, stored):
                    return False
                run = []
            run.append(record)
        return not run or self._read_run(buffer, offset, run, stored)

    def _read_run(
        self, buffer: memoryview, offset: int, run: list[Record], stored: Callable[[memoryview, int], bool]
    ) -> bool:
        """Whole chunks in neighbouring slots."""
        start = (run[0].chunk << CHUNK_SHIFT) - offset
        part = buffer[start : start + (len(run) << CHUNK_SHIFT)]
        if run[0].slot == ZERO_SLOT:
            part[:] = bytes(len(part))
        elif run[0].has_slot and not stored(part, run[0].slot):
            return False
        for position, record in enumerate(run):
            self._verify(record, part[position << CHUNK_SHIFT : (position + 1) << CHUNK_SHIFT])
        return True

    def _read_part(
        self, buffer: memoryview, offset: int, record: Record, stored: Callable[[memoryview, int], bool]
    ) -> bool:
        """A chunk that the buffer holds only a part of: it is read whole, to be checked."""
        whole = memoryview(bytearray(CHUNK))
        if record.has_slot and not stored(whole, record.slot):
            return False
        self._verify(record, whole)
        start = record.chunk << CHUNK_SHIFT
        low, high = max(start, offset), min(start + CHUNK, offset + len(buffer))
        buffer[low - offset : high - offset] = whole[low - start : high - start]
        return True

    def _verify(self, record: Record, data: memoryview) -> None:
        where = record.chunk << CHUNK_SHIFT
        if record.slot == LOST_SLOT:
            raise CorruptionError(f"{self.name}: the data at offset {where} was lost to earlier damage", offset=where)
        if not is_intact(self._volume.record.number, record, data):
            raise CorruptionError(
                f"{self.name}: the data at offset {where} (slot {record.slot} of the store) is damaged",
                hint="run: nbdsnap check --data",
                offset=where,
            )

    def _map(self, offset: int, length: int, flags: _Flags) -> list[Extent]:
        for _ in range(EXTENT_TRIES):
            generation = self._volume.generation
            found = self._extents(offset, self._lookup(offset, offset + length), length, flags, live_holes=True)
            if self._volume.generation == generation:
                return found
        return self._extents(offset, self._lookup(offset, offset + length), length, flags, live_holes=False)

    def _extents(
        self, offset: int, records: list[Record], length: int, flags: _Flags, *, live_holes: bool
    ) -> list[Extent]:
        origin = self._volume.origin
        found: list[Extent] = []

        def add(size: int, value: int) -> None:
            if found and found[-1][1] == value:
                found[-1] = found[-1][0] + size, value
            elif size:
                found.append((size, value))

        def add_live(start: int, stop: int) -> None:
            for size, state in data_and_holes(origin, start, stop - start) if live_holes else [(stop - start, 0)]:
                add(size, flags.nothing if state else flags.live)

        end = offset + length
        position = offset
        for record in records:
            start = max(record.chunk << CHUNK_SHIFT, offset)
            stop = min((record.chunk + 1) << CHUNK_SHIFT, end)
            if start > position:
                add_live(position, start)
            add(stop - start, flags.nothing if record.slot == ZERO_SLOT else flags.preserved)
            position = stop
        if position < end:
            add_live(position, end)
        return found


def is_intact(volume: int, record: Record, data: memoryview) -> bool:
    """Whether ``data``, a whole chunk, is what was preserved as ``record``."""
    seed = checksum_seed(volume, record.chunk, record.epoch)
    return xxhash.xxh3_64_intdigest(data, seed) == record.checksum
