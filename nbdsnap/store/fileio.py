"""The seam: every operation that nbdsnap does on a data file.

One object of this class is handed down to all that touches files (LMDB's own file operations excepted: it does them
in C). A test subclasses it to fail, shorten, leave out or record chosen calls; production pays nothing, since the hot
calls are the operating system's own functions, bound as static methods.

``path`` arguments name the file to a person; everything else works on descriptors.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdsnap.store.batchio import BatchIO

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

IOV_MAX = 1024
"""Buffers in one vectored call: the kernel's UIO_MAXIOV."""

Buffer = bytes | bytearray | memoryview


class FileIO:
    """The operating system's file operations, complete or an OSError: no short read or write is ever returned."""

    pread = staticmethod(os.pread)
    pwrite = staticmethod(os.pwrite)
    """May write less than asked, as the system call: for the hot path, which checks.  Others: :meth:`write_all`."""

    preadv = staticmethod(os.preadv)
    """May read less than asked; takes RWF_NOWAIT.  For the hot path; others: :meth:`read_into`."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; what lies past the end of the file reads as zeroes."""
        done = 0
        while done < len(buffer):
            count = self.preadv(fd, [buffer[done:]], offset + done)
            if count == 0:
                buffer[done:] = bytes(len(buffer) - done)
                return
            done += count

    def write_all(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of ``buffers``, one after the other, from ``offset`` on."""
        for start in range(0, len(buffers), IOV_MAX):
            batch = list(buffers[start : start + IOV_MAX])
            left = sum(map(len, batch))
            while left:
                count = self.pwritev(fd, batch, offset)
                if count == 0:
                    raise OSError(errno.EIO, "the file took no more data")
                offset += count
                left -= count
                if left:
                    batch = _after(batch, count)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def batch(self) -> BatchIO | None:
        """For many small reads and writes at once, by one thread; None where the system has no such thing."""
        try:
            return BatchIO()
        except OSError:
            return None

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Make durable what :meth:`fdatasync` does not care for, too: the modification time."""
        os.fsync(fd)

    def fsync_directory(self, path: Path) -> None:
        """Make the directory's entries durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def link(self, path: Path, new: Path) -> None:
        """Give the file a second name; FileExistsError where something has it."""
        os.link(path, new)

    def rename(self, path: Path, new: Path) -> None:
        path.rename(new)

    def unlink(self, path: Path) -> None:
        """Remove a name; nothing happens where it is not there."""
        path.unlink(missing_ok=True)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def punch_hole(self, fd: int, offset: int, length: int, *, fast: bool = False) -> None:
        """Make the range read as zeroes and give its space back; the file's size stays.

        Falls back to writing zeroes where the file system or device can't punch there; with ``fast``, that is ENOTSUP.
        """
        self._zero(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length, fast=fast)

    def zero_range(self, fd: int, offset: int, length: int) -> None:
        """Make the range read as zeroes and keep (or make) it allocated."""
        self._zero(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length)

    def _zero(self, fd: int, mode: int, offset: int, length: int, *, fast: bool = False) -> None:
        try:
            self.fallocate(fd, mode, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
                raise
            if fast:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)) from None
            block = bytes(min(length, 1 << 20))
            while length:
                count = min(length, len(block))
                self.write_all(fd, [memoryview(block)[:count]], offset)
                offset += count
                length -= count

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """The system call fallocate(2); OSError with its errno."""
        while _libc.fallocate(fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    def size(self, fd: int) -> int:
        """Bytes of a regular file or a block device."""
        return os.lseek(fd, 0, os.SEEK_END)

    def data_extents(self, fd: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Ascending half-open ranges ``(start, end)`` that begin in the given one and are allocated; the rest of it is
        holes.  The last may pass the end of the given one.

        A block device, or a file system without SEEK_DATA, is one allocated range.
        """
        end = offset + length
        while offset < end:
            try:
                start = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole from here on
                    return
                if error.errno == errno.EINVAL:
                    yield offset, end
                    return
                raise
            if start >= end:
                return
            stop = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, stop
            offset = stop

    def allocated_bytes(self, fd: int) -> int:
        """Bytes that the file takes on its disk."""
        return os.fstat(fd).st_blocks * 512

    def free_bytes(self, fd: int) -> tuple[int, int]:
        """Bytes that the file's file system can still take, and all that it can ever take."""
        status = os.fstatvfs(fd)
        return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize

    def will_need(self, fd: int, offset: int, length: int) -> None:
        """Ask the system to read the range into the page cache, without waiting for it."""
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def drop_cached(self, fd: int, offset: int = 0, length: int = 0) -> None:
        """Take clean pages of the range out of the page cache; 0 as the length is up to the file's end."""
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def lock_exclusive(self, fd: int) -> bool:
        """Take the whole-file lock of flock(2); False where another process has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _after(buffers: list[Buffer], count: int) -> list[Buffer]:
    """What is left of ``buffers`` when the first ``count`` bytes are gone."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [memoryview(buffer)[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []
