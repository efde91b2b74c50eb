"""Content that tells where it came from: blocks made from a seed and their number, the same in every run."""

from __future__ import annotations

import random
from pathlib import Path

BLOCK_SIZE = 4096


def stamped(seed: int, offset: int, length: int) -> bytes:
    """The bytes at ``offset`` of an endless image named by ``seed``: no two blocks, and no two images, are alike."""
    first = offset // BLOCK_SIZE
    last = (offset + length + BLOCK_SIZE - 1) // BLOCK_SIZE
    image = b"".join(_block(seed, number) for number in range(first, last))
    start = offset - first * BLOCK_SIZE
    return image[start : start + length]


def _block(seed: int, number: int) -> bytes:
    return random.Random(seed << 40 | number).randbytes(BLOCK_SIZE)


def write_stamped(path: Path, size: int, seed: int) -> Path:
    """A file of ``size`` bytes of :func:`stamped` content."""
    step = 1 << 20
    with path.open("wb") as file:
        for offset in range(0, size, step):
            file.write(stamped(seed, offset, min(step, size - offset)))
    return path
