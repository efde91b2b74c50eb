"""What a snapshot of a thin volume or clone holds, and what a clone's base does, however many clones lie between.

One snapshot
------------
The content of chunk ``c`` in snapshot ``(volume, epoch)`` is, as with an origin, the first record of ``c`` at or after
the epoch; where there is none, the live chunk's slot, which a snapshot shares as long as no record says otherwise; and
where the record says BASE_SLOT, or there is no slot either, what the volume's base holds.

All of that is in the index as of one moment, and a slot that a snapshot needs neither changes nor moves: it only gets a
record, with a checksum.  So there is nothing to look at twice, but after a rollback, which may free what it has put in
place again: it raises the volume's ``generation`` before that.

A chain of them
---------------
A clone's base is a snapshot, perhaps of another clone, and so on, down to an origin or to zeroes.  Which snapshot of
this chain holds a chunk never changes: snapshots don't, and the whole chain is kept by the clone.  So the answer is
remembered, a byte for each chunk, filled by blocks of 16 MiB; with it, a read costs the same at any depth.

(A rollback, or freeing a volume from its base, may leave the same content to another one of the chain.  What is
remembered is then as true as before; and one that holds nothing any more asks the next.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from nbdsnap.engine.base import Base
from nbdsnap.engine.snapshot import SnapshotDevice, is_intact
from nbdsnap.errors import CorruptionError
from nbdsnap.store import chunkset
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.current import GROUP, GROUP_SHIFT
from nbdsnap.store.index import Index, IndexReader, Record
from nbdsnap.store.layout import (
    BASE_SLOT,
    BLOCK,
    BLOCK_SHIFT,
    CHUNK,
    CHUNK_SHIFT,
    MAX_SLOTS,
    ZERO_SLOT,
    chunk_count,
)

log = logging.getLogger(__name__)

Found = tuple[int, int, Record | None]
"""Chunk, slot, and the record with its checksum, where it has one yet."""

Missing = Callable[[memoryview, int], bool]
"""Reads what a snapshot does not hold itself."""

MAX_OWNER_BLOCKS = 8192
"""4 KiB each: 32 MiB for 128 GiB of a clone that is being read."""

MAX_LEVELS = 255
"""As many a byte can tell apart; a longer chain is asked one by one behind that."""


class SnapshotChunks:
    """What the snapshot ``epoch`` of the volume number ``volume`` holds itself.  ``name`` is for people."""

    def __init__(
        self, name: str, volume: int, epoch: int, index: Index, store: ChunkStore, generation: Callable[[], int]
    ) -> None:
        self.name = name
        self.volume = volume
        self.epoch = epoch
        self._index = index
        self._store = store
        self._generation = generation

    def find(self, first: int, end: int) -> list[Found]:
        """The chunks of [first, end) that it holds, ascending."""
        with self._index.read() as reader:
            records = reader.cursor(self.volume).lookup(first, end, self.epoch)
            items = list(reader.current(self.volume).items(first, end))
        if not records:
            return [(chunk, slot, None) for chunk, slot in items]
        found: dict[int, Found] = {chunk: (chunk, slot, None) for chunk, slot in items}
        for record in records:
            if record.slot == BASE_SLOT:
                found.pop(record.chunk, None)
            else:
                found[record.chunk] = record.chunk, record.slot, record
        return [found[chunk] for chunk in sorted(found)]

    def read(self, buffer: memoryview, offset: int, missing: Missing, *, now: bool) -> bool:
        """Fill ``buffer``; False where ``now`` the disk would be waited for."""
        while True:
            generation = self._generation()
            try:
                done = self._read(buffer, offset, missing, now=now)
            except CorruptionError as error:
                if self._generation() == generation:
                    log.error("%s", error)
                    raise
                continue
            if self._generation() == generation:
                return done

    def _read(self, buffer: memoryview, offset: int, missing: Missing, *, now: bool) -> bool:
        end = offset + len(buffer)
        position = offset
        run: list[Found] = []
        for one in self.find(offset >> CHUNK_SHIFT, chunk_count(end)):
            start = max(one[0] << CHUNK_SHIFT, offset)
            if start > position and not missing(buffer[position - offset : start - offset], position):
                return False
            position = min((one[0] + 1) << CHUNK_SHIFT, end)
            if run and not _follows(run[-1], one):
                if not self._read_run(buffer, offset, run, now=now):
                    return False
                run = []
            run.append(one)
        if run and not self._read_run(buffer, offset, run, now=now):
            return False
        return position >= end or missing(buffer[position - offset :], position)

    def _read_run(self, buffer: memoryview, offset: int, run: list[Found], *, now: bool) -> bool:
        """Chunks in neighbouring slots, or a single one of another kind."""
        end = offset + len(buffer)
        chunk, slot, record = run[0]
        low, high = max(chunk << CHUNK_SHIFT, offset), min((run[-1][0] + 1) << CHUNK_SHIFT, end)
        part = buffer[low - offset : high - offset]
        if slot == ZERO_SLOT:
            part[:] = bytes(len(part))
            return True
        if slot >= MAX_SLOTS:
            raise CorruptionError(f"{self.name}: the data at offset {low} was lost to earlier damage", offset=low)
        if record is None:
            return self._read_slots(part, slot, low & (CHUNK - 1), now=now)
        is_whole = not (low | high) & (CHUNK - 1)
        whole = part if is_whole else memoryview(bytearray(len(run) << CHUNK_SHIFT))  # to be checked
        if not self._read_slots(whole, slot, 0, now=now):
            return False
        self._verify(run, whole)
        if not is_whole:
            part[:] = whole[low - (chunk << CHUNK_SHIFT) : high - (chunk << CHUNK_SHIFT)]
        return True

    def _read_slots(self, buffer: memoryview, slot: int, inside: int, *, now: bool) -> bool:
        if now:
            return self._store.read_now(buffer, slot, inside)
        self._store.read_into(buffer, slot, inside)
        return True

    def _verify(self, run: list[Found], data: memoryview) -> None:
        for position, (chunk, slot, record) in enumerate(run):
            assert record is not None
            if not is_intact(self.volume, record, data[position << CHUNK_SHIFT : (position + 1) << CHUNK_SHIFT]):
                where = chunk << CHUNK_SHIFT
                raise CorruptionError(
                    f"{self.name}: the data at offset {where} (slot {slot} of the store) is damaged",
                    hint="run: nbdsnap check --data",
                    offset=where,
                )

    def data_runs(self, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """``(first chunk, end, whether it may be other than zeroes)`` of the chunks it holds, neighbours together."""
        start = stop = 0
        is_data = False
        for chunk, slot, _ in self.find(first, end):
            if stop != chunk or is_data != (slot != ZERO_SLOT):
                if start < stop:
                    yield start, stop, is_data
                start, is_data = chunk, slot != ZERO_SLOT
            stop = chunk + 1
        if start < stop:
            yield start, stop, is_data

    def will_need(self, first: int, end: int) -> None:
        for _, slot, _ in self.find(first, end):
            if slot < MAX_SLOTS:
                self._store.will_need(slot)

    def owned(self, reader: IndexReader, block: int) -> int:
        """The set of the block's chunks that it holds."""
        members = 0
        first = block << (BLOCK_SHIFT - GROUP_SHIFT)
        for group, of_group in reader.current(self.volume).members(first, first + BLOCK // GROUP):
            members |= of_group << ((group - first) << GROUP_SHIFT)
        base = block << BLOCK_SHIFT
        for record in reader.cursor(self.volume).lookup(base, base + BLOCK, self.epoch):
            bit = 1 << (record.chunk - base)
            members = members & ~bit if record.slot == BASE_SLOT else members | bit
        return members


def _follows(one: Found, other: Found) -> bool:
    """Whether both can be read at once."""
    return (
        other[0] == one[0] + 1
        and other[1] == one[1] + 1
        and other[1] < MAX_SLOTS
        and (one[2] is None) == (other[2] is None)
    )


class OriginBase:
    """A snapshot of an origin, as a base."""

    is_zero = False

    def __init__(self, device: SnapshotDevice) -> None:
        self._device = device
        self._size = device.size

    def read(self, buffer: memoryview, offset: int, *, now: bool) -> bool:
        inside = max(0, min(len(buffer), self._size - offset))
        buffer[inside:] = bytes(len(buffer) - inside)
        if not inside:
            return True
        if now:
            return self._device.read_now(buffer[:inside], offset)
        self._device.read(buffer[:inside], offset)
        return True

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        length = min(length, self._size - offset)
        if length > 0:
            for size, flags in self._device.extents(offset, length):
                if not flags:
                    yield offset, offset + size
                offset += size

    def will_need(self, offset: int, length: int) -> None:
        length = min(length, self._size - offset)
        if length > 0:
            self._device.cache(offset, length)


class ChainBase:
    """The snapshots ``levels``, the nearest first, each over the next one, the last over ``last``."""

    is_zero = False

    def __init__(self, levels: Sequence[SnapshotChunks], last: Base, index: Index) -> None:
        self._levels = list(levels[:MAX_LEVELS])
        self._last = last if len(levels) <= MAX_LEVELS else ChainBase(levels[MAX_LEVELS:], last, index)
        self._index = index
        self._owners: dict[int, bytes] = {}
        """Block -> for each chunk, which level holds it."""

    def read(self, buffer: memoryview, offset: int, *, now: bool) -> bool:
        if len(self._levels) == 1:
            return self._read_from(0, buffer, offset, now=now)
        end = offset + len(buffer)
        for first, stop, level in self._runs(offset >> CHUNK_SHIFT, chunk_count(end), now=now):
            low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
            part = buffer[low - offset : high - offset]
            if level < 0 or not self._read_from(level, part, low, now=now):
                return False
        return True

    def _read_from(self, level: int, buffer: memoryview, offset: int, *, now: bool) -> bool:
        """What that level says, or where it has nothing, those behind it."""
        if level == len(self._levels):
            return self._last.read(buffer, offset, now=now)
        return self._levels[level].read(
            buffer, offset, lambda part, start: self._read_from(level + 1, part, start, now=now), now=now
        )

    def _runs(self, first: int, end: int, *, now: bool) -> Iterator[tuple[int, int, int]]:
        """``(first chunk, end, level)``; a negative level where ``now`` the index would have to be searched."""
        while first < end:
            block = first >> BLOCK_SHIFT
            base = block << BLOCK_SHIFT
            owners = self._owners.get(block)
            if owners is None:
                if now:
                    yield first, end, -1
                    return
                owners = self._find_owners(block)
            stop = min(end, base + BLOCK)
            while first < stop:
                level = owners[first - base]
                rest = owners[first - base : stop - base]
                last = stop - len(rest.lstrip(rest[:1]))
                yield first, last, level
                first = last

    def _find_owners(self, block: int) -> bytes:
        owners = bytearray([len(self._levels)]) * BLOCK
        left = (1 << BLOCK) - 1
        with self._index.read() as reader:
            for number, level in enumerate(self._levels):
                owned = level.owned(reader, block) & left
                if owned:
                    for first, end in chunkset.runs(owned):
                        owners[first:end] = bytes([number]) * (end - first)
                    left &= ~owned
        if len(self._owners) >= MAX_OWNER_BLOCKS:
            self._owners.pop(next(iter(self._owners)), None)
        self._owners[block] = bytes(owners)
        return self._owners[block]

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        end = offset + length
        if len(self._levels) == 1:
            yield from self._data_of_one(offset, end)
            return
        for first, stop, level in self._runs(offset >> CHUNK_SHIFT, chunk_count(end), now=False):
            low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
            if level == len(self._levels):
                yield from self._last.data_extents(low, high - low)
                continue
            position = low
            for start, ends, is_data in self._levels[level].data_runs(first, stop):
                if position < start << CHUNK_SHIFT:
                    yield position, start << CHUNK_SHIFT  # one that has nothing any more: let it be data
                position = min(ends << CHUNK_SHIFT, high)
                if is_data:
                    yield max(start << CHUNK_SHIFT, low), position
            if position < high:
                yield position, high

    def _data_of_one(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        position = offset
        for first, stop, is_data in self._levels[0].data_runs(offset >> CHUNK_SHIFT, chunk_count(end)):
            low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
            if position < low:
                yield from self._last.data_extents(position, low - position)
            if is_data:
                yield low, high
            position = high
        if position < end:
            yield from self._last.data_extents(position, end - position)

    def will_need(self, offset: int, length: int) -> None:
        end = offset + length
        for first, stop, level in self._runs(offset >> CHUNK_SHIFT, chunk_count(end), now=False):
            if level == len(self._levels):
                low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
                self._last.will_need(low, high - low)
            else:
                self._levels[level].will_need(first, stop)
