"""What a volume holds where nothing was ever written to it: zeroes, or, in a clone, what a snapshot holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Base(Protocol):
    """Its content never changes.  Methods are for any thread."""

    is_zero: bool
    """Whether it holds nothing but zeroes."""

    def read(self, buffer: memoryview, offset: int, *, now: bool) -> bool:
        """Fill ``buffer``; what lies past the base's end is zeroes.  ``now``: from memory, or return False."""

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Ascending half-open ranges of bytes inside the given one that may hold data."""

    def will_need(self, offset: int, length: int) -> None:
        """Bring the range into the page cache, as far as that is possible."""


class ZeroBase:
    """Of a thin volume."""

    is_zero = True

    def read(self, buffer: memoryview, offset: int, *, now: bool) -> bool:
        buffer[:] = bytes(len(buffer))
        return True

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return iter(())

    def will_need(self, offset: int, length: int) -> None:
        pass
