"""A volume's intents: writes that were acknowledged from the intent log and have not wholly arrived.

An intent is *pending* until its data is in place (in the page cache, at least): reads must lay it over what they find
there.  It is *live* until the log has retired it: until then its chunks may only be written through the log, because a
replay would put its data back.  So a chunk with a live intent is never exclusive.

Not locked: its volume's lock is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from nbdsnap.store.chunkbits import ChunkBits
from nbdsnap.store.intentlog import Intent
from nbdsnap.store.layout import CHUNK_SHIFT, chunk_count


class IntentGroup:
    """Intents of one volume, in order, on their way through the preserver; at least one.

    ``chunks``: how many they touch, those that several touch counted for each.
    """

    __slots__ = ("chunks", "intents")

    def __init__(self, intents: list[Intent]) -> None:
        self.intents = intents
        self.chunks = sum(
            chunk_count(intent.offset + len(intent.data)) - (intent.offset >> CHUNK_SHIFT) for intent in intents
        )


def joined(groups: Sequence[IntentGroup]) -> IntentGroup:
    """One after the other, as one."""
    return IntentGroup([intent for group in groups for intent in group.intents])


class IntentSet:
    """Of one volume of ``chunks`` chunks."""

    def __init__(self, chunks: int) -> None:
        self.pending: dict[int, list[Intent]] = {}
        """Chunk -> the pending intents that touch it, in the order of their acknowledgement."""
        self.last_sequence = 0
        """Of the newest intent."""
        self.live: dict[int, int] = {}
        """Chunk -> sequence of its newest live intent."""
        self._order: deque[tuple[int, int, int]] = deque()
        """(sequence, first chunk, end chunk) of the live intents: not the intents themselves, whose data would be
        kept."""
        self._bits = ChunkBits(chunks)
        """The chunks of ``live`` again, for whole blocks."""

    def __bool__(self) -> bool:
        """Whether any intent is live."""
        return bool(self._order)

    def add(self, intents: Sequence[Intent]) -> None:
        pending, live, order, bits = self.pending, self.live, self._order, self._bits.bits
        for intent in intents:
            sequence = intent.sequence
            first, end = intent.offset >> CHUNK_SHIFT, chunk_count(intent.offset + len(intent.data))
            for chunk in range(first, end):
                if chunk in pending:
                    pending[chunk].append(intent)
                else:
                    pending[chunk] = [intent]
                live[chunk] = sequence
                bits[chunk >> 3] |= 1 << (chunk & 7)
            order.append((sequence, first, end))
        self.last_sequence = intents[-1].sequence

    def arrived(self, intents: Sequence[Intent]) -> None:
        """These, each the oldest pending one of its chunks, are in place."""
        pending = self.pending
        for intent in intents:
            for chunk in range(intent.offset >> CHUNK_SHIFT, chunk_count(intent.offset + len(intent.data))):
                waiting = pending[chunk]
                if len(waiting) == 1:
                    del pending[chunk]
                else:
                    del waiting[0]

    def retired(self, sequence: int, limit: int) -> tuple[list[int], bool]:
        """The intents before ``sequence`` are retired: take out the oldest, until ``limit`` chunks are free.

        Returns the chunks that have no live intent any more, and whether there is more to take out.
        """
        free: list[int] = []
        live, order = self.live, self._order
        while order and order[0][0] < sequence and len(free) < limit:
            number, first, end = order.popleft()
            for chunk in range(first, end):
                if live.get(chunk) == number:
                    del live[chunk]
                    free.append(chunk)
        self._bits.remove(free)
        return free, bool(order) and order[0][0] < sequence

    def any_live(self, first: int, end: int) -> bool:
        """Whether any of the chunks [first, end) has a live intent."""
        if not self.live:
            return False
        if end - first < len(self.live):
            return any(chunk in self.live for chunk in range(first, end))
        return any(first <= chunk < end for chunk in self.live)

    def live_in_block(self, block: int) -> int:
        """The set of the block's chunks with a live intent."""
        return self._bits.block(block)

    def patches(self, offset: int, end: int) -> list[Intent]:
        """The pending intents that touch [offset, end), to be laid over the data in place in this order."""
        found: dict[int, Intent] = {}
        for chunk in self.pending_chunks(offset >> CHUNK_SHIFT, chunk_count(end)):
            for intent in self.pending[chunk]:
                found[intent.sequence] = intent
        return [intent for _, intent in sorted(found.items())] if len(found) > 1 else list(found.values())

    def pending_chunks(self, first: int, end: int) -> Iterator[int]:
        """Those of the chunks [first, end) that pending writes touch."""
        if end - first <= len(self.pending):
            return (chunk for chunk in range(first, end) if chunk in self.pending)
        return (chunk for chunk in self.pending if first <= chunk < end)


def lay_over(buffer: memoryview, offset: int, patches: Sequence[Intent]) -> None:
    """Copy what of ``patches`` is inside [offset, offset + len(buffer)) into ``buffer``."""
    end = offset + len(buffer)
    for intent in patches:
        start, data = intent.offset, intent.data
        low, high = max(start, offset), min(start + len(data), end)
        if low < high:
            buffer[low - offset : high - offset] = data[low - start : high - start]


def uncovered(offset: int, end: int, patches: Sequence[Intent]) -> Iterator[tuple[int, int]]:
    """The parts of [offset, end) that none of ``patches`` touches, ascending."""
    for start, stop in sorted((patch.offset, patch.offset + len(patch.data)) for patch in patches):
        if start > offset:
            yield offset, min(start, end)
        offset = max(offset, stop)
    if offset < end:
        yield offset, end
