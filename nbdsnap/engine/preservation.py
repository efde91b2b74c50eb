"""Preserving: copying what operations are about to overwrite into the exception store, before they do.

Which chunks some snapshot still needs is asked of the volume's bitmap, then of the index.  They are copied in slices:
read the old content, append it to the store, sync it, commit the records.  Afterwards the chunks are *exclusive*.  All
of it on the preserver's thread.

What can't be preserved must not be overwritten.  Which chunks these are, and why, is the answer of
:meth:`Preservation.make_way`; all other operations go on.  Where space is short, what was acknowledged comes first:
space was promised to it.

Old content that its disk can't read any more is preserved as just that (:mod:`nbdsnap.engine.unreadable`).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence

import xxhash

from nbdsnap.engine.device import Op
from nbdsnap.engine.pending import IntentGroup
from nbdsnap.engine.redirect import Redirection
from nbdsnap.engine.redirected import RedirectedVolume
from nbdsnap.engine.space import Space, is_full
from nbdsnap.engine.unreadable import is_unreadable, mark_snapshots, put_marks, read_again
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import DeviceError, NbdsnapError
from nbdsnap.store.batchio import BatchIO, address_of
from nbdsnap.store.chunkstore import ChunkStore, Run
from nbdsnap.store.fileio import Buffer
from nbdsnap.store.index import Index, IndexWriter, NewRecords, checksum_seed
from nbdsnap.store.intentlog import Intent
from nbdsnap.store.layout import BLOCK_SHIFT, CHUNK, CHUNK_SHIFT, LOST_SLOT, ZERO_SLOT, chunk_count

Item = tuple[Volume, Op | IntentGroup]
"""What waits for the preserver: an operation, or intents that were logged together."""

Interval = tuple[int, int]
"""Of epochs, that a record serves: ``(previous, epoch)``."""

_ZERO_CHUNK = bytes(CHUNK)


class Obstacles:
    """The chunks that could not be preserved, and why."""

    def __init__(self) -> None:
        self._chunks: dict[Volume, tuple[Exception, set[int]]] = {}
        self._ops: dict[Op | Intent, Exception] = {}

    def add(self, volume: Volume, error: Exception, chunks: set[int]) -> None:
        if volume in self._chunks:
            chunks |= self._chunks[volume][1]
        self._chunks[volume] = error, chunks

    def add_op(self, op: Op | Intent, error: Exception) -> None:
        """What it changes can't even be found out."""
        self._ops[op] = error

    def include(self, other: Obstacles) -> None:
        for volume, (error, chunks) in other._chunks.items():
            self.add(volume, error, chunks)
        self._ops.update(other._ops)

    def check(self, volume: Volume, op: Op) -> None:
        """Raise what is in ``op``'s way."""
        if op in self._ops:
            raise self._ops[op]
        if volume not in self._chunks:
            return
        error, chunks = self._chunks[volume]
        for first, end in volume.changed_chunks(op):
            if any(first <= chunk < end for chunk in chunks):
                raise error

    def first(self, volume: Volume, intents: Sequence[Intent]) -> tuple[int, Exception | None]:
        """How many of ``intents``, from the first on, have nothing in their way; and what is in the next one's."""
        for position, intent in enumerate(intents if self._ops else ()):
            if intent in self._ops:
                return position, self._ops[intent]
        if volume in self._chunks:
            error, chunks = self._chunks[volume]
            for position, intent in enumerate(intents):
                if not chunks.isdisjoint(_chunks_of(intent)):
                    return position, error
        return len(intents), None

    @property
    def any_full(self) -> bool:
        return any(is_full(error) for error, _ in self._chunks.values()) or any(map(is_full, self._ops.values()))


