"""Many reads, or many writes, of one file with one system call.

Linux's old asynchronous interface (io_submit(2)) does buffered reads and writes before it returns, which is all that is
wanted here: a hundred small ones then let go of the interpreter's lock once instead of a hundred times, and each time
another thread has taken it meanwhile, getting it back costs ten times what the read did.  It is allowed where
containers forbid io_uring.  The structures are linux/aio_abi.h's.

It only ever helps: what was not done wholly, for whatever reason, is the caller's to do in the ordinary way, which then
has the error.  One thread at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Sequence

BATCH = 256
"""Operations in one call."""

Piece = tuple[int, int, int]
"""Address in memory, bytes, offset in the file."""

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""io_setup, io_destroy, io_getevents and io_submit, by machine."""

_IOCB_CMD_PREAD, _IOCB_CMD_PWRITE = 0, 1
_IOCB = struct.Struct("=QQHhIQQqQQ")
_WHERE = struct.Struct("=QQq")
_WHERE_AT = 24
"""Of an iocb: aio_buf, aio_nbytes and aio_offset."""

_EVENT = struct.Struct("=QQqq")
"""Index, iocb, result, and one that is not used."""

_libc = ctypes.CDLL(None, use_errno=True)


class BatchIO:
    """Raises OSError where the system has no such thing, or allows none now."""

    def __init__(self) -> None:
        numbers = _NUMBERS.get(platform.machine())
        if numbers is None:
            raise OSError(f"not known for {platform.machine()}")
        self._setup, self._destroy, self._getevents, self._submit = numbers
        self._context = ctypes.c_ulong(0)
        _call(self._setup, BATCH, ctypes.byref(self._context))
        self._events = bytearray(BATCH * _EVENT.size)
        self._events_at = (ctypes.c_char * len(self._events)).from_buffer(self._events)
        self._read = _Batch(_IOCB_CMD_PREAD)
        self._write = _Batch(_IOCB_CMD_PWRITE)

    def close(self) -> None:
        if self._context:
            with contextlib.suppress(OSError):
                _call(self._destroy, self._context)
            self._context = ctypes.c_ulong(0)

    def read(self, fd: int, pieces: Sequence[Piece]) -> list[int]:
        """Read each of ``pieces``; the positions of those that were not read wholly.  May wait for the disk."""
        return self._do(self._read, fd, pieces)

    def write(self, fd: int, pieces: Sequence[Piece]) -> list[int]:
        """Write each of ``pieces``, in order; the positions of those that were not written wholly."""
        return self._do(self._write, fd, pieces)

    def _do(self, batch: _Batch, fd: int, pieces: Sequence[Piece]) -> list[int]:
        batch.use(fd)
        undone: list[int] = []
        for start in range(0, len(pieces), BATCH):
            part = pieces[start : start + BATCH]
            iocbs = batch.iocbs
            at = _WHERE_AT
            for address, length, offset in part:
                _WHERE.pack_into(iocbs, at, address, length, offset)
                at += _IOCB.size
            undone += [start + position for position in self._run(batch, part)]
        return undone

    def _run(self, batch: _Batch, part: Sequence[Piece]) -> list[int]:
        done = 0
        results: dict[int, int] = {}
        with contextlib.suppress(OSError):
            done = _call(self._submit, self._context, len(part), batch.pointers)
            while len(results) < done:
                count = _call(self._getevents, self._context, 1, done - len(results), self._events_at, None)
                view = memoryview(self._events)[: count * _EVENT.size]
                results.update((index, result) for index, _, result, _ in _EVENT.iter_unpack(view))
        return [position for position, piece in enumerate(part) if results.get(position) != piece[1]]


class _Batch:
    """The requests of one kind; all that is the same from one call to the next stays."""

    def __init__(self, command: int) -> None:
        self.iocbs = bytearray(BATCH * _IOCB.size)
        self._command = command
        self._fd = -1
        self._at = (ctypes.c_char * len(self.iocbs)).from_buffer(self.iocbs)
        base = ctypes.addressof(self._at)
        self.pointers = (ctypes.c_void_p * BATCH)(*(base + index * _IOCB.size for index in range(BATCH)))

    def use(self, fd: int) -> None:
        if fd != self._fd:
            for index in range(BATCH):
                _IOCB.pack_into(self.iocbs, index * _IOCB.size, index, 0, self._command, 0, fd, 0, 0, 0, 0, 0)
            self._fd = fd


def address_of(memory: bytearray | memoryview) -> int:
    """Where writable memory begins; valid as long as it is neither freed nor resized."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
