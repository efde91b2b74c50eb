"""Buffers for payloads: aligned, lazily touched, used again.

Alignment is not cosmetic.  Copying from a page into user memory (``preadv``, ``recv``) is ``rep movsb`` in the kernel,
and on AMD's Zen 3 and 4 that is five times slower where the destination lies 1 to 31 bytes behind the source modulo
4096, which is exactly where a payload behind a header of 16 or 28 bytes in an aligned buffer lies when it is read from
an aligned offset.  So a payload starts at ``HEADROOM`` of its buffer, and its header is packed right in front of it.

Measured: 64 KiB from the page cache to offset 28 of a page takes 40 us, to offset 0 or 64 8 us.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

HEADROOM = 64
"""Bytes in front of a payload: a cache line; the longest header (extended OFFSET_DATA) has 40."""

SMALLEST = 64 << 10
"""Bytes: smaller buffers are not worth a mapping of their own; they are a fraction of this one."""

EXTRA = 4096
"""Bytes of each buffer beyond a power of two: payloads have such lengths, and headers come with them."""

KEPT_BYTES = 16 << 20
"""Bytes of idle buffers that are kept: mapping and touching 1 MiB anew costs more than filling it."""


def new_buffer(size: int) -> memoryview:
    """``size`` zero bytes, page-aligned; memory is taken when it is touched."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class BufferPool:
    """For the loop's thread only.  A buffer's length is EXTRA more than a power of two.  ``on_give`` is told of each
    buffer that comes back."""

    def __init__(self, kept_bytes: int = KEPT_BYTES, on_give: Callable[[memoryview], None] | None = None) -> None:
        self._on_give = on_give
        self._kept: dict[int, list[memoryview]] = {}
        self._room = kept_bytes

    def take(self, size: int) -> memoryview:
        """At least ``size`` bytes of any content."""
        rounded = EXTRA + max(SMALLEST, 1 << max(0, size - EXTRA - 1).bit_length())
        kept = self._kept.get(rounded)
        if kept:
            self._room += rounded
            return kept.pop()
        return new_buffer(rounded)

    def give(self, buffer: memoryview) -> None:
        """Back, from who took it; nobody uses it any more."""
        if self._on_give is not None:
            self._on_give(buffer)
        if len(buffer) <= self._room:
            self._room -= len(buffer)
            self._kept.setdefault(len(buffer), []).append(buffer)
