"""Redirecting: what thin volumes and clones do with a write, where an origin preserves.

A chunk whose slot some snapshot needs is not copied: ``preserved`` takes over the slot, with the checksum of what is in
it, and the new content goes to a new slot.  A chunk without a slot gets one.  The new slot has the whole new content
before anything points at it, so there is nothing left to be overwritten in place::

    new content in the store  <  one transaction: the record, and the live chunk's new slot  <  the intent's retirement
                              <  the reuse of a slot that the transaction freed

A chunk whose slot no snapshot needs is written in place, or loses its slot when all of it is zeroed.  What a snapshot
needs of a chunk without a slot is a record, too: that it was zeroes, or as in the base.

A batch's operations on one chunk are laid over each other in their order, and done at once.  All of it on the
preserver's thread.  Doing an operation again does no harm: that is how stalled intents are tried again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import xxhash

from nbdsnap.engine.device import Op, OpKind
from nbdsnap.engine.redirected import RedirectedVolume
from nbdsnap.engine.space import is_full
from nbdsnap.engine.unreadable import Loss, is_unreadable, mark_snapshots, put_marks
from nbdsnap.errors import CorruptionError, DeviceError, NbdsnapError
from nbdsnap.store.chunkstore import ChunkStore, coalesce
from nbdsnap.store.current import GROUP, Change
from nbdsnap.store.fileio import Buffer
from nbdsnap.store.index import Index, IndexWriter, NewRecords, Record, checksum_seed
from nbdsnap.store.intentlog import Intent
from nbdsnap.store.layout import (
    BASE_SLOT,
    BLOCK_SHIFT,
    CHUNK,
    CHUNK_SHIFT,
    LOST_SLOT,
    MAX_SLOTS,
    ZERO_SLOT,
    chunk_count,
)

LONG = 16 << 20
"""Bytes: a longer zeroing is done by itself, in steps."""

WINDOW = 1 << 30
"""Bytes of such a range in which data is looked for at a time."""

Piece = tuple[int, int, memoryview | None]
"""The bytes [low, high) of a chunk get this content; None: zeroes, and where it is all of the chunk, no slot."""

_ZERO_CHUNK = bytes(CHUNK)
_ZEROES = memoryview(_ZERO_CHUNK)


@dataclass
class Plan:
    """What one transaction changes, and what is written before and after it."""

    in_place: list[tuple[int, int]] = field(default_factory=list)
    """``(chunk, slot)`` whose pieces are written in place, after the transaction."""
    old: list[tuple[int, int, int]] = field(default_factory=list)
    """``(chunk, slot, previous epoch)``: a snapshot needs the slot."""
    records: list[tuple[int, int, int]] = field(default_factory=list)
    """``(chunk, ZERO_SLOT, BASE_SLOT or LOST_SLOT, previous epoch)``: a snapshot needs to know that."""
    fresh: list[tuple[int, int | None]] = field(default_factory=list)
    """``(chunk, old slot)``: it gets a new slot.  None: its old content is the base's."""
    dropped: list[Change] = field(default_factory=list)
    """Chunks that have no slot any more."""
    freed: list[int] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    """Old content that the store's disk can't read any more."""


