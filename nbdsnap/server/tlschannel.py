"""A :class:`~nbdsnap.server.channel.Channel` under TLS: the same face, with the records made and read in memory.

What is sent is encrypted at once, in slices, and queued as records; the socket, the queue and the watching are
the plain channel's.  What is received comes from the socket in large pieces, whatever the size of its records, and
waits in memory until it is asked for.

Measured against a socket of the ssl module's, which asks the kernel twice for each record: 64 requests in records of
their own and 64 answers of 4 KiB cost 175 us of CPU against 245; one at a time, 8.8 against 7.5.

Invariants:

* nothing received before the channel was made is here: the TLS engine sees only what arrived behind NBD_OPT_STARTTLS's
  answer;
* while ``reading`` is on and something received is still to be read, a turn of the loop is scheduled for it: the
  socket says nothing about it;
* the memory that it holds is bounded: ``scratch``'s size and a record of what was received, besides what is queued.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable

from nbdsnap.server.channel import Channel

SLICE = 64 << 10
"""Bytes encrypted at a time: four records, which are still in the processor's cache when the kernel copies them."""

UNASKED = 64 << 10
"""Bytes of answers to the protocol's own messages (key updates) queued to a peer that takes nothing: it is dropped."""

TURNS = 4
"""Looks at what was received already, before others have their turn."""


class TlsChannel(Channel):
    """The server's side.  :meth:`handshake` until it says True, then like any channel."""

    def secure(self, context: ssl.SSLContext, scratch: memoryview) -> None:
        """To be called once, before anything else.  ``scratch``, whose size is taken from the socket at a
        time, is shared by all on this loop."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._scratch = scratch
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._established = False
        self._more = False
        self._ended = False
        self._scheduled = False
        self._unasked = 0

    # The handshake

    def handshake(self) -> bool:
        """Go on with it; whether it is over.  Raises ssl.SSLError where it failed; its alert has been sent, then."""
        self._fill()
        try:
            if not self.closed:
                self.tls.do_handshake()
                self._established = True
                self._more = True  # as far as anyone knows
        except ssl.SSLWantReadError:
            pass
        finally:
            self._send_records()
        return self._established

    # Receiving

    def recv_into(self, buffer: memoryview) -> int:
        """As the plain one.  It fills the buffer, where that much has arrived."""
        drained = False
        if not self._more:  # then there is nothing to read but what the socket has
            received = self._fill()
            if received < 0:
                return -1
            drained = received < len(self._scratch)
        try:
            filled = self._read(buffer, drained)
        except OSError as error:
            self._lose(error)
            return -1
        if self._outgoing.pending:
            self._send_unasked()
        if self.closed:
            return -1
        if self._more and filled:
            self._schedule()
        return filled or (0 if self._ended else -1)

    def _read(self, buffer: memoryview, drained: bool) -> int:
        """Decrypt into ``buffer`` what there is, and leave word in ``_more`` and ``_ended`` of what is behind it.

        An exception costs more than reading a request: so nothing is read where nothing can be.
        """
        read: Callable[[int, memoryview], int] = self.tls.read  # type: ignore[assignment]
        incoming = self._incoming
        most = len(buffer)
        filled = 0
        while filled < most:
            try:
                count = read(most - filled, buffer[filled:])
            except ssl.SSLWantReadError:
                if drained or self.closed:
                    self._more = False
                    return filled
                drained = self._fill() < len(self._scratch)
                continue
            except ssl.SSLEOFError:
                count = 0
            if not count:
                self._more = self._ended = True  # which is still to be told, where something came before it
                return filled
            filled += count
            if drained and not incoming.pending and filled < most:
                self._more = False
                return filled
        self._more = bool(incoming.pending or self.tls.pending())
        return filled

    def _fill(self) -> int:
        """Take what the socket has; the number of bytes."""
        count = super().recv_into(self._scratch)
        if count > 0:
            self._incoming.write(self._scratch[:count])
        elif count == 0:
            self._incoming.write_eof()
        return count

    def set_reading(self, on: bool) -> None:
        super().set_reading(on)
        if on and self._more:
            self._schedule()

    def _loop_readable(self) -> None:
        self._on_readable()
        self._read_on()
        self._poll.spin()

    def _polled(self, events: int) -> None:
        super()._polled(events)
        self._read_on()

    def _read_on(self) -> None:
        for _ in range(TURNS):
            if not self._more or not self.reading or self.closed:
                return
            self._on_readable()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._on_schedule)

    def _on_schedule(self) -> None:
        self._scheduled = False
        if self._more and self.reading and not self.closed:
            self._on_readable()

    # Sending

    def send(self, data: memoryview) -> None:
        if self.closed:
            return
        if self._queue or len(data) > SLICE:
            self._encrypt(data)
            if not self._writing:
                self.flush()
            return
        try:
            sent = self.tls.write(data)
            while sent < len(data):
                sent += self.tls.write(data[sent:])
        except OSError as error:
            self._lose(error)
            return
        super().send(memoryview(self._outgoing.read()))

    def queue(self, data: memoryview | bytes, buffer: memoryview | None = None) -> None:
        if data and not self.closed:
            self._encrypt(data)
        self._give(buffer)

    def _encrypt(self, data: memoryview | bytes) -> None:
        write = self.tls.write
        try:
            for start in range(0, len(data), SLICE):
                piece = memoryview(data)[start : start + SLICE]
                while piece:
                    piece = piece[write(piece) :]
                self._push(self._outgoing.read(), None)
        except OSError as error:
            self._lose(error)

    def _send_records(self) -> None:
        """What the TLS engine itself has to say."""
        if not self.closed and self._outgoing.pending:
            self._push(self._outgoing.read(), None)
            if not self._writing:
                self.flush()

    def _send_unasked(self) -> None:
        self._unasked = self._unasked + self._outgoing.pending if self._writing else 0
        if self._unasked > UNASKED:
            self._lose(OSError("the client takes no answers to what it asks of TLS"))
        else:
            self._send_records()

    # The end

    def close(self) -> None:
        """Tell the peer, if it can be told at once: else it might take an attacker's cut for the end."""
        if self._established and not self.closed and not self._queue:
            self._established = False
            with contextlib.suppress(OSError):
                self.tls.unwrap()
            with contextlib.suppress(OSError):
                self._sock.send(self._outgoing.read())
        super().close()
