"""A volume's intents: writes that were acknowledged from the intent log and have not wholly arrived.

An intent is *pending* until its data is in place (in the page cache, at least): reads must lay it over what they find
there.  It is *live* until the log has retired it: until then its chunks may only be written through the log, because a
replay would put its data back.  So a chunk with a live intent is never exclusive.

Not locked: its volume's lock is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from nbdsnap.engine.device import Op, OpKind
from nbdsnap.store.chunkbits import ChunkBits
from nbdsnap.store.intentlog import Intent
from nbdsnap.store.layout import CHUNK_SHIFT, chunk_count

Patch = tuple[int, int, memoryview]
"""Sequence, offset and data."""


class IntentOp(Op):
    """A write that was acknowledged from the log."""

    __slots__ = ("intent",)

    def __init__(self, intent: Intent) -> None:
        super().__init__(OpKind.WRITE, intent.offset, len(intent.data), _nobody, intent.data)
        self.intent = intent


class IntentSet:
    """Of one volume of ``chunks`` chunks."""

    def __init__(self, chunks: int) -> None:
        self.pending: dict[int, list[Patch]] = {}
        """Chunk -> the pending writes that touch it, in the order of their acknowledgement."""
        self.last_sequence = 0
        """Of the newest intent."""
        self._live: dict[int, int] = {}
        """Chunk -> sequence of its newest live intent."""
        self._order: deque[tuple[int, int, int]] = deque()
        """(sequence, first chunk, end chunk) of the live intents."""
        self._bits = ChunkBits(chunks)
        """The chunks of ``_live`` again, for whole blocks."""

    def __bool__(self) -> bool:
        """Whether any intent is live."""
        return bool(self._order)

    def add(self, intent: Intent) -> None:
        first, end = intent.offset >> CHUNK_SHIFT, chunk_count(intent.offset + len(intent.data))
        patch = intent.sequence, intent.offset, intent.data
        for chunk in range(first, end):
            self.pending.setdefault(chunk, []).append(patch)
            self._live[chunk] = intent.sequence
        self._bits.add(range(first, end))
        self._order.append((intent.sequence, first, end))
        self.last_sequence = intent.sequence

    def arrived(self, offset: int, length: int) -> None:
        """The oldest pending write of these chunks is in place."""
        for chunk in range(offset >> CHUNK_SHIFT, chunk_count(offset + length)):
            patches = self.pending[chunk]
            patches.pop(0)
            if not patches:
                del self.pending[chunk]

    def retired(self, sequence: int, limit: int) -> tuple[list[int], bool]:
        """The intents before ``sequence`` are retired: take out the oldest, until ``limit`` chunks are free.

        Returns the chunks that have no live intent any more, and whether there is more to take out.
        """
        free: list[int] = []
        while self._order and self._order[0][0] < sequence and len(free) < limit:
            number, first, end = self._order.popleft()
            for chunk in range(first, end):
                if self._live.get(chunk) == number:
                    del self._live[chunk]
                    free.append(chunk)
        self._bits.remove(free)
        return free, bool(self._order) and self._order[0][0] < sequence

    def is_live(self, chunk: int) -> bool:
        return chunk in self._live

    def any_live(self, first: int, end: int) -> bool:
        """Whether any of the chunks [first, end) has a live intent."""
        if not self._live:
            return False
        if end - first < len(self._live):
            return any(chunk in self._live for chunk in range(first, end))
        return any(first <= chunk < end for chunk in self._live)

    def live_in_block(self, block: int) -> int:
        """The set of the block's chunks with a live intent."""
        return self._bits.block(block)

    def patches(self, offset: int, end: int) -> list[Patch]:
        """The pending writes that touch [offset, end), to be laid over the data in place in this order."""
        found: dict[int, Patch] = {}
        for chunk in self.pending_chunks(offset >> CHUNK_SHIFT, chunk_count(end)):
            for patch in self.pending[chunk]:
                found[patch[0]] = patch
        return [patch for _, patch in sorted(found.items())]

    def pending_chunks(self, first: int, end: int) -> Iterator[int]:
        """Those of the chunks [first, end) that pending writes touch."""
        if end - first <= len(self.pending):
            return (chunk for chunk in range(first, end) if chunk in self.pending)
        return (chunk for chunk in self.pending if first <= chunk < end)


def lay_over(buffer: memoryview, offset: int, patches: list[Patch]) -> None:
    """Copy what of ``patches`` is inside [offset, offset + len(buffer)) into ``buffer``."""
    end = offset + len(buffer)
    for _, start, data in patches:
        low, high = max(start, offset), min(start + len(data), end)
        if low < high:
            buffer[low - offset : high - offset] = data[low - start : high - start]


def uncovered(offset: int, end: int, patches: list[Patch]) -> Iterator[tuple[int, int]]:
    """The parts of [offset, end) that none of ``patches`` touches, ascending."""
    for start, stop in sorted((start, start + len(data)) for _, start, data in patches):
        if start > offset:
            yield offset, min(start, end)
        offset = max(offset, stop)
    if offset < end:
        yield offset, end


def _nobody(_: BaseException | None) -> None:
    """Whom an intent answers to: its owner was answered when it was logged."""


def chunks_touched(op: Op) -> int:
    """How many chunks lie in its range."""
    return chunk_count(op.offset + op.length) - (op.offset >> CHUNK_SHIFT)
