"""An origin: the raw file or block device that holds a volume's live data, in place and always current.

It belongs to the user.  nbdsnap writes to it what clients write, and nothing else: no header, no padding; a file
never grows or shrinks but by a resize.  Sparse files stay sparse.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nbdsnap.errors import AlreadyExistsError, NotFoundError, OriginError
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.layout import MAX_VOLUME_SIZE


class Origin:
    """Opened for reading and writing.  ``identity`` is equal for two paths of one file or device."""

    def __init__(self, io: FileIO, path: Path) -> None:
        self._io = io
        self.path = path
        self._holes = 0
        """How often something was punched."""
        self._data = 0, 0, 0
        """A range that is data, (start, end), and what ``_holes`` was when that was found out."""
        _check_kind(path)
        try:
            self.fd = io.open(path, os.O_RDWR)
        except OSError as error:
            raise _cannot_open(path, error) from None
        try:
            status = os.fstat(self.fd)
            self.is_block_device = stat.S_ISBLK(status.st_mode)
            self.identity = _identity(status)
            self.size = io.size(self.fd)
        except BaseException:
            io.close(self.fd)
            raise

    def close(self) -> None:
        self._io.close(self.fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._io.read_into(self.fd, buffer, offset)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        written = self._io.pwrite(self.fd, data, offset)
        if written != len(data):
            self._io.write_all(self.fd, [memoryview(data)[written:]], offset + written)

    def sync(self) -> None:
        self._io.fdatasync(self.fd)

    def sync_with_times(self) -> None:
        """Likewise, and what fstat(2) says of the file."""
        self._io.fsync(self.fd)

    def punch_hole(self, offset: int, length: int, *, fast: bool = False) -> None:
        try:
            self._io.punch_hole(self.fd, offset, length, fast=fast)
        finally:
            self._holes += 1

    def zero_range(self, offset: int, length: int) -> None:
        try:
            self._io.zero_range(self.fd, offset, length)
        finally:
            self._holes += 1  # in the eyes of SEEK_DATA

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Ascending half-open ranges ``(start, end)`` inside the given one that are allocated; the rest are holes.

        A file system may look at every fragment up to the next hole to find that.  So the last range that was found is
        remembered, until something is punched: to take a hole for data would do no harm.
        """
        end = offset + length
        holes, start, stop = self._data
        if holes == self._holes and start <= offset < stop:
            yield offset, min(stop, end)
            offset = stop
        if offset >= end:
            return
        holes = self._holes
        for start, stop in self._io.data_extents(self.fd, offset, end - offset):
            self._data = holes, start, stop
            yield start, min(stop, end)

    def drop_cached(self, offset: int, length: int) -> None:
        self._io.drop_cached(self.fd, offset, length)

    def is_sparse(self) -> bool:
        """Whether the file may have holes; of a block device that can't be known."""
        return not self.is_block_device and self._io.allocated_bytes(self.fd) < self._io.size(self.fd)

    def real_size(self) -> int:
        """Bytes that the file or device has now."""
        return self._io.size(self.fd)

    def truncate(self, size: int) -> None:
        """Cut the file, or lengthen it by a hole; durably."""
        self._io.truncate(self.fd, size)
        self._holes += 1
        self._io.fsync(self.fd)
        self.size = size

    def will_need(self, offset: int, length: int) -> None:
        self._io.will_need(self.fd, offset, length)


def create_origin(io: FileIO, path: Path, size: int) -> None:
    """A new sparse file of ``size`` bytes, durable with its directory entry.

    It gets its name when it is whole, so that a crash leaves all of it or none.
    """
    check_size(size)
    if path.exists():
        raise AlreadyExistsError(f"{path} exists")
    new = path.with_name(f".{path.name}.nbdsnap-new")
    try:
        fd = io.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            io.truncate(fd, size)
            io.fdatasync(fd)
        finally:
            io.close(fd)
        io.link(new, path)
    except FileExistsError:
        raise AlreadyExistsError(f"{path} exists") from None
    except FileNotFoundError:
        raise NotFoundError(f"{path} can't be created: there is no folder {path.parent}") from None
    except OSError as error:
        raise OriginError(
            f"{path} can't be created with {size} bytes: {error.strerror}",
            hint="nbdsnap must be able to create it there, and to write it",
        ) from None
    finally:
        with contextlib.suppress(OSError):
            io.unlink(new)
    io.fsync_directory(path.parent)


def check_size(size: int) -> int:
    if not 0 < size <= MAX_VOLUME_SIZE:
        raise OriginError(f"a volume of {size} bytes is out of range: 1 to {MAX_VOLUME_SIZE}")
    return size


def _identity(status: os.stat_result) -> tuple[str, int, int]:
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev, 0
    return "file", status.st_dev, status.st_ino


def _check_kind(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _cannot_open(path, error) from None
    if stat.S_ISDIR(mode):
        raise OriginError(f"{path} is a directory", hint="an origin is a raw file or a block device")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise OriginError(f"{path} is neither a regular file nor a block device")


def _cannot_open(path: Path, error: OSError) -> OriginError | NotFoundError:
    if error.errno == errno.ENOENT:
        return NotFoundError(f"the origin {path} does not exist", hint="name an existing file, or give a size")
    return OriginError(
        f"the origin {path} can't be used: {error.strerror}", hint="nbdsnap must be able to read and write it"
    )
