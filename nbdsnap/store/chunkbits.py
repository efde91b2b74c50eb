"""Sets of a volume's chunk numbers, as one bit each.

An anonymous mapping, whose untouched pages take no memory: an empty set costs nothing, whatever the volume's size, and
a full one 32 MiB per TiB.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

from nbdsnap.store.layout import BLOCK

_BLOCK_BYTES = BLOCK // 8


class ChunkBits:
    """A set of chunk numbers in [0, chunks).  Not locked: its volume's lock is."""

    __slots__ = ("bits",)

    def __init__(self, chunks: int) -> None:
        size = (chunks + BLOCK - 1) // BLOCK * _BLOCK_BYTES
        self.bits = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        """For the hot path: chunk ``c`` is in where ``bits[c >> 3] >> (c & 7) & 1``."""

    def covers(self, first: int, end: int) -> bool:
        """Whether all of the chunks [first, end) are in."""
        bits = self.bits
        low, high = (first + 7) >> 3, end >> 3
        if low >= high:
            return all(bits[c >> 3] >> (c & 7) & 1 for c in range(first, end))
        if not all(bits[c >> 3] >> (c & 7) & 1 for c in range(first, low << 3)):
            return False
        if not all(bits[c >> 3] >> (c & 7) & 1 for c in range(high << 3, end)):
            return False
        return bits[low:high].count(0xFF) == high - low

    def missing(self, chunks: Iterable[int]) -> list[int]:
        """Those of ``chunks`` that are not in, in their order."""
        bits = self.bits
        return [c for c in chunks if not bits[c >> 3] >> (c & 7) & 1]

    def add(self, chunks: Iterable[int]) -> None:
        bits = self.bits
        for chunk in chunks:
            bits[chunk >> 3] |= 1 << (chunk & 7)

    def remove(self, chunks: Iterable[int]) -> None:
        bits = self.bits
        for chunk in chunks:
            bits[chunk >> 3] &= ~(1 << (chunk & 7))

    def block(self, block: int) -> int:
        """A block's set, as :mod:`nbdsnap.store.chunkset` has it."""
        return int.from_bytes(self.bits[block * _BLOCK_BYTES : (block + 1) * _BLOCK_BYTES], "little")

    def add_block(self, block: int, members: int) -> None:
        """Add a whole block's set, as :mod:`nbdsnap.store.chunkset` has it."""
        where = slice(block * _BLOCK_BYTES, (block + 1) * _BLOCK_BYTES)
        merged = int.from_bytes(self.bits[where], "little") | members
        self.bits[where] = merged.to_bytes(_BLOCK_BYTES, "little")
