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

from collections.abc import Callable

import xxhash

from nbdsnap.engine.device import Op
from nbdsnap.engine.pending import IntentOp, chunks_touched
from nbdsnap.engine.redirect import Redirection
from nbdsnap.engine.redirected import RedirectedVolume
from nbdsnap.engine.space import Space, is_full
from nbdsnap.engine.unreadable import is_unreadable, mark_snapshots, put_marks, read_again
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import DeviceError, NbdsnapError
from nbdsnap.store.chunkstore import ChunkStore, Run
from nbdsnap.store.fileio import Buffer
from nbdsnap.store.index import Index, IndexWriter, Record, checksum_seed
from nbdsnap.store.layout import BLOCK_SHIFT, CHUNK, CHUNK_SHIFT, LOST_SLOT, ZERO_SLOT

Item = tuple[Volume, Op]

_ZERO_CHUNK = bytes(CHUNK)


class Obstacles:
    """The chunks that could not be preserved, and why."""

    def __init__(self) -> None:
        self._chunks: dict[Volume, tuple[Exception, set[int]]] = {}
        self._ops: dict[Op, Exception] = {}

    def add(self, volume: Volume, error: Exception, chunks: set[int]) -> None:
        if volume in self._chunks:
            chunks |= self._chunks[volume][1]
        self._chunks[volume] = error, chunks

    def add_op(self, op: Op, error: Exception) -> None:
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

    @property
    def any_full(self) -> bool:
        return any(is_full(error) for error, _ in self._chunks.values()) or any(map(is_full, self._ops.values()))


class Preservation:
    """``slice_chunks``: how many are preserved with one commit."""

    def __init__(self, index: Index, store: ChunkStore, space: Space, slice_chunks: int) -> None:
        self._index = index
        self._store = store
        self._space = space
        self._redirection = Redirection(index, store, slice_chunks)
        self._old = memoryview(bytearray(slice_chunks * CHUNK))
        self.make_room: Callable[[int], bool] = _no_room
        """Goes some way towards that many free slots (:meth:`nbdsnap.engine.deletion.Deletions.make_room`)."""

    def set_make_room(self, make_room: Callable[[int], bool]) -> None:
        self.make_room = self._redirection.make_room = make_room

    def make_way(self, batch: list[Item]) -> Obstacles:
        """Preserve what the operations are about to change, as far as that is possible.

        Those of thin volumes and clones are done with that (:mod:`nbdsnap.engine.redirect`).
        """
        obstacles = Obstacles()
        if sum(chunks_touched(op) for _, op in batch) <= self._space.room:
            self._preserve_for(batch, obstacles)
            return obstacles
        self._preserve_for([(volume, op) for volume, op in batch if isinstance(op, IntentOp)], obstacles)
        waiting = [(volume, op) for volume, op in batch if not isinstance(op, IntentOp)]
        refused = Obstacles()
        self._preserve_for(waiting, refused)
        if refused.any_full:
            for item in waiting:  # each gets what is left
                self._preserve_for([item], obstacles)
        else:
            obstacles.include(refused)
        return obstacles

    def _preserve_for(self, items: list[Item], obstacles: Obstacles) -> None:
        redirected: dict[RedirectedVolume, list[Op]] = {}
        for volume, op in items:
            if isinstance(volume, RedirectedVolume):
                redirected.setdefault(volume, []).append(op)
        for volume, ops in redirected.items():
            undone, error = self._redirection.execute(volume, ops)
            for op in undone:
                obstacles.add_op(op, error)
        if redirected:
            items = [(volume, op) for volume, op in items if not isinstance(volume, RedirectedVolume)]
        for volume, chunks in self._plan(items, obstacles).items():
            try:
                for start in range(0, len(chunks), len(self._old) >> CHUNK_SHIFT):
                    self._preserve_part(volume, chunks[start : start + (len(self._old) >> CHUNK_SHIFT)])
            except Exception as error:
                obstacles.add(volume, error, self._still_needed(volume, chunks))

    def _plan(self, items: list[Item], obstacles: Obstacles) -> dict[Volume, list[int]]:
        """The chunks that each volume's operations change and the bitmap does not know to be exclusive, ascending."""
        wanted: dict[Volume, set[int]] = {}
        for volume, op in items:
            chunks = wanted.setdefault(volume, set())
            try:
                for first, end in volume.changed_chunks(op):
                    chunks.update(volume.missing(first, end))
            except Exception as error:
                obstacles.add_op(op, error)
        return {volume: sorted(chunks) for volume, chunks in wanted.items() if chunks}

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
            cursor = reader.cursor(volume.record.number)
            for chunk in chunks:
                latest = cursor.latest(chunk)
                if latest is None:
                    needed.append((chunk, 0))
                elif latest.epoch < newest:
                    needed.append((chunk, latest.epoch))
                else:
                    known.add((latest.epoch, chunk >> BLOCK_SHIFT))
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
            _assign(records, runs)
            self._store.write(runs, _gather(self._old, stored))
            if runs:
                self._store.sync(failed_syncs)
            self._index.update(lambda txn: self._commit(txn, volume, needed, records, losses))
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
        needed: list[tuple[int, int]],
        records: list[Record],
        losses: list[tuple[int, int]],
    ) -> None:
        usage: dict[tuple[int, int], int] = {}
        for (_, previous), record in zip(needed, records, strict=True):
            if record.has_slot:
                interval = previous, record.epoch
                usage[interval] = usage.get(interval, 0) + 1
        txn.preserve(volume.record.number, records)
        txn.change_slots(used=[record.slot for record in records if record.has_slot])
        txn.add_usage(volume.record.number, usage)
        put_marks(txn, volume, losses)

    def _read_old(self, volume: Volume, chunks: list[int]) -> set[int]:
        """The chunks' content into ``_old``, one after the other; what lies past the origin's end is zeroes.

        Returns the positions of those that can't be read.
        """
        lost: set[int] = set()
        start = 0
        while start < len(chunks):
            end = start + 1
            while end < len(chunks) and chunks[end] - chunks[start] == end - start:
                end += 1
            part = self._old[start << CHUNK_SHIFT : end << CHUNK_SHIFT]
            try:
                volume.origin.read_into(part, chunks[start] << CHUNK_SHIFT)
            except OSError as error:
                if not is_unreadable(error):
                    raise
                lost.update(start + position for position in read_again(volume, part, chunks[start]))
            start = end
        return lost

    def _make_records(self, volume: Volume, chunks: list[int], lost: set[int]) -> tuple[list[Record], list[int]]:
        """Records for the chunks in ``_old``, slots yet to be assigned; and the positions of those that need one."""
        number = volume.record.number
        epoch = volume.record.epoch - 1
        digest = xxhash.xxh3_64_intdigest
        records: list[Record] = []
        stored: list[int] = []
        for position, chunk in enumerate(chunks):
            if position in lost:
                records.append(Record(chunk, epoch, LOST_SLOT, 0))
                continue
            data = self._old[position << CHUNK_SHIFT : (position + 1) << CHUNK_SHIFT]
            record = Record(chunk, epoch, ZERO_SLOT, digest(data, checksum_seed(number, chunk, epoch)))
            records.append(record)
            if data[0] or bytes(data) != _ZERO_CHUNK:
                record.slot = 0
                stored.append(position)
        return records, stored


def _no_room(_: int) -> bool:
    return False


def _assign(records: list[Record], runs: list[Run]) -> None:
    """Give the slots of ``runs``, in order, to the records that need one."""
    slots = (slot for first, count in runs for slot in range(first, first + count))
    for record in records:
        if record.has_slot:
            record.slot = next(slots)


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
