"""The benchmark's data, and how it lies in the page cache when a run begins.

How a file came into the page cache decides what later writes cost: a plain sequential read brings it in as large
folios, a read under POSIX_FADV_RANDOM as single pages, and a 4 KiB write in place into ext4 costs several times as much
CPU in the former.  A server on a busy machine meets both, so the cells name theirs.

Every run starts from dropped pages: what the contender before it left behind must not help or hurt.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

STEP = 1 << 20


class Filling(Enum):
    """How a run's files are brought into the page cache."""

    PLAIN = "plain"
    """By a plain sequential read: large folios."""
    RANDOM = "random"
    """By a read under POSIX_FADV_RANDOM: single pages."""
    COLD = "cold"
    """Not at all."""


def ensure_data(path: Path, size: int) -> Path:
    """A file of ``size`` random bytes, every block allocated; one of the right size is kept as it is."""
    if path.exists() and path.stat().st_size == size and path.stat().st_blocks * 512 >= size:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for offset in range(0, size, STEP):
            file.write(os.urandom(min(STEP, size - offset)))
        file.flush()
        os.fdatasync(file.fileno())
    partial.rename(path)
    return path


def fill(paths: Iterable[Path], filling: Filling) -> None:
    """Drop each file from the page cache, then bring it in as ``filling`` says."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            drop(descriptor)
            if filling is not Filling.COLD:
                _read_whole(descriptor, filling)
        finally:
            os.close(descriptor)


def drop(descriptor: int) -> None:
    """Write a file's dirty pages back and give all its pages up."""
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_whole(descriptor: int, filling: Filling) -> None:
    advice = os.POSIX_FADV_RANDOM if filling is Filling.RANDOM else os.POSIX_FADV_NORMAL
    os.posix_fadvise(descriptor, 0, 0, advice)
    buffer = bytearray(STEP)
    offset = 0
    while done := os.preadv(descriptor, [buffer], offset):
        offset += done
