"""A raw file as a Device, without snapshots: what the data path is tested and measured on.

It is real (page cache, pwrite, fdatasync, holes), and it can be asked to be difficult: ``cold`` makes every ``*_now``
say no; ``gate`` holds the other operations until it is opened, so that a test can have as many in flight as it wants;
``faults`` makes reads and writes that touch an offset fail.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdsnap.engine.device import STATE_HOLE, STATE_ZERO, Device, Op, OpKind
from nbdsnap.errors import NotFoundError

PUNCH = 0x3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO = 0x10  # FALLOC_FL_ZERO_RANGE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, offset, length):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class RawFile:
    """The file, its thread, and what a test may count: shared by all devices that are open on it."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR)
        self.size = os.fstat(self.fd).st_size
        self.read_only = read_only
        self.cold = False
        self.gate = threading.Event()
        self.gate.set()
        self.faults: dict[int, OSError] = {}
        self.opened = 0
        self.waiting = 0
        """Reads that wait at the gate."""
        self.dirty = False
        self.syncs = 0
        self._lock = threading.Lock()
        self._ops: queue.SimpleQueue[Op | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="rawfile", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.gate.set()
        self._ops.put(None)
        self._thread.join()
        os.close(self.fd)

    def wait_at_gate(self) -> None:
        if not self.gate.is_set():
            with self._lock:
                self.waiting += 1
            self.gate.wait()
            with self._lock:
                self.waiting -= 1

    def check(self, offset: int, length: int) -> None:
        for bad, error in self.faults.items():
            if offset <= bad < offset + length:
                raise error

    def submit(self, op: Op) -> None:
        self._ops.put(op)

    def _loop(self) -> None:
        while (op := self._ops.get()) is not None:
            self.gate.wait()
            failure: Exception | None = None
            try:
                self._apply(op)
            except Exception as error:
                failure = error
            op.done(failure)

    def _apply(self, op: Op) -> None:
        if op.kind == OpKind.FLUSH:
            self.sync()
            return
        self.check(op.offset, op.length)
        self.dirty = True
        if op.kind == OpKind.WRITE:
            assert op.data is not None
            assert len(op.data) == op.length
            view, offset = memoryview(op.data), op.offset
            while view:
                written = os.pwrite(self.fd, view, offset)
                view, offset = view[written:], offset + written
        else:
            fallocate(self.fd, ZERO if op.no_hole else PUNCH, op.offset, op.length)
        if op.fua:
            self.sync()

    def sync(self) -> None:
        self.dirty = False
        self.syncs += 1
        os.fdatasync(self.fd)


class RawDevice:
    """One opening of a :class:`RawFile`."""

    def __init__(self, file: RawFile, name: str) -> None:
        self._file = file
        self._open = True
        self.name = name
        file.opened += 1

    @property
    def size(self) -> int:
        return self._file.size

    @property
    def read_only(self) -> bool:
        return self._file.read_only

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        if self._file.cold or self._file.faults:
            return False
        try:
            return os.preadv(self._file.fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
        except BlockingIOError:
            return False

    def read(self, buffer: memoryview, offset: int) -> None:
        self._file.wait_at_gate()
        self._file.check(offset, len(buffer))
        while buffer:
            count = os.preadv(self._file.fd, [buffer], offset)
            assert count, "past the end"
            buffer, offset = buffer[count:], offset + count

    def write_now(self, offset: int, data: memoryview) -> bool:
        if self._file.cold or self._file.faults:
            return False
        self._file.dirty = True
        return os.pwrite(self._file.fd, data, offset) == len(data)

    def writes_now(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool]:
        return [self.write_now(offset, data) for offset, data in writes]

    def flush_now(self) -> bool:
        return not self._file.dirty and not self._file.cold

    def submit(self, op: Op) -> None:
        self._file.submit(op)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        self._file.check(offset, length)
        extents: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            try:
                data = min(os.lseek(self._file.fd, offset, os.SEEK_DATA), end)
            except OSError:  # no more data
                data = end
            if data > offset:
                extents.append((data - offset, STATE_HOLE | STATE_ZERO))
            offset = data
            if offset < end:
                hole = min(os.lseek(self._file.fd, offset, os.SEEK_HOLE), end)
                extents.append((hole - offset, 0))
                offset = hole
        return extents

    def depths(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(size, int(not flags)) for size, flags in self.extents(offset, length)]

    def changes(self, base: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        raise AssertionError("a raw file knows no snapshots")

    def is_sparse(self) -> bool:
        status = os.fstat(self._file.fd)
        return status.st_blocks * 512 < status.st_size

    def cache(self, offset: int, length: int) -> None:
        self._file.check(offset, length)
        os.posix_fadvise(self._file.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._file.opened -= 1


@dataclass(frozen=True)
class RawExport:
    name: str
    size: int
    read_only: bool
    description: str = ""


class RawPool:
    """Raw files by name, as the server wants its exports."""

    def __init__(self, files: dict[str, RawFile]) -> None:
        self.files = files

    def exports(self) -> list[RawExport]:
        return [RawExport(name, file.size, file.read_only) for name, file in self.files.items()]

    def find_export(self, name: str) -> RawExport | None:
        if not name and len(self.files) == 1:
            name = next(iter(self.files))
        file = self.files.get(name)
        return None if file is None else RawExport(name, file.size, file.read_only)

    def bases(self, name: str) -> list[str]:
        return []

    def open_device(self, name: str, bases: Sequence[str] = ()) -> Device:
        if name not in self.files:
            raise NotFoundError(f"there is no {name}")
        return RawDevice(self.files[name], name)