class Preservation:
    """``slice_chunks``: how many are preserved with one commit."""

    def __init__(self, index: Index, store: ChunkStore, space: Space, batch: BatchIO | None, slice_chunks: int) -> None:
        self._batch = batch
        self._index = index
        self._store = store
        self._space = space
        self._redirection = Redirection(index, store, slice_chunks)
        self._old = memoryview(mmap.mmap(-1, slice_chunks * CHUNK))  # for its alignment
        self._old_at = address_of(self._old)
        self.make_room: Callable[[int], bool] = _no_room
        """Goes some way towards that many free slots (:meth:`nbdsnap.engine.deletion.Deletions.make_room`)."""

    def set_make_room(self, make_room: Callable[[int], bool]) -> None:
        self.make_room = self._redirection.make_room = make_room

    def make_way(self, batch: list[Item]) -> Obstacles:
        """Preserve what the operations are about to change, as far as that is possible.

        Those of thin volumes and clones are done with that (:mod:`nbdsnap.engine.redirect`).
        """
        obstacles = Obstacles()
        if sum(_chunks_touched(item) for _, item in batch) <= self._space.room:
            self._preserve_for(batch, obstacles)
            return obstacles
        self._preserve_for([(volume, item) for volume, item in batch if isinstance(item, IntentGroup)], obstacles)
        waiting: list[Item] = [(volume, item) for volume, item in batch if not isinstance(item, IntentGroup)]
        refused = Obstacles()
        self._preserve_for(waiting, refused)
        if refused.any_full:
            for one in waiting:  # each gets what is left
                self._preserve_for([one], obstacles)
        else:
            obstacles.include(refused)
        return obstacles

    def _preserve_for(self, items: list[Item], obstacles: Obstacles) -> None:
        redirected: dict[RedirectedVolume, list[Op | Intent]] = {}
        for volume, item in items:
            if isinstance(volume, RedirectedVolume):
                redirected.setdefault(volume, []).extend(item.intents if isinstance(item, IntentGroup) else (item,))
        for volume, ops in redirected.items():
            undone, error = self._redirection.execute(volume, ops)
            for op in undone:
                obstacles.add_op(op, error)
        if redirected:
            items = [(volume, item) for volume, item in items if not isinstance(volume, RedirectedVolume)]
        for volume, chunks in self._plan(items, obstacles).items():
            try:
                for start in range(0, len(chunks), len(self._old) >> CHUNK_SHIFT):
                    self._preserve_part(volume, chunks[start : start + (len(self._old) >> CHUNK_SHIFT)])
            except Exception as error:
                obstacles.add(volume, error, self._still_needed(volume, chunks))

    def _plan(self, items: list[Item], obstacles: Obstacles) -> dict[Volume, list[int]]:
        """The chunks that each volume's operations change and the bitmap does not know to be exclusive, ascending."""
        wanted: dict[Volume, set[int]] = {}
        for volume, item in items:
            chunks = wanted.setdefault(volume, set())
            if isinstance(item, IntentGroup):
                for intent in item.intents:
                    if len(intent.data) == CHUNK and not intent.offset & (CHUNK - 1):
                        chunks.add(intent.offset >> CHUNK_SHIFT)
                    else:
                        chunks.update(_chunks_of(intent))
                continue
            try:
                for first, end in volume.changed_chunks(item):
                    chunks.update(volume.missing(range(first, end)))
            except Exception as error:
                obstacles.add_op(item, error)
        plan = {volume: volume.missing(sorted(chunks)) for volume, chunks in wanted.items()}
        return {volume: chunks for volume, chunks in plan.items() if chunks}

    def _still_needed(self, volume: Volume, chunks: list[int]) -> set[int]:
        try:
            return {chunk for chunk, _ in self._ask_index(volume, chunks)}
        except Exception:
            return set(chunks)

    def _preserve_part(self, volume: Volume, chunks: list[int]) -> None:
        while volume.snapshots:  # with each of which that is dropped to make room, less is needed
            needed = self._ask_index(volume, chunks)
            if not needed:
                return
            try:
                self._preserve(volume, needed)
                return
            except (OSError, NbdsnapError) as error:
                if not (is_full(error) and self.make_room(len(needed))):
                    raise

    def _ask_index(self, volume: Volume, chunks: list[int]) -> list[tuple[int, int]]:
        """Those of ``chunks`` that are not preserved for the newest snapshot, each with its latest record's epoch, or
        0.

        Blocks of which the index knows more than the bitmap did are copied into it.
        """
        newest = volume.newest_epoch
        needed: list[tuple[int, int]] = []
        known: set[tuple[int, int]] = set()
        with self._index.read() as reader:
            for chunk, latest in zip(chunks, reader.cursor(volume.record.number).latest_epochs(chunks), strict=True):
                if latest < newest:
                    needed.append((chunk, latest))
                else:
                    known.add((latest, chunk >> BLOCK_SHIFT))
            for epoch, block in known:
                volume.mark_block_exclusive(block, reader.changed_block(volume.record.number, epoch, block))
        return needed

    def _preserve(self, volume: Volume, needed: list[tuple[int, int]]) -> None:
        """Make the present content of ``needed`` the newest snapshot's own.  ``needed``: (chunk, previous epoch),
        ascending."""
        chunks = [chunk for chunk, _ in needed]
        lost = self._read_old(volume, chunks)
        records, stored = self._make_records(volume, chunks, lost)
        losses = [needed[position] for position in sorted(lost)]
        runs = self._store.reserve(len(stored))
        failed_syncs = self._store.failed_syncs
        try:
            _assign(records, stored, runs)
            self._store.write(runs, _gather(self._old, stored), aligned=True)
            if runs:
                self._store.sync(failed_syncs)
            usage = _usage(needed, stored, records.epoch)
            self._index.update(lambda txn: self._commit(txn, volume, records, stored, usage, losses))
        except DeviceError:
            raise  # whether the commit is on disk is not known: its slots stay out of use until the next start
        except BaseException:
            self._store.release(runs)
            raise
        volume.generation += 1
        volume.mark_exclusive(chunks)
        if losses:
            mark_snapshots(volume, losses)

    def _commit(
        self,
        txn: IndexWriter,
        volume: Volume,
        records: NewRecords,
        stored: list[int],
        usage: dict[Interval, int],
        losses: list[tuple[int, int]],
    ) -> None:
        txn.preserve(volume.record.number, records)
        txn.change_slots(used=[records.slots[position] for position in stored])
        txn.add_usage(volume.record.number, usage)
        put_marks(txn, volume, losses)

    def _read_old(self, volume: Volume, chunks: list[int]) -> set[int]:
        """The chunks' content into ``_old``, one after the other; what lies past the origin's end is zeroes.

        Returns the positions of those that can't be read.
        """
        runs = _runs(chunks)
        if self._batch is None or len(runs) == 1:
            unread: Iterable[int] = range(len(runs))
        else:
            at = self._old_at
            pieces = [
                (at + (start << CHUNK_SHIFT), n << CHUNK_SHIFT, chunks[start] << CHUNK_SHIFT) for start, n in runs
            ]
            unread = self._batch.read(volume.origin.fd, pieces)
        lost: set[int] = set()
        for position in unread:
            start, count = runs[position]
            part = self._old[start << CHUNK_SHIFT : (start + count) << CHUNK_SHIFT]
            try:
                volume.origin.read_into(part, chunks[start] << CHUNK_SHIFT)
            except OSError as error:
                if not is_unreadable(error):
                    raise
                lost.update(start + chunk for chunk in read_again(volume, part, chunks[start]))
        return lost

    def _make_records(self, volume: Volume, chunks: list[int], lost: set[int]) -> tuple[NewRecords, list[int]]:
        """Records for the chunks in ``_old``, slots yet to be assigned; and the positions of those that need one."""
        number = volume.record.number
        epoch = volume.record.epoch - 1
        digest = xxhash.xxh3_64_intdigest
        old = self._old
        checksums: list[int] = []
        stored: list[int] = []
        start = 0
        for position, chunk in enumerate(chunks):
            data = old[start : start + CHUNK]
            checksums.append(digest(data, checksum_seed(number, chunk, epoch)))
            if old[start] or bytes(data) != _ZERO_CHUNK:
                stored.append(position)
            start += CHUNK
        slots = [ZERO_SLOT] * len(chunks)
        for position in lost:
            slots[position], checksums[position] = LOST_SLOT, 0
        if lost:
            stored = [position for position in stored if position not in lost]
        return NewRecords(epoch, chunks, slots, checksums), stored


