"""Applying a delta stream to any raw file or block device, without a pool.

From a file, the stream is read twice: first all of it is checked, and that the target holds what it was made from, as
far as the stream says; then it is written.  So what can be refused is refused with the target as it was.  From a pipe
it can be read only once: each extent is checked before it is written, and what is wrong may turn up in the middle.

A file grows to the snapshot's size where it is smaller than that and the base is not; a device, never.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from nbdsnap.delta.decoder import End, Extent, Extents
from nbdsnap.delta.format import Encoding, Header
from nbdsnap.errors import ConflictError, InUseError, NotFoundError, OriginError, UsageError, WrongBaseError
from nbdsnap.models import ApplyReport
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.originuse import is_written_elsewhere
from nbdsnap.transfer.streams import Source, read_events

Report = Callable[[int, int], None]


class Target:
    """The file or device, opened for writing; made where it is not there and the stream needs no base."""

    def __init__(self, io: FileIO, path: Path, header: Header) -> None:
        self._io = io
        self.path = path
        self.created = False
        flags = os.O_RDWR
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if header.base is not None:
                raise NotFoundError(
                    f"{path} does not exist, and the delta needs what it was made from",
                    hint=f"restore {header.volume}@{header.base.name} there first",
                ) from None
            self.created, mode = True, stat.S_IFREG
            flags |= os.O_CREAT | os.O_EXCL
        if stat.S_ISBLK(mode):
            flags |= os.O_EXCL  # refused where it is mounted, or in use otherwise
        elif not stat.S_ISREG(mode):
            raise OriginError(f"{path} is neither a regular file nor a block device")
        elif not self.created and is_written_elsewhere(path):
            raise InUseError(f"{path} is open for writing in another program", hint="end that one first")
        self._is_block_device = stat.S_ISBLK(mode)
        try:
            self.fd = io.open(path, flags, 0o600)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise InUseError(f"{path} is in use", hint="unmount it first") from None
            raise
        self.size = io.size(self.fd)

    def check_size(self, header: Header) -> None:
        needed = header.to.size if self._is_block_device else 0 if header.base is None else header.base.size
        if self.size < needed:
            raise ConflictError(
                f"{self.path} has {self.size} bytes, and the delta needs {needed}", hint="that is no copy of its base"
            )

    def prepare(self, header: Header) -> None:
        """Of what the stream has no word: zeroes behind the base."""
        if self.size < header.to.size:
            self._io.truncate(self.fd, header.to.size)
        if header.base is not None and header.base.size < min(header.to.size, self.size):
            self._io.punch_hole(self.fd, header.base.size, min(header.to.size, self.size) - header.base.size)

    def check(self, extent: Extent) -> None:
        """WrongBaseError where it doesn't hold what the delta was made from, nor already what it makes of that."""
        if extent.base is None:
            return
        present = self.read(extent)
        try:
            extent.content(present)
        except WrongBaseError:
            if extent.encoding is Encoding.DIFF:
                raise
            wanted = extent.content()
            if present != (bytes(extent.length) if wanted is None else wanted):
                raise

    def read(self, extent: Extent) -> bytearray:
        content = bytearray(extent.length)
        self._io.read_into(self.fd, memoryview(content), extent.offset)
        return content

    def write(self, extent: Extent) -> None:
        content = extent.content(self.read(extent) if extent.encoding is Encoding.DIFF else None)
        if content is None:
            self._io.punch_hole(self.fd, extent.offset, extent.length)
        else:
            self._io.write_all(self.fd, [content], extent.offset)

    def close(self) -> None:
        self._io.close(self.fd)


def apply(stream: int, path: Path, report: Report, io: FileIO | None = None) -> ApplyReport:
    """Apply the stream that can be read from the descriptor ``stream`` to ``path``."""
    io = io or FileIO()
    start = _position(stream)
    if start is not None:
        _Pass(io, path, report, check=True, write=False).run(stream)
        os.lseek(stream, start, os.SEEK_SET)
        return _Pass(io, path, report, check=False, write=True).run(stream)
    return _Pass(io, path, report, check=True, write=True).run(stream)


def _position(stream: int) -> int | None:
    try:
        return os.lseek(stream, 0, os.SEEK_CUR)
    except OSError:
        return None


class _Pass:
    """The stream from its beginning to its end, once."""

    def __init__(self, io: FileIO, path: Path, report: Report, *, check: bool, write: bool) -> None:
        self._io = io
        self._path = path
        self._report = report
        self._check = check
        self._write = write

    def run(self, stream: int) -> ApplyReport:
        source = Source(stream)
        target: Target | None = None
        header: Header | None = None
        end: End | None = None
        try:
            for event in read_events(source):
                if isinstance(event, Header):
                    header = event
                    if header.start:
                        raise UsageError("that is the rest of a stream that was cut", hint="send the snapshot again")
                    if self._write or header.base is not None or self._path.exists():
                        target = Target(self._io, self._path, header)
                        target.check_size(header)
                        if self._write:
                            target.prepare(header)
                elif isinstance(event, Extents):
                    assert header is not None
                    self._take(event, target)
                    last = event.extents[-1]
                    self._report(last.offset + last.length, header.to.size)
                elif isinstance(event, End):
                    end = event
            assert header is not None and end is not None
            if target is not None and self._write:
                self._io.fsync(target.fd)
        finally:
            if target is not None:
                target.close()
        return ApplyReport(
            target=str(self._path),
            volume=header.volume,
            snapshot=header.to.name,
            base=None if header.base is None else header.base.name,
            extents=end.extents,
            bytes=end.covered,
            stream_bytes=source.received,
            digest=end.digest.hex(),
        )

    def _take(self, event: Extents, target: Target | None) -> None:
        for extent in event.extents:
            if target is None:
                if extent.encoding is Encoding.ZSTD:
                    extent.content()
                continue
            if self._check:
                target.check(extent)
            if self._write:
                target.write(extent)
            elif extent.base is None:
                extent.content()