class Redirection:
    """``slice_chunks``: how many are changed with one commit."""

    def __init__(self, index: Index, store: ChunkStore, slice_chunks: int) -> None:
        self._index = index
        self._store = store
        self._slice = slice_chunks
        self._old = memoryview(bytearray(slice_chunks * CHUNK))
        self.make_room: Callable[[int], bool] = lambda _: False

    def execute(self, volume: RedirectedVolume, ops: Sequence[Op | Intent]) -> tuple[Sequence[Op | Intent], Exception]:
        """Do all of ``ops``, in order.  Returns those that were not, or not wholly, done, and why."""
        position = 0
        while position < len(ops):
            end = position + 1
            if not _is_long(ops[position]):
                while end < len(ops) and not _is_long(ops[end]):
                    end += 1
            try:
                self._execute(volume, ops[position:end])
            except (OSError, NbdsnapError) as error:
                return ops[position:], error
            position = end
        return (), NbdsnapError("nothing is in the way")

    def _execute(self, volume: RedirectedVolume, ops: Sequence[Op | Intent]) -> None:
        if volume.failure is not None:
            raise DeviceError(volume.failure)
        if isinstance(ops[0], Op) and _is_long(ops[0]):
            self._zero_long(volume, ops[0])
            return
        pieces: dict[int, list[Piece]] = {}
        for op in ops:
            if isinstance(op, Intent):
                _add_write(pieces, op.offset, op.data)
            elif op.kind == OpKind.WRITE:
                assert op.data is not None
                _add_write(pieces, op.offset, memoryview(op.data))
            elif op.no_hole:
                _add_zeroes(pieces, op, range(op.offset >> CHUNK_SHIFT, chunk_count(op.offset + op.length)), _ZEROES)
            else:
                first, end = op.offset >> CHUNK_SHIFT, chunk_count(op.offset + op.length)
                chunks = set(self._holding(volume, op.offset, op.length))
                chunks.update(chunk for chunk in range(first, end) if chunk in pieces)
                _add_zeroes(pieces, op, chunks, None)
        self._change(volume, pieces)

    def _zero_long(self, volume: RedirectedVolume, op: Op) -> None:
        end = op.offset + op.length
        for offset in range(op.offset & -WINDOW, end, WINDOW):
            low, high = max(offset, op.offset), min(offset + WINDOW, end)
            if op.no_hole:
                chunks: Iterator[int] = iter(range(low >> CHUNK_SHIFT, chunk_count(high)))
            else:
                chunks = self._holding(volume, low, high - low)
            while part := list(islice(chunks, self._slice)):
                pieces: dict[int, list[Piece]] = {}
                _add_zeroes(pieces, op, part, _ZEROES if op.no_hole else None)
                self._change(volume, pieces)

    def _holding(self, volume: RedirectedVolume, offset: int, length: int) -> Iterator[int]:
        """The chunks of a range that hold data, ascending."""
        done = 0
        for low, high in volume.chunks.data_extents(offset, length):
            first = max(low >> CHUNK_SHIFT, done)
            done = chunk_count(high)
            yield from range(first, done)

    def _change(self, volume: RedirectedVolume, pieces: dict[int, list[Piece]]) -> None:
        chunks = iter(sorted(pieces))
        while part := list(islice(chunks, self._slice)):
            while True:
                plan = self._plan(volume, part, pieces)
                try:
                    self._carry_out(volume, plan, pieces)
                    break
                except (OSError, NbdsnapError) as error:
                    if not (is_full(error) and self.make_room(len(plan.fresh))):
                        raise

    # Planning

    def _plan(self, volume: RedirectedVolume, chunks: list[int], pieces: dict[int, list[Piece]]) -> Plan:
        plan = Plan()
        asked: list[int] = []
        for chunk in chunks:
            slot = volume.exclusive_slot(chunk)
            if slot is None:
                asked.append(chunk)
            elif self._is_dropped(volume, chunk, pieces[chunk]):
                self._drop(volume, plan, chunk, slot)
            else:
                plan.in_place.append((chunk, slot))
        if asked:
            self._plan_asked(volume, plan, asked, pieces)
        return plan

    def _plan_asked(
        self, volume: RedirectedVolume, plan: Plan, chunks: list[int], pieces: dict[int, list[Piece]]
    ) -> None:
        number, newest = volume.record.number, volume.newest_epoch
        epochs: dict[int, int] = {}
        with self._index.read() as reader:
            current = reader.current(number)
            groups = {group: list(current.items(group, group + GROUP)) for group in _groups(chunks)}
            known: set[tuple[int, int]] = set()
            if newest:
                cursor = reader.cursor(number)
                for chunk in chunks:
                    latest = cursor.latest(chunk)
                    epochs[chunk] = latest.epoch if latest else 0
                    if epochs[chunk] >= newest:
                        known.add((epochs[chunk], chunk >> BLOCK_SHIFT))
            preserved = [(block, reader.changed_block(number, epoch, block)) for epoch, block in known]
        volume.learn(groups, preserved)
        slots = dict(item for items in groups.values() for item in items)
        for chunk in chunks:
            slot = slots.get(chunk)
            is_dropped = self._is_dropped(volume, chunk, pieces[chunk])
            previous = epochs.get(chunk, 0)
            if previous >= newest:
                if slot is not None and slot < MAX_SLOTS:
                    if is_dropped:
                        self._drop(volume, plan, chunk, slot)
                    else:
                        plan.in_place.append((chunk, slot))
                    continue
            elif slot is not None and slot < MAX_SLOTS:
                plan.old.append((chunk, slot, previous))
            elif slot != ZERO_SLOT or not is_dropped:
                without = ZERO_SLOT if volume.chunks.base.is_zero else BASE_SLOT
                plan.records.append((chunk, without if slot is None else slot, previous))
            if is_dropped:
                self._drop(volume, plan, chunk, None)
            else:
                plan.fresh.append((chunk, slot))

    def _is_dropped(self, volume: RedirectedVolume, chunk: int, pieces: list[Piece]) -> bool:
        """Whether the chunk is all zeroes afterwards, by its last operation that changes all of it."""
        low, high, data = pieces[-1]
        whole = min(CHUNK, volume.size - (chunk << CHUNK_SHIFT))
        return data is None and low == 0 and high >= whole

    def _drop(self, volume: RedirectedVolume, plan: Plan, chunk: int, slot: int | None) -> None:
        plan.dropped.append((chunk, None if volume.chunks.base.is_zero else ZERO_SLOT))
        if slot is not None:
            plan.freed.append(slot)

    # Doing it

    def _carry_out(self, volume: RedirectedVolume, plan: Plan, pieces: dict[int, list[Piece]]) -> None:
        if plan.fresh or plan.records or plan.old or plan.dropped:
            self._redirect(volume, plan, pieces)
        runs: list[tuple[int, int]] = []
        whole: list[Buffer] = []
        for chunk, slot in plan.in_place:
            last = pieces[chunk][-1]
            if last[1] - last[0] == CHUNK:
                runs.append((slot, 1))
                whole.append(_ZEROES if last[2] is None else last[2])
                continue
            for low, high, data in pieces[chunk]:
                self._store.write_inside(slot, low, _ZEROES[: high - low] if data is None else data)
        if whole:
            self._store.write(*_in_order(runs, whole))

    def _redirect(self, volume: RedirectedVolume, plan: Plan, pieces: dict[int, list[Piece]]) -> None:
        failed_syncs = self._store.failed_syncs
        records, usage, old = self._make_records(volume, plan)
        contents: list[Buffer] = [
            self._content(volume, chunk, slot, pieces[chunk], old.get(chunk)) for chunk, slot in plan.fresh
        ]
        runs = self._store.reserve(len(contents))
        fresh = [slot for first, count in runs for slot in range(first, first + count)]
        changes: list[Change] = [(chunk, slot) for (chunk, _), slot in zip(plan.fresh, fresh, strict=True)]
        changes += plan.dropped
        try:
            if contents:
                self._store.write(runs, contents)
                self._store.sync(failed_syncs)
            self._index.update(lambda txn: _commit(txn, volume, records, usage, changes, fresh, plan))
        except DeviceError:
            raise  # whether the commit is on disk is not known: its slots stay out of use until the next start
        except BaseException:
            self._store.release(runs)
            raise
        volume.chunks.moved(changes)
        volume.mark_exclusive([chunk for chunk, _ in changes])
        if plan.freed:
            volume.generation += 1  # a snapshot's reader may have looked one of them up
            self._store.free(plan.freed)
        if plan.losses:
            mark_snapshots(volume, plan.losses)

    def _make_records(
        self, volume: RedirectedVolume, plan: Plan
    ) -> tuple[list[Record], dict[tuple[int, int], int], dict[int, memoryview]]:
        """The records, ascending; their intervals; and the content of the chunks whose slot they take over."""
        number, epoch = volume.record.number, volume.record.epoch - 1
        digest = xxhash.xxh3_64_intdigest
        usage: dict[tuple[int, int], int] = {}
        records = [
            Record(chunk, epoch, slot, digest(_content_of(slot), checksum_seed(number, chunk, epoch)))
            for chunk, slot, _ in plan.records
        ]
        old = self._read_old([(chunk, slot) for chunk, slot, _ in plan.old])
        for chunk, slot, previous in plan.old:
            data = old.get(chunk)
            if data is None:
                records.append(Record(chunk, epoch, LOST_SLOT, 0))
                plan.losses.append((chunk, previous))
                plan.freed.append(slot)
                continue
            record = Record(chunk, epoch, slot, digest(data, checksum_seed(number, chunk, epoch)))
            if not data[0] and bytes(data) == _ZERO_CHUNK:
                record.slot = ZERO_SLOT
                plan.freed.append(slot)
            else:
                usage[previous, epoch] = usage.get((previous, epoch), 0) + 1
            records.append(record)
        records.sort(key=lambda record: record.chunk)
        return records, usage, old

    def _read_old(self, chunks: list[tuple[int, int]]) -> dict[int, memoryview]:
        """The content of ``(chunk, slot)``, neighbours with one read; without those that can't be read."""
        found: dict[int, memoryview] = {}
        start = 0
        while start < len(chunks):
            end = start + 1
            while end < len(chunks) and chunks[end][1] - chunks[start][1] == end - start:
                end += 1
            part, slot = self._old[start << CHUNK_SHIFT : end << CHUNK_SHIFT], chunks[start][1]
            lost: set[int] = set()
            try:
                self._store.read_into(part, slot)
            except OSError as error:
                if not is_unreadable(error):
                    raise
                lost = self._store.read_again(part, slot)
            for position in range(start, end):
                if position - start in lost:
                    continue
                found[chunks[position][0]] = self._old[position << CHUNK_SHIFT : (position + 1) << CHUNK_SHIFT]
            start = end
        return found

    def _content(
        self, volume: RedirectedVolume, chunk: int, slot: int | None, pieces: list[Piece], old: memoryview | None
    ) -> Buffer:
        """The chunk's new content."""
        low, high, data = pieces[-1]
        if high - low == CHUNK:
            return _ZEROES if data is None else data
        if old is None and slot is not None and slot < MAX_SLOTS:
            raise OSError(errno.EIO, f"the old content at {chunk << CHUNK_SHIFT} can't be read", str(self._store.path))
        content = bytearray(_ZERO_CHUNK if old is None else old)
        view = memoryview(content)
        if slot is None and not volume.chunks.base.is_zero:
            volume.chunks.base.read(view, chunk << CHUNK_SHIFT, now=False)
        elif slot == LOST_SLOT:
            raise CorruptionError(f"the data at offset {chunk << CHUNK_SHIFT} was lost to earlier damage")
        for low, high, data in pieces:
            view[low:high] = _ZEROES[: high - low] if data is None else data
        return content


