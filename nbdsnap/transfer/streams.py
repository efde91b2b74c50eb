"""Byte streams as file descriptors: read and written in large pieces, and never waited for without looking up.

While a peer lets us wait, ``tick`` is called every TICK_S: it may raise, to end the transfer.  So a thread that serves
a stream can always be told to stop, however silent the peer is.  That needs writes that do not wait, on descriptors
that are shared with other processes, whose flags are not ours to change: a pipe is opened a second time, a socket is
asked per call; a regular file or a device is never waited for long.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from nbdsnap.delta.decoder import Decoder, Event
from nbdsnap.delta.format import damaged
from nbdsnap.errors import DeltaCutError

Tick = Callable[[], None]

TICK_S = 0.1
PIPE_BYTES = 1 << 20
"""What a pipe is asked to hold, where it holds less: the most that users who are not root may ask for."""

IOV_MAX = 1024
READ_SIZE = 256 << 10
"""Bytes read ahead of the decoder, while its frames are small."""


class ByteSource(Protocol):
    """Where a stream comes from.  ``received``: bytes of it so far."""

    received: int

    def read_into(self, buffer: memoryview) -> int:
        """Bytes read, at least one; 0 at the end of the stream."""


class ByteSink(Protocol):
    """Where a stream goes to."""

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """All of them, one after the other."""


def no_tick() -> None:
    pass


class Source:
    """Reads ``fd``, which stays the caller's.  ``received``: bytes."""

    def __init__(self, fd: int, tick: Tick = no_tick) -> None:
        self._fd = fd
        self._tick = tick
        self._poll = _poll(fd, select.POLLIN)
        _widen(fd)
        self._ahead = memoryview(b"")
        self.received = 0

    def read_into(self, buffer: memoryview) -> int:
        """Bytes read, at least one; 0 at the end of the stream."""
        if not self._ahead:
            if len(buffer) >= READ_SIZE:
                return self._read(buffer)
            piece = memoryview(bytearray(READ_SIZE))
            self._ahead = piece[: self._read(piece)]
        count = min(len(buffer), len(self._ahead))
        buffer[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def at_end(self) -> bool:
        """Whether nothing comes any more."""
        if not self._ahead:
            piece = memoryview(bytearray(READ_SIZE))
            self._ahead = piece[: self._read(piece)]
        return not self._ahead

    def _read(self, buffer: memoryview) -> int:
        _wait(self._poll, self._tick)
        try:
            count = os.readv(self._fd, [buffer])
        except ConnectionError as error:
            raise DeltaCutError(f"the delta stream was cut: {error.strerror}") from None
        self.received += count
        return count


def read_events(source: ByteSource) -> Iterator[Event]:
    """What a delta stream holds, up to its end, which has to be the stream's end, too."""
    decoder = Decoder()
    while not decoder.ended:
        count = source.read_into(decoder.wanted())
        if count == 0:
            decoder.close()
        event = decoder.filled(count)
        if event is not None:
            if decoder.ended and source.read_into(memoryview(bytearray(1))):
                raise damaged("it goes on after its end")
            yield event


class Sink:
    """Writes to ``fd``, which stays the caller's.  ``written``: bytes.  BrokenPipeError where nobody reads."""

    def __init__(self, fd: int, tick: Tick = no_tick) -> None:
        self._fd = fd
        self._own: int | None = None
        self._tick = tick
        self._socket: socket.socket | None = None
        self.written = 0
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            _widen(fd)
            with contextlib.suppress(OSError):  # another user's: then a write may wait
                self._own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        elif stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
        self._poll = _poll(fd, select.POLLOUT)

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        for start in range(0, len(buffers), IOV_MAX):
            left = [memoryview(one) for one in buffers[start : start + IOV_MAX] if one]
            while left:
                _wait(self._poll, self._tick)
                try:
                    count = self._write(left)
                except BlockingIOError:
                    continue
                self.written += count
                left = _after(left, count)

    def _write(self, buffers: list[memoryview]) -> int:
        if self._socket is not None:
            return self._socket.sendmsg(buffers, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.writev(self._fd if self._own is None else self._own, buffers)

    def close(self) -> None:
        """Give back what is ours."""
        if self._own is not None:
            os.close(self._own)
            self._own = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


def _poll(fd: int, events: int) -> select.poll | None:
    """None for what is never waited for."""
    if stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode):
        return None
    poll = select.poll()
    poll.register(fd, events)
    return poll


def _wait(poll: select.poll | None, tick: Tick) -> None:
    if poll is None:
        return
    while not poll.poll(TICK_S * 1000):
        tick()


def _widen(fd: int) -> None:
    """A pipe holds 64 KiB at first: a switch of processes for every bit of data."""
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        with contextlib.suppress(OSError):
            if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < PIPE_BYTES:
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
