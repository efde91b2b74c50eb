"""The live data of a thin volume or clone: chunks in the store, by the table ``current``, over a base.

Reading without locks
---------------------
A chunk's place changes when the preserver has committed that: then :meth:`LiveChunks.moved` enters it into the map in
memory and raises ``generation``, and only then the old slot may get other content.  So a reader who finds the
generation unchanged after the read has read what it looked up; else it begins again.  Reads go in pieces, so that this
stays rare.

What a slot holds is written in place while the chunk is exclusive.  So a live chunk has no checksum, as little as one
of an origin; it gets one when it is preserved.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from nbdsnap.engine.base import Base
from nbdsnap.engine.device import Extent
from nbdsnap.engine.slotmap import ABSENT, FIRST, ZEROES, SlotMap
from nbdsnap.errors import CorruptionError
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.current import GROUP, Change
from nbdsnap.store.index import Index
from nbdsnap.store.layout import CHUNK, CHUNK_SHIFT, LOST_SLOT, ZERO_SLOT, chunk_count

PIECE = 256 << 10
"""Bytes that are looked up and read at a time."""

Range = tuple[int, int]
"""Half-open, of bytes."""

Run = tuple[int, int, int]
"""``(first chunk, end, place)``, the place as of :class:`~nbdsnap.engine.slotmap.SlotMap`."""


class LiveChunks:
    """Of the volume number ``volume``.  ``lock`` is the volume's, which its owner sets."""

    lock: threading.Lock

    def __init__(self, volume: int, index: Index, store: ChunkStore, base: Base) -> None:
        self._volume = volume
        self._index = index
        self.store = store
        self.base = base
        self.slots = SlotMap()
        self.generation = 0
        self.fd = store.fd
        self.path: Path = store.path
        self._failed_syncs = store.failed_syncs

    # Reading

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        """From the page cache; False where the disk would be waited for."""
        inside = offset & (CHUNK - 1)
        if inside + len(buffer) <= CHUNK:
            generation = self.generation
            place = self.slots.get(offset >> CHUNK_SHIFT)
            if place >= FIRST:
                return self.store.read_now(buffer, place - FIRST, inside) and self.generation == generation
        try:
            return self._read(buffer, offset, now=True)
        except CorruptionError:
            return False  # whoever waits is told; perhaps it is being written over

    def read_into(self, buffer: memoryview, offset: int) -> None:
        for start in range(0, len(buffer), PIECE):
            piece = buffer[start : start + PIECE]
            while not self._read(piece, offset + start, now=False):
                pass

    def _read(self, buffer: memoryview, offset: int, *, now: bool) -> bool:
        """False where ``now`` the disk would be waited for, and where a chunk was moved meanwhile."""
        generation = self.generation
        end = offset + len(buffer)
        for first, stop, place in self.runs(offset >> CHUNK_SHIFT, chunk_count(end)):
            low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
            part = buffer[low - offset : high - offset]
            if place == ABSENT:
                if not self.base.read(part, low, now=now):
                    return False
            elif place == ZEROES:
                part[:] = bytes(len(part))
            else:
                slot, inside = place - FIRST + (low >> CHUNK_SHIFT) - first, low & (CHUNK - 1)
                if not now:
                    self.store.read_into(part, slot, inside)
                elif not self.store.read_now(part, slot, inside):
                    return False
        return self.generation == generation

    def runs(self, first: int, end: int) -> list[Run]:
        """Where the chunks [first, end) lie: consecutive runs.  CorruptionError where one was lost."""
        found = self.slots.runs(first, end)
        return self._ask_index(first, end) if found is None else found

    def _ask_index(self, first: int, end: int) -> list[Run]:
        low, high = first & -GROUP, (end + GROUP - 1) & -GROUP
        generation = self.generation
        with self._index.read() as reader:
            items = list(reader.current(self._volume).items(low, high))
        with self.lock:
            if generation == self.generation:
                self.slots.fill(low, high, items)
        found = SlotMap()
        found.fill(low, high, items)
        runs = found.runs(first, end)
        if runs is None:
            lost = next(chunk for chunk, slot in items if slot == LOST_SLOT and chunk >= first)
            raise CorruptionError(f"the data at offset {lost << CHUNK_SHIFT} was lost to earlier damage")
        return runs

    def data_extents(self, offset: int, length: int) -> Iterator[Range]:
        """Ascending half-open ranges of bytes that hold data; the rest reads as zeroes."""
        for first, stop, is_own in self._layout(offset, length):
            if is_own:
                yield first, stop
            else:
                yield from self.base.data_extents(first, stop - first)

    def own_extents(self, offset: int, length: int) -> list[Range]:
        """Likewise, those that do not come from the base."""
        return [(first, stop) for first, stop, is_own in self._layout(offset, length) if is_own]

    def _layout(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Ascending ranges of bytes with data of the volume's own (True), or of which the base decides (False)."""
        end = offset + length
        with self._index.read() as reader:
            items = _merged(reader.current(self._volume).items(offset >> CHUNK_SHIFT, chunk_count(end)))
        found: list[tuple[int, int, bool]] = []
        position = offset
        for first, stop, is_data in items:
            low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
            if position < low:
                found.append((position, low, False))
            if is_data:
                found.append((low, high, True))
            position = high
        if position < end:
            found.append((position, end, False))
        return found

    def is_sparse(self) -> bool:
        return True

    def will_need(self, offset: int, length: int) -> None:
        end = offset + length
        for first, stop, place in self.runs(offset >> CHUNK_SHIFT, chunk_count(end)):
            if place >= FIRST:
                self.store.will_need(place - FIRST, stop - first)
            elif place == ABSENT:
                low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
                self.base.will_need(low, high - low)

    # Changing

    def moved(self, changes: Iterable[Change]) -> None:
        """A transaction has changed these entries: the last look at the old ones is over when this returns."""
        with self.lock:
            for chunk, slot in changes:
                self.slots.put(chunk, slot)
            self.generation += 1

    def rebase(self, base: Base) -> None:
        """What no entry says is now in ``base``, and the same as before."""
        with self.lock:
            self.base = base
            self.generation += 1

    def sync(self) -> None:
        """Make durable what was written in place.  Once a sync of the store has failed, so do all of this volume: the
        kernel tells the failure to one thread only."""
        self.store.sync(self._failed_syncs)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        raise AssertionError("only an operation as a whole can be written")

    def punch_hole(self, offset: int, length: int, *, fast: bool = False) -> None:
        raise AssertionError("only an operation as a whole can be written")

    zero_range = punch_hole

    def drop_cached(self, offset: int, length: int) -> None:
        """Nothing asks for it."""

    def close(self) -> None:
        """The store is the pool's."""


def _merged(items: Iterable[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    """``(first chunk, end, whether they hold data)`` of neighbouring entries."""
    found: list[tuple[int, int, bool]] = []
    for chunk, slot in items:
        is_data = slot != ZERO_SLOT
        if found and found[-1][1] == chunk and found[-1][2] == is_data:
            found[-1] = found[-1][0], chunk + 1, is_data
        else:
            found.append((chunk, chunk + 1, is_data))
    return found


def layers(own: Iterable[Range], below: Iterable[Range], offset: int, end: int) -> list[Extent]:
    """See :meth:`nbdsnap.engine.device.Device.depths`.  ``own`` and ``below``: ascending; the former lies above."""
    found: list[Extent] = []

    def add(length: int, depth: int) -> None:
        if found and found[-1][1] == depth:
            found[-1] = found[-1][0] + length, depth
        elif length:
            found.append((length, depth))

    position = offset
    lower = list(below)
    for low, high in [*own, (end, end)]:
        low = max(low, position)
        for start, stop in lower:
            start, stop = max(start, position), min(stop, low)
            if start < stop:
                add(start - position, 0)
                add(stop - start, 2)
                position = stop
        if position < low:
            add(low - position, 0)
        if high > low:
            add(high - low, 1)
        position = max(position, low, high)
    return found
