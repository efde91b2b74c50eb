"""Where the live chunks of a thin volume or clone lie, as far as that was asked before.

It only remembers; the index knows (table ``current``).  So it is bounded: the oldest blocks are forgotten.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from nbdsnap.store.layout import BLOCK, BLOCK_SHIFT, MAX_SLOTS, ZERO_SLOT

UNKNOWN = 0
ABSENT = 1
"""The chunk has no entry: it is what the base holds."""

ZEROES = 2
FIRST = 3
"""What :meth:`SlotMap.get` says of slot 0, and so on."""

MAX_BLOCKS = 1024
"""32 KiB each: 32 MiB for the chunks of 16 GiB."""

_UNKNOWN_BLOCK = bytes(8 * BLOCK)
_MASK = BLOCK - 1


class SlotMap:
    """Not locked: its volume's lock is.  But :meth:`get` may be called by any thread at any time."""

    def __init__(self) -> None:
        self._blocks: dict[int, array[int]] = {}

    def get(self, chunk: int) -> int:
        block = self._blocks.get(chunk >> BLOCK_SHIFT)
        return UNKNOWN if block is None else block[chunk & _MASK]

    def runs(self, first: int, end: int) -> list[tuple[int, int, int]] | None:
        """``(first chunk, end, place)``: consecutive runs of neighbouring slots, or of ABSENT or ZEROES, that make up
        [first, end); None where one is unknown."""
        found: list[tuple[int, int, int]] = []
        start, place, expected = first, self.get(first), 0
        if not place:
            return None
        expected = place + 1 if place >= FIRST else place
        for chunk in range(first + 1, end):
            value = self.get(chunk)
            if value != expected:
                if not value:
                    return None
                found.append((start, chunk, place))
                start = chunk
                place = expected = value
            if value >= FIRST:
                expected += 1
        found.append((start, end, place))
        return found

    def put(self, chunk: int, slot: int | None) -> None:
        """What the index says of the chunk: a slot, ZERO_SLOT, or None where it has no entry."""
        if slot is None:
            value = ABSENT
        elif slot == ZERO_SLOT:
            value = ZEROES
        elif slot < MAX_SLOTS:
            value = FIRST + slot
        else:
            value = UNKNOWN
        self._block(chunk)[chunk & _MASK] = value

    def fill(self, first: int, end: int, items: Iterable[tuple[int, int]]) -> None:
        """``items``: all entries of the chunks [first, end)."""
        start = first
        while start < end:
            stop = min(end, (start | _MASK) + 1)
            low = start & _MASK
            self._block(start)[low : low + stop - start] = array("Q", [ABSENT]) * (stop - start)
            start = stop
        for chunk, slot in items:
            self.put(chunk, slot)

    def _block(self, chunk: int) -> array[int]:
        number = chunk >> BLOCK_SHIFT
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) >= MAX_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            block = self._blocks[number] = array("Q", _UNKNOWN_BLOCK)
        return block