def _commit(
    txn: IndexWriter,
    volume: RedirectedVolume,
    records: list[Record],
    usage: dict[tuple[int, int], int],
    changes: list[Change],
    fresh: list[int],
    plan: Plan,
) -> None:
    number = volume.record.number
    if records:
        txn.preserve(number, NewRecords.of(records[0].epoch, records))
    txn.change_slots(used=fresh, freed=plan.freed)
    txn.add_usage(number, usage)
    txn.current(number).change(changes)
    put_marks(txn, volume, plan.losses)


def _content_of(slot: int) -> bytes:
    """What the checksum of a record without a slot covers."""
    return _ZERO_CHUNK if slot == ZERO_SLOT else b""


def _groups(chunks: list[int]) -> dict[int, None]:
    """The first chunks of the groups that ``chunks`` are in, in order."""
    return dict.fromkeys(chunk & -GROUP for chunk in chunks)


def _is_long(op: Op | Intent) -> bool:
    return isinstance(op, Op) and op.kind != OpKind.WRITE and op.length > LONG


def _add_write(pieces: dict[int, list[Piece]], offset: int, data: memoryview) -> None:
    end = offset + len(data)
    position = offset
    while position < end:
        chunk, low = position >> CHUNK_SHIFT, position & (CHUNK - 1)
        high = min(CHUNK, low + end - position)
        part = data[position - offset : position - offset + high - low]
        if high - low == CHUNK:
            pieces[chunk] = [(0, CHUNK, part)]  # nothing before it matters
        else:
            pieces.setdefault(chunk, []).append((low, high, part))
        position += high - low


def _add_zeroes(pieces: dict[int, list[Piece]], op: Op, chunks: Iterable[int], data: memoryview | None) -> None:
    end = op.offset + op.length
    for chunk in chunks:
        start = chunk << CHUNK_SHIFT
        low, high = max(op.offset - start, 0), min(end - start, CHUNK)
        part = None if data is None else data[: high - low]
        if high - low == CHUNK:
            pieces[chunk] = [(low, high, part)]
        else:
            pieces.setdefault(chunk, []).append((low, high, part))


def _in_order(runs: list[tuple[int, int]], buffers: list[Buffer]) -> tuple[list[tuple[int, int]], list[Buffer]]:
    """By slot, neighbours as one run."""
    ordered = sorted(zip(runs, buffers, strict=True), key=lambda one: one[0])
    merged = list(coalesce(slot for (slot, _), _ in ordered))
    return merged, [buffer for _, buffer in ordered]
