"""How each extent is stored: as it is, as zeroes, compressed, or as its difference from the base.

What is smallest wins, as far as the CPU budget goes.  The budget is nanoseconds of CPU per byte of content, over the
whole stream: what easy extents leave unspent, a hard one may take.  Where it is used up, extents are stored as they
are (zeroes are always found: that costs nothing).  The clock is the caller's, so that nothing here knows the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import zstandard

from nbdsnap.delta.format import MAX_DATA, MAX_WINDOW, Encoding, checksum

Content = bytes | bytearray
"""No memoryview: comparing two of them is thirty times slower."""

Clock = Callable[[], int]
"""Nanoseconds of CPU, of the calling thread."""


class Compression(StrEnum):
    NONE = "none"
    AUTO = "auto"
    BEST = "best"


@dataclass(frozen=True)
class Effort:
    """``level``: Zstandard's.  ``budget``: nanoseconds per byte; None: as much as it takes."""

    level: int
    budget: float | None


PIECE = 128 << 10
"""Bytes of the extents to make, at most: the quickest compressor finds what it knows of the base up to here (measured:
335 bytes for 64 KiB with 32 small changes, 618 for 128 KiB, but 131,732 for 256 KiB)."""

EFFORTS = {Compression.NONE: Effort(0, 0.0), Compression.AUTO: Effort(1, 4.0), Compression.BEST: Effort(12, None)}

CREDIT = 50_000_000
"""Nanoseconds that may be spent before anything was earned."""

WORTH = 16
"""An extent is stored otherwise than as it is only where that saves a sixteenth."""

SHORT = 8
"""A difference of less than an eighth is taken without trying anything else."""

_ZEROES = memoryview(bytes(MAX_DATA))


def is_zero(content: Content) -> bool:
    zeroes: object = _ZEROES[: len(content)]  # mypy takes bytes and memoryviews for incomparable
    return content == zeroes


@dataclass(frozen=True)
class Stored:
    """An extent, ready for a frame.  ``base``: the checksum of what the base holds there; None where there is none."""

    offset: int
    length: int
    encoding: Encoding
    data: Content
    base: int | None = None

    @property
    def content_bytes(self) -> int:
        """What its content takes in a reader's memory."""
        return 0 if self.encoding is Encoding.ZERO else self.length


class Chooser:
    """For one thread."""

    def __init__(self, compression: Compression, clock: Clock) -> None:
        self._effort = EFFORTS[compression]
        self._clock = clock
        self._left = float(CREDIT)
        self._plain = zstandard.ZstdCompressor(level=self._effort.level, write_checksum=False)
        self._parameters = zstandard.ZstdCompressionParameters.from_level(
            self._effort.level or 1, window_log=MAX_WINDOW.bit_length() - 1, write_content_size=True
        )

    def store(self, offset: int, content: Content, base: Content | None) -> Stored | None:
        """``content``, of at most MAX_DATA bytes, as an extent; None where the base holds the same.

        The data of the result may be ``content`` itself.
        """
        length = len(content)
        if base is not None and content == base:
            return None
        known = None if base is None else checksum(base)
        if is_zero(content):
            return Stored(offset, length, Encoding.ZERO, b"", known)
        encoding, data = self._smallest(content, base)
        return Stored(offset, length, encoding, data, known)

    def _smallest(self, content: Content, base: Content | None) -> tuple[Encoding, Content]:
        effort = self._effort
        if effort.level == 0:
            return Encoding.RAW, content
        if effort.budget is not None:
            self._left += effort.budget * len(content)
            if self._left <= 0:
                return Encoding.RAW, content
        start = self._clock()
        found = self._try(content, base)
        self._left -= self._clock() - start
        return found

    def _try(self, content: Content, base: Content | None) -> tuple[Encoding, Content]:
        best: tuple[Encoding, Content] = Encoding.RAW, content
        limit = len(content) - len(content) // WORTH
        if base is not None and not is_zero(base):
            difference = self._difference(content, base)
            if len(difference) < limit:
                best, limit = (Encoding.DIFF, difference), len(difference)
            if len(difference) < len(content) // SHORT:
                return best
        compressed = self._plain.compress(content)
        return (Encoding.ZSTD, compressed) if len(compressed) < limit else best

    def _difference(self, content: Content, base: Content) -> bytes:
        dictionary = zstandard.ZstdCompressionDict(bytes(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        compressor = zstandard.ZstdCompressor(compression_params=self._parameters, dict_data=dictionary)
        return compressor.compress(content)
