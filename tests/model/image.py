"""What a volume should hold, kept by the simplest means: bytes in a dictionary, and who wrote each chunk last."""

from __future__ import annotations

import random
from collections.abc import Iterable

CHUNK = 4096
_ZEROES = bytes(CHUNK)


def content(seed: int, number: int, length: int) -> bytes:
    """The payload of write ``number``: tells the write, and the place inside it, apart from all others."""
    return random.Random(seed << 32 | number).randbytes(length)


class Image:
    """A volume's content, sparse, and per chunk the number of the operation that touched it last (0: none)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._chunks: dict[int, bytes] = {}
        self.versions: dict[int, int] = {}

    def copy(self) -> Image:
        other = Image(self.size)
        other._chunks = dict(self._chunks)
        other.versions = dict(self.versions)
        return other

    def write(self, offset: int, data: bytes, number: int) -> None:
        position = 0
        for chunk, low, high in pieces(offset, len(data)):
            old = self._chunks.get(chunk, _ZEROES)
            new = old[:low] + data[position : position + high - low] + old[high:]
            position += high - low
            self.versions[chunk] = number
            self._put(chunk, new)

    def zero(self, offset: int, length: int, number: int) -> None:
        """Zeroes.  Where nothing but zeroes is already, that is no change."""
        for chunk, low, high in pieces(offset, length):
            old = self._chunks.get(chunk)
            if old is not None:
                self.versions[chunk] = number
                self._put(chunk, old[:low] + bytes(high - low) + old[high:])

    def _put(self, chunk: int, data: bytes) -> None:
        if data == _ZEROES:
            self._chunks.pop(chunk, None)
        else:
            self._chunks[chunk] = data

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(self._chunks.get(chunk, _ZEROES)[low:high] for chunk, low, high in pieces(offset, length))

    def is_zero(self, chunk: int) -> bool:
        return chunk not in self._chunks

    def differing(self, other: Image) -> set[int]:
        """The chunks that do not hold the same bytes."""
        chunks = self._chunks.keys() | other._chunks.keys()
        return {chunk for chunk in chunks if self._chunks.get(chunk) != other._chunks.get(chunk)}

    def touched_since(self, older: Image) -> set[int]:
        """The chunks that an operation touched after ``older`` was copied from this."""
        return {chunk for chunk, number in self.versions.items() if older.versions.get(chunk, 0) != number}


def pieces(offset: int, length: int) -> Iterable[tuple[int, int, int]]:
    """A range by chunk: ``(chunk, low, high)`` with the bytes [low, high) of the chunk."""
    end = offset + length
    while offset < end:
        chunk, low = divmod(offset, CHUNK)
        high = min(CHUNK, low + end - offset)
        yield chunk, low, high
        offset += high - low


def shares(live: Image, snapshots: list[Image]) -> list[tuple[int, ...]]:
    """The preserved chunks that the snapshots of one volume need: for each, the positions of those that share it.

    A snapshot needs one where its chunk has been touched since, and is not all zeroes.
    """
    sharers: dict[tuple[int, int], list[int]] = {}
    for position, image in enumerate(snapshots):
        for chunk in live.touched_since(image):
            if not image.is_zero(chunk):
                sharers.setdefault((chunk, image.versions.get(chunk, 0)), []).append(position)
    return [tuple(positions) for positions in sharers.values()]
