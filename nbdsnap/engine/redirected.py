"""A volume whose live data is in the store: a thin volume, or a clone.

It differs from an origin in one thing: what a snapshot still needs is not copied out of the way of a write, but stays
where it is, and the write goes to a new slot (:mod:`nbdsnap.engine.redirect`).  So a chunk is exclusive, and written
in place, when it has a slot of its own, which no snapshot needs, and no live intent.  Everything else, all zeroing and
whatever is too long to be done at once, is the preserver's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from nbdsnap.engine.device import Extent, Op, OpKind
from nbdsnap.engine.livechunks import LiveChunks, Run, layers
from nbdsnap.engine.records import SnapshotRecord, VolumeRecord
from nbdsnap.engine.slotmap import ABSENT, FIRST, ZEROES
from nbdsnap.engine.volume import NOW_LIMIT, Volume
from nbdsnap.errors import DeviceError
from nbdsnap.store.current import GROUP
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.intentlog import Intent
from nbdsnap.store.layout import CHUNK, CHUNK_SHIFT, chunk_count

if TYPE_CHECKING:
    from nbdsnap.engine.preserver import Preserver


class RedirectedVolume(Volume):
    """A thin volume or clone whose data can be reached."""

    def __init__(
        self,
        record: VolumeRecord,
        snapshots: list[SnapshotRecord],
        chunks: LiveChunks,
        io: FileIO,
        preserver: Preserver,
        workers: Executor,
    ) -> None:
        super().__init__(record, snapshots, chunks, io, preserver, workers)
        self.chunks = chunks
        chunks.lock = self.lock

    def read_in_place_now(self, buffer: memoryview, offset: int) -> bool:
        return self.chunks.read_now(buffer, offset)

    def writes_now(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool]:
        with self.lock:
            return self._put_now(writes)

    def _put_now(self, writes: Sequence[tuple[int, memoryview]], *, edges_read: bool = False) -> list[bool]:
        """Under ``lock``: write in place, or into the log."""
        done = [False] * len(writes)
        later: list[int] = []
        for position, (offset, data) in enumerate(writes):
            end = offset + len(data)
            if (
                end > self._limit
                or len(data) > NOW_LIMIT
                or ((offset | end) & (CHUNK - 1) and not edges_read and not self._edges_cached(offset, end))
            ):
                continue
            first, stop = offset >> CHUNK_SHIFT, chunk_count(end)
            runs = self._writable(first, stop)
            if runs is None:
                if self._exclusive is not None:
                    self._exclusive.remove(range(first, stop))
                later.append(position)
                continue
            try:
                self._write_runs(runs, offset, data)
            except OSError:
                continue  # the other way will have the same error, and somebody to tell
            self._written += 1
            done[position] = True
        if later:
            for position in later[: self._write_intents([writes[position] for position in later])]:
                done[position] = True
        return done

    def _writable(self, first: int, end: int) -> list[Run] | None:
        """Where the chunks [first, end) lie, if all are certain to be exclusive."""
        if self._exclusive is not None and not self._exclusive.covers(first, end):
            return None
        if self.intents and self.intents.any_live(first, end):
            return None
        runs = self.chunks.slots.runs(first, end)
        return None if runs is None or any(place < FIRST for _, _, place in runs) else runs

    def _write_runs(self, runs: list[Run], offset: int, data: memoryview) -> None:
        end = offset + len(data)
        for first, stop, place in runs:
            low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
            slot, inside = place - FIRST + (low >> CHUNK_SHIFT) - first, low & (CHUNK - 1)
            part = data[low - offset : high - offset]
            written = self._pwrite(self._fd, part, (slot << CHUNK_SHIFT) + inside)
            if written != len(part):
                self.chunks.store.write_inside(slot, inside + written, part[written:])

    def _edges_cached(self, offset: int, end: int) -> bool:
        """Under ``lock``, so that the index is not asked where they lie."""
        return (not offset & (CHUNK - 1) or self._is_cached(offset >> CHUNK_SHIFT)) and (
            not end & (CHUNK - 1) or self._is_cached(end >> CHUNK_SHIFT)
        )

    def _is_cached(self, chunk: int) -> bool:
        place, probe = self.chunks.slots.get(chunk), memoryview(bytearray(1))
        if place >= FIRST:
            return self.chunks.store.read_now(probe, place - FIRST)
        return place == ZEROES or (place == ABSENT and self.chunks.base.is_zero)

    def _submit(self, op: Op, *, edges_read: bool) -> None:
        with self.lock:
            refusal = self._refusal
            done = cold = False
            if op.kind == OpKind.WRITE and op.length <= NOW_LIMIT:
                assert op.data is not None
                (done,) = self._put_now(((op.offset, memoryview(op.data)),), edges_read=edges_read)
                cold = not done and not edges_read and self._is_cold(op)
            if not done and not cold and refusal is None:
                if self._parked is None:
                    self._preserver.submit(self, op)
                else:
                    self._parked.append(op)
        if cold:
            self._workers.submit(self._read_edges, op)
        elif done:
            self.finish(op, None)
        elif refusal is not None:
            self.finish(op, refusal)

    def _is_cold(self, op: Op) -> bool:
        """Whether what it only half covers is to be read first, by somebody who may wait: before it is acknowledged."""
        end = op.offset + op.length
        return end <= self._limit and bool((op.offset | end) & (CHUNK - 1)) and not self._edges_cached(op.offset, end)

    def depths(self, offset: int, length: int) -> list[Extent]:
        if self.view is not None:
            return self.view.depths(offset, length)
        with self.lock:
            patches = self.intents.patches(offset, offset + length)
        own = self.chunks.own_extents(offset, length)
        end = offset + length
        own += [
            (max(one.offset & -CHUNK, offset), min(chunk_count(one.offset + len(one.data)) << CHUNK_SHIFT, end))
            for one in patches
        ]
        return layers(sorted(own), self.chunks.base.data_extents(offset, length), offset, end)

    def exclusive_slot(self, chunk: int) -> int | None:
        """On the preserver's thread: the slot that the chunk may be written to in place, if that is known.  A live
        intent does not matter to the preserver, who applies them in their order."""
        place = self.chunks.slots.get(chunk)
        if place < FIRST or (self._exclusive is not None and not self._exclusive.covers(chunk, chunk + 1)):
            return None
        return place - FIRST

    def learn(self, groups: Mapping[int, list[tuple[int, int]]], preserved: Iterable[tuple[int, int]]) -> None:
        """On the preserver's thread: what the index says.

        ``groups``: first chunk -> all entries of the group.  ``preserved``: blocks and their sets of chunks that are
        preserved for every snapshot.
        """
        with self.lock:
            for first, items in groups.items():
                self.chunks.slots.fill(first, first + GROUP, items)
        for block, members in preserved:
            self.mark_block_exclusive(block, members)

    def apply_intents(self, intents: list[Intent]) -> tuple[int, Exception | None]:
        """They are in place already, where nothing was in their way (:class:`nbdsnap.engine.redirect.Redirection`)."""
        if self.failure is not None:
            return 0, DeviceError(self.failure)
        self._arrived(intents)
        return len(intents), None

    def apply(self, op: Op) -> None:
        """Likewise."""
        if self.failure is not None:
            raise DeviceError(self.failure)
        with self.lock:
            self._written += 1
