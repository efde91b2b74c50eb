"""A disk of the emulated machine with a write cache of its own that a power cut takes away.

QEMU's filter ``blklogwrites`` notes each write and flush of the machine in a log, in the format of the kernel's
dm-log-writes.  :func:`cut` makes from it a disk as a cut could leave it: all that was flushed, and of what came after
the last flush each 4 KiB or not, as the seed says.

Log, in sectors of 512 bytes, little-endian: ``u64 magic   u64 version   u64 entries   u32 sector size``; then entries,
each a sector ``u64 sector   u64 sectors   u64 flags   u64 data bytes`` and its data.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
PAGE = 4096
FLUSH, FUA, DISCARD = 1, 2, 4
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_MAGIC = 0x6A736677736872


class Entry(NamedTuple):
    flags: int
    offset: int
    length: int
    data: bytes


def entries(log: Path) -> Iterator[Entry]:
    """Up to the first one that is not whole: QEMU was killed."""
    size = log.stat().st_size
    with log.open("rb") as file:
        magic, _, _, sector_size = _SUPER.unpack(file.read(_SUPER.size))
        assert magic == _MAGIC and sector_size == SECTOR, log
        place = SECTOR
        while place + SECTOR <= size:
            file.seek(place)
            sector, sectors, flags, _ = _ENTRY.unpack(file.read(_ENTRY.size))
            if not sectors and not flags:
                return
            has_data = sectors if not flags & DISCARD else 0
            end = place + SECTOR + has_data * SECTOR
            if end > size:
                return
            file.seek(place + SECTOR)
            yield Entry(flags, sector * SECTOR, sectors * SECTOR, file.read(has_data * SECTOR))
            place = end


def cut(before: Path, log: Path, target: Path, seed: int) -> tuple[int, int]:
    """``target`` is ``before`` (the disk at the machine's start) and what a cut leaves of the logged writes.

    Returns how many writes there were, and how many of them came after the last flush.
    """
    found = list(entries(log))
    last_flush = max((number for number, entry in enumerate(found) if entry.flags & FLUSH), default=-1)
    rng = random.Random(seed)
    share = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    shutil.copyfile(before, target)
    fd = os.open(target, os.O_RDWR)
    try:
        for number, entry in enumerate(found):
            data = bytes(entry.length) if entry.flags & DISCARD else entry.data
            if number < last_flush or entry.flags & FUA:
                os.pwrite(fd, data, entry.offset)
                continue
            for start in range(0, len(data), PAGE):
                if rng.random() < share:
                    os.pwrite(fd, data[start : start + PAGE], entry.offset + start)
    finally:
        os.close(fd)
    return len(found), sum(1 for entry in found[last_flush + 1 :] if entry.length)
