"""A non-blocking stream socket: what arrives goes into the caller's buffer; what the peer does not take yet is queued.

Everything happens on the loop's thread.  The socket is used directly (``recv_into``, ``send``, ``sendmsg``), with no
stream or protocol object in between.  Under TLS it is a :class:`~nbdsnap.server.tlschannel.TlsChannel`.

Invariants:

* the event loop and the busy-poll watch for reading exactly while ``reading`` is on, for writing exactly while
  something is queued;
* bytes leave in the order of ``send`` and ``queue``;
* after ``lost`` was called, or ``close``, nothing is sent, and every buffer that was queued has been given back.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice

from nbdsnap.server.buffers import BufferPool
from nbdsnap.server.busypoll import READABLE, WRITABLE, BusyPoll

BLOCKED = (BlockingIOError, InterruptedError)

UNIX_SEND_BUFFER = 512 << 10
"""Bytes asked for of a unix socket's send buffer (the kernel's default is 208 KiB, its most 4 MiB; TCP's grows by
itself): room for a batch of 64 replies of 4 KiB, so that such a batch is one send."""

GATHERED = 64
"""Pieces that one ``sendmsg`` takes."""

Piece = tuple[memoryview | bytes, memoryview | None]
"""Bytes to send, and the pool's buffer that they lie in, if it is to be given back."""


class Channel:
    """``queued``: bytes waiting for the peer; ``taken``: those that it has taken after a wait.  ``closed``: it is of no
    more use."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        poll: BusyPoll,
        buffers: BufferPool,
        on_readable: Callable[[], None],
        on_drained: Callable[[], None],
        on_lost: Callable[[OSError], None],
    ) -> None:
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER)
        self.queued = 0
        self.taken = 0
        self.closed = False
        self.reading = False
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = loop
        self._poll = poll
        self._buffers = buffers
        self._on_readable = on_readable
        self._on_drained = on_drained
        self._on_lost = on_lost
        self._queue: deque[Piece] = deque()
        self._writing = False

    # Watching

    def set_reading(self, on: bool) -> None:
        if on == self.reading or self.closed:
            return
        self.reading = on
        if on:
            self._loop.add_reader(self._fd, self._loop_readable)
        else:
            self._loop.remove_reader(self._fd)
        self._watch()

    def _set_writing(self, on: bool) -> None:
        if on == self._writing or self.closed:
            return
        self._writing = on
        if on:
            self._loop.add_writer(self._fd, self._loop_writable)
        else:
            self._loop.remove_writer(self._fd)
        self._watch()

    def _watch(self) -> None:
        events = (READABLE if self.reading else 0) | (WRITABLE if self._writing else 0)
        self._poll.watch(self._fd, events, self._polled)

    def _loop_readable(self) -> None:
        self._on_readable()
        self._poll.spin()

    def _loop_writable(self) -> None:
        self.flush()
        self._poll.spin()

    def _polled(self, events: int) -> None:
        """From the busy-poll.  A hang-up or an error shows when the socket is used."""
        if self._writing and events & ~READABLE:
            self.flush()
        if self.reading and events & ~WRITABLE:
            self._on_readable()

    # Receiving

    def recv_into(self, buffer: memoryview) -> int:
        """The number of bytes received; 0: the peer sends no more; -1: nothing now (or never again: see ``closed``)."""
        try:
            return self._sock.recv_into(buffer)
        except BLOCKED:
            return -1
        except OSError as error:
            self._lose(error)
            return -1

    # Sending

    def send(self, data: memoryview) -> None:
        """Send ``data``, which lies in a buffer that is used again at once: what does not leave now is copied."""
        if self.closed:
            return
        if self._queue:
            self._push(bytes(data), None)
            return
        try:
            sent = self._sock.send(data)
        except BLOCKED:
            sent = 0
        except OSError as error:
            self._lose(error)
            return
        if sent < len(data):
            self._push(bytes(data[sent:]), None)
            self._set_writing(True)

    def queue(self, data: memoryview | bytes, buffer: memoryview | None = None) -> None:
        """Append ``data``, which nobody changes any more, for the next ``flush``; then ``buffer`` goes back to the
        pool."""
        if self.closed or not data:
            self._give(buffer)
        else:
            self._push(data, buffer)

    def _push(self, data: memoryview | bytes, buffer: memoryview | None) -> None:
        self._queue.append((data, buffer))
        self.queued += len(data)

    def flush(self) -> None:
        """Send what is queued, as far as the peer takes it; tell the owner when it has taken some that had to wait."""
        waited = self._writing
        while self._queue and not self.closed:
            try:
                sent = self._send_queued()
            except BLOCKED:
                break
            except OSError as error:
                self._lose(error)
                return
            self._take_off(sent)
        self._set_writing(bool(self._queue))
        if waited and not self.closed:
            self._on_drained()

    def _send_queued(self) -> int:
        if len(self._queue) > 1:
            return self._sock.sendmsg([data for data, _ in islice(self._queue, GATHERED)])
        return self._sock.send(self._queue[0][0])

    def _take_off(self, sent: int) -> None:
        self.queued -= sent
        self.taken += sent
        queue = self._queue
        while sent:
            data, buffer = queue.popleft()
            if sent < len(data):
                queue.appendleft((memoryview(data)[sent:], buffer))
                return
            sent -= len(data)
            self._give(buffer)

    def _give(self, buffer: memoryview | None) -> None:
        if buffer is not None:
            self._buffers.give(buffer)

    # The end

    def _lose(self, error: OSError) -> None:
        self.close()
        self._on_lost(error)

    def close(self) -> None:
        """Close the socket; what is queued is lost.  Idempotent."""
        if not self.closed:
            self.detach().close()

    def detach(self) -> socket.socket:
        """Give the socket away, open; the channel is closed."""
        self.set_reading(False)
        self._set_writing(False)
        self.closed = True
        for _, buffer in self._queue:
            self._give(buffer)
        self._queue.clear()
        self.queued = 0
        return self._sock
