"""File operations that fail when a test says so: the disk's part in the tests of failing disks.

Faults are named by an operation and a file's name::

    io = FaultyIO()
    fault = io.fail("sync", "vol.img")           # each fdatasync of that file, with EIO
    io.fail("write", "store.data", ENOSPC, times=1)
    io.spoil("vol.img", range(4096, 8192))       # bad sectors: unreadable until all of them are overwritten
    io.shorten("vol.img", 1000)                  # a write call takes no more than 1,000 bytes
    io.heal()                                    # from here on, all is well

Operations: ``read``, ``write`` (also of holes and zeroes) and ``sync``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdsnap.store.fileio import Buffer, FileIO


@dataclass
class Fault:
    operation: str
    file: str
    number: int
    times: int
    """How often it will yet happen."""
    first: int = 0
    end: int = 1 << 62
    """The bytes [first, end) of the file that it happens at."""
    hits: int = 0


class FaultyIO(FileIO):
    """``free``: what the file systems claim to have free; None: the truth."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._faults: list[Fault] = []
        self._bad: list[Fault] = []
        self._longest: dict[str, int] = {}
        self.free: int | None = None

    def fail(
        self, operation: str, file: str, number: int = errno.EIO, *, times: int = 1 << 62, where: range | None = None
    ) -> Fault:
        fault = Fault(operation, file, number, times)
        if where is not None:
            fault.first, fault.end = where.start, where.stop
        self._faults.append(fault)
        return fault

    def spoil(self, file: str, where: range) -> Fault:
        """A disk gives a bad sector another place when it is written.  The kernel reads what a write only half
        covers."""
        self._bad.append(self.fail("read", file, where=where))
        return self._bad[-1]

    def _overwrite(self, fd: int, offset: int, length: int) -> None:
        for fault in [fault for fault in self._bad if fault.file == self._names.get(fd)]:
            if offset <= fault.first and offset + length >= fault.end:
                self._bad.remove(fault)
                self._faults.remove(fault)
            elif offset < fault.end and offset + length > fault.first:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def shorten(self, file: str, longest: int) -> None:
        self._longest[file] = longest

    def heal(self) -> None:
        self._faults.clear()
        self._bad.clear()
        self._longest.clear()
        self.free = None

    def _meet(self, operation: str, fd: int, offset: int = 0, length: int = 1 << 62) -> None:
        for fault in list(self._faults):
            if self._hits(fault, operation, fd, offset, length):
                fault.times -= 1
                fault.hits += 1
                raise OSError(fault.number, os.strerror(fault.number))

    def _hits(self, fault: Fault, operation: str, fd: int, offset: int, length: int) -> bool:
        if (fault.operation, fault.file) != (operation, self._names.get(fd)) or not fault.times:
            return False
        return offset < fault.end and offset + length > fault.first

    # What FileIO does

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        self._names[fd] = path.name
        return fd

    def close(self, fd: int) -> None:
        self._names.pop(fd, None)
        super().close(fd)

    def pread(self, fd: int, length: int, offset: int) -> bytes:  # type: ignore[override]
        self._meet("read", fd, offset, length)
        return os.pread(fd, length, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:  # type: ignore[override]
        length = sum(map(len, buffers))
        if flags & os.RWF_NOWAIT and any(self._hits(fault, "read", fd, offset, length) for fault in self._faults):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # it would have to ask the disk
        self._meet("read", fd, offset, length)
        return os.preadv(fd, buffers, offset, flags)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:  # type: ignore[override]
        return self.pwritev(fd, [data], offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._meet("write", fd, offset, sum(map(len, buffers)))
        self._overwrite(fd, offset, sum(map(len, buffers)))
        longest = self._longest.get(self._names.get(fd, ""))
        if longest is not None:
            return os.pwrite(fd, b"".join(buffers)[:longest], offset)
        return os.pwritev(fd, buffers, offset)

    def batch(self) -> None:
        """One by one, so that each can fail."""

    def fdatasync(self, fd: int) -> None:
        self._meet("sync", fd)
        os.fdatasync(fd)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._meet("write", fd, offset, length)
        self._overwrite(fd, offset, length)
        super().fallocate(fd, mode, offset, length)

    def free_bytes(self, fd: int) -> tuple[int, int]:
        return super().free_bytes(fd) if self.free is None else (self.free, self.free)