def _runs(chunks: list[int]) -> list[tuple[int, int]]:
    """``(position, count)`` of what follows each other."""
    runs: list[tuple[int, int]] = []
    start = 0
    for position in range(1, len(chunks) + 1):
        if position == len(chunks) or chunks[position] - chunks[position - 1] != 1:
            runs.append((start, position - start))
            start = position
    return runs


def _chunks_of(intent: Intent) -> range:
    return range(intent.offset >> CHUNK_SHIFT, chunk_count(intent.offset + len(intent.data)))


def _chunks_touched(item: Op | IntentGroup) -> int:
    if isinstance(item, IntentGroup):
        return item.chunks
    return chunk_count(item.offset + item.length) - (item.offset >> CHUNK_SHIFT)


def _usage(needed: list[tuple[int, int]], stored: list[int], epoch: int) -> dict[Interval, int]:
    """How many slots each interval of epochs gets."""
    usage: dict[Interval, int] = {}
    for position in stored:
        interval = needed[position][1], epoch
        usage[interval] = usage.get(interval, 0) + 1
    return usage


def _no_room(_: int) -> bool:
    return False


def _assign(records: NewRecords, stored: list[int], runs: list[Run]) -> None:
    """Give the slots of ``runs``, in order, to the records at the positions ``stored``."""
    slots = (slot for first, count in runs for slot in range(first, first + count))
    for position, slot in zip(stored, slots, strict=True):
        records.slots[position] = slot


def _gather(old: memoryview, positions: list[int]) -> list[Buffer]:
    """The chunks at ``positions`` of ``old``, neighbours in one piece."""
    pieces: list[Buffer] = []
    start = 0
    while start < len(positions):
        end = start + 1
        while end < len(positions) and positions[end] - positions[start] == end - start:
            end += 1
        pieces.append(old[positions[start] << CHUNK_SHIFT : (positions[start] + end - start) << CHUNK_SHIFT])
        start = end
    return pieces
