"""The transmission phase of one connection: requests in, replies out, in batches.

A batch is what one ``recv`` brings.  All its complete requests are parsed in one loop; those that memory can answer
(reads from the page cache, in-place writes, flushes of nothing) are answered in a second one, their replies laid one
behind the other into one buffer and sent with one call.  No object, task or thread hop is made for such a request.
What has to wait becomes a job (:mod:`nbdsnap.server.jobs`), whose reply is sent when it comes, with others of the same
burst.

Invariants:

* Everything runs on the loop's thread.  ``inbound`` and ``outbound`` are shared by all connections (:class:`Context`):
  nothing that must outlive a call stays in them.  A request's payload is copied out of ``inbound`` unless it was
  written on the spot; a large one never goes through it, but into a buffer of its own.
* The stream stays in step: a request is looked at after all of it has been received.
* ``pending`` counts the jobs, ``held`` their bytes.  Past the limits nothing more is read from the client: the rest of
  a batch waits in ``_backlog``, then in the socket.  One client that does not take its replies costs the others
  nothing.
* The device is given back after the last job, and not while a batch is being served.

States: serving; ``_stalled`` (over a limit: not reading); ``finishing`` (DISC, end of stream, lost stream, or shutdown:
reads nothing more, and the connection closes when the last reply has left).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from nbdsnap.engine.device import Device
from nbdsnap.errors import CorruptionError, ProtocolError, nbd_errno
from nbdsnap.nbd.constants import (
    COMMAND_NAMES,
    EXTENDED_OFFSET_DATA_CHUNK,
    EXTENDED_REQUEST,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_READ,
    NBD_ESHUTDOWN,
    OFFSET_DATA_CHUNK,
    REQUEST,
    SIMPLE_REPLY,
)
from nbdsnap.nbd.replies import replies_for
from nbdsnap.nbd.session import Session
from nbdsnap.nbd.transmission import Request, RequestParser
from nbdsnap.server.buffers import HEADROOM
from nbdsnap.server.channel import Channel
from nbdsnap.server.context import OUTBOUND, READ_INLINE, WRITE_INLINE, Context
from nbdsnap.server.holes import HOLE_LEAST, is_zero
from nbdsnap.server.jobs import start_request
from nbdsnap.server.maps import Map, map_of
from nbdsnap.server.reads import BigRead, ColdReads

if TYPE_CHECKING:
    from nbdsnap.server.connection import Connection

log = logging.getLogger(__name__)

BODY_MIN = 16 << 10
"""Bytes: a longer write that has still not arrived whole when more of it came is received into a buffer of its own, as
is one that is too long to be written inline, at once."""

RECEIVE_MOST = 1 << 20
"""Bytes of such a payload that are received before others have their turn."""

TURN_SENDS = 2
"""Full buffers of replies sent in one turn, 1 MiB: others wait a millisecond at most, whatever a client has asked
for."""

AHEAD = 1 << 20
"""Bytes queued to a client, past which nothing more is read for it from memory: it can be had as fast as it is
taken."""

COLD_BYTES = 1 << 20
"""Bytes of cold reads that are collected before the workers get them."""

ERRORS_LOGGED_PER_S = 10
"""For each connection: a dying disk must not fill another one with its log."""


_NOTHING = memoryview(b"")


class Body:
    """A WRITE whose payload is being received into its own buffer."""

    __slots__ = ("buffer", "filled", "request", "view")

    def __init__(self, request: Request, buffer: memoryview) -> None:
        self.request = request
        self.buffer = buffer
        self.view = buffer[: request[4]]
        self.filled = 0


class DataPath:
    """One connection's transmission.  ``session.handle`` is its :class:`Device`."""

    def __init__(self, context: Context, connection: Connection, channel: Channel, session: Session[Device]) -> None:
        self.context = context
        self.connection = connection
        self.channel = channel
        self.session = session
        self.device: Device = session.handle
        self.replies = replies_for(session)
        self.maps: dict[int, Map] = {number: map_of(self.device, name) for number, name in session.contexts}
        self.pending = 0
        self.held = 0
        self.finishing = False
        self.stream: BigRead | None = None
        """A read whose data is being sent in pieces that nothing may come between."""
        self.waiting_reads: list[BigRead] = []
        """Reads in pieces whose next piece waits until the client has taken the last ones."""
        self.cold_reads = ColdReads(self)
        self._limits = context.limits
        self._parser = RequestParser(session.extended)
        self._header = EXTENDED_REQUEST if session.extended else REQUEST
        self._in_base = HEADROOM - self._header.size
        if session.extended:
            self.read_header = EXTENDED_OFFSET_DATA_CHUNK.size
        else:
            self.read_header = OFFSET_DATA_CHUNK.size if session.structured else SIMPLE_REPLY.size
        self.out_base = HEADROOM - self.read_header
        self._fresh = context.inbound[self._in_base :]
        self._tail = b""
        self._body: Body | None = None
        self._expect_body = False
        self._stalled = False
        self._refusing = False
        self._backlog: list[Request] = []
        self._backlog_data = _NOTHING
        self._outgoing: list[tuple[memoryview | bytes, memoryview | None]] = []
        self._logged_second = 0
        self._logged = 0

    # Receiving

    def start(self, leftover: bytes) -> None:
        """Begin, with what has been received behind the handshake."""
        self._take(memoryview(leftover), 0, len(leftover))
        self._go_on()

    def receive(self) -> None:
        """The socket is readable."""
        if self._body is not None:
            self._receive_body(self._body)
            return
        inbound = self.context.inbound
        base = start = self._in_base
        target = self._fresh
        if self._tail:
            start += len(self._tail)
            inbound[base:start] = self._tail
            target = inbound[start:]
        elif self._expect_body:  # only the header of another large write, whose payload then has one place
            target = target[: self._header.size]
        count = self.channel.recv_into(target)
        if count > 0:
            self._take(inbound, base, start + count)
            if self._body is not None and not self._stalled:
                self._receive_body(self._body)  # more of it is there, as a rule
            self._go_on()
        elif count == 0:
            self._end_of_stream()

    def _take(self, data: memoryview, start: int, end: int) -> None:
        """Serve the complete requests of ``data[start:end]``, and keep the rest."""
        requests: list[Request] = []
        again = bool(self._tail)
        try:
            position = self._parser.parse(data, start, end, requests)
        except ProtocolError as error:
            self.connection.log_end(str(error))
            self._tail = b""
            self._serve(requests, data)
            self.finish()
            return
        self._expect_body = False
        if requests and self._refusing:
            self._refuse(requests)
        elif requests:
            self._serve(requests, data)
        self._keep(data, position, end, BODY_MIN if again and not requests else WRITE_INLINE)

    def _keep(self, data: memoryview, position: int, end: int, body_min: int = WRITE_INLINE) -> None:
        """Keep an incomplete request: a large write gets its own buffer, if there is room for it."""
        self._tail = b""
        if position == end:
            return
        if self._parser.needed > body_min and not self._stalled and not self.finishing:
            header = self._header.size
            _, flags, command, cookie, offset, length = self._header.unpack_from(data, position)
            is_long = length > self.context.held_bytes
            if is_long and not self.context.turns.ask(self, length):
                self._stalled = True
                self._tail = bytes(data[position:end])
                return
            body = Body((command, flags, cookie, offset, length, 0), self.context.buffers.take(length))
            if is_long:
                self.context.turns.hold(body.buffer, length)
            body.filled = end - position - header
            body.view[: body.filled] = data[position + header : end]
            self._body = body
            self.held += length
        else:
            self._tail = bytes(data[position:end])

    def _receive_body(self, body: Body) -> None:
        view = body.view
        most = min(len(view), body.filled + RECEIVE_MOST)
        while body.filled < most:
            count = self.channel.recv_into(view[body.filled : most])
            if count <= 0:
                if count == 0:
                    self._end_of_stream()
                return
            body.filled += count
        if body.filled == len(view):
            self._body = None
            self._expect_body = True
            self.held -= len(view)
            self._serve_body(body)
            self._go_on()

    def _end_of_stream(self) -> None:
        """The client sends no more; it may still read.  An incomplete request is nobody's."""
        if self._tail or self._body is not None:
            self.connection.log_end("the client left in the middle of a request")
        self._tail = b""
        self.finish()

    # Serving

    def _serve(self, requests: list[Request], data: memoryview) -> None:
        """The hot loop.  It does what :func:`start_request` does, for the requests that ask for nothing special."""
        device = self.device
        read_now = device.read_now
        size = device.size
        session = self.session
        read_flags = ~session.allowed_flags[NBD_CMD_READ]
        write_flags = NBD_CMD_FLAG_PAYLOAD_LEN if session.extended else 0
        write_limit = 0 if session.export.read_only else WRITE_INLINE
        compact = not session.extended
        structured = session.structured
        hole_least = HOLE_LEAST if structured else READ_INLINE + 1
        out = self.context.outbound
        base = position = self.out_base
        header = self.read_header
        writes: list[Request] = []
        cold: list[Request] = []
        cold_bytes = 0
        sends = 0
        rest = iter(requests)
        for request in rest:
            command, flags, cookie, offset, length, payload = request
            try:
                if command == 0 and 0 < length <= READ_INLINE and not flags & read_flags and offset + length <= size:
                    begin = position + header
                    end = begin + length
                    if end > OUTBOUND:
                        self.send(out[base:position])
                        position = base
                        begin = base + header
                        end = begin + length
                        sends += 1
                        if sends == TURN_SENDS or self.channel.queued > AHEAD or self._is_full():
                            self._stall([request, *rest], data)
                            break
                    if not read_now(out[begin:end], offset):
                        cold.append(request)
                        cold_bytes += length
                        if cold_bytes < COLD_BYTES:
                            continue
                        self.cold_reads.add(cold)
                        cold, cold_bytes = [], 0
                        if self._is_full():
                            self._stall(list(rest), data)
                            break
                        continue
                    if length >= hole_least and is_zero(out[begin:end]) and not flags & NBD_CMD_FLAG_DF:
                        hole = self.replies.read_hole(cookie, offset, offset, length)
                        end = position + len(hole)
                        out[position:end] = hole
                    elif not compact:
                        EXTENDED_OFFSET_DATA_CHUNK.pack_into(
                            out, position, 0x6E8A278C, 1, 1, cookie, offset, length + 8, offset
                        )
                    elif structured:
                        OFFSET_DATA_CHUNK.pack_into(out, position, 0x668E33EF, 1, 1, cookie, length + 8, offset)
                    else:
                        SIMPLE_REPLY.pack_into(out, position, 0x67446698, 0, cookie)
                    position = end
                    continue
                if (
                    command == 1
                    and flags == write_flags
                    and 0 < length <= write_limit
                    and offset + length <= size
                    and payload >= 0
                ):
                    writes.append(request)
                    continue
                if writes:  # they came before
                    position = self._write(writes, data, position)
                    writes = []
                reply = start_request(self, request, data)
            except Exception as error:
                reply = self.failure(request, error)
            if reply is not None:
                end = position + len(reply)
                out[position:end] = reply
                position = end
                if position > OUTBOUND:
                    self.send(out[base:position])
                    position = base
            if self._is_full():
                self._stall(list(rest), data)
                break
        if writes:
            position = self._write(writes, data, position)
        if position > base:
            self.send(out[base:position])
        if cold:
            self.cold_reads.add(cold)
        if cold or writes:
            self._stalled = self._stalled or self._is_full()

    def _write(self, requests: list[Request], data: memoryview, position: int) -> int:
        """Do WRITEs of one batch together.  Lays their replies into ``outbound`` from ``position`` on; the new
        position."""
        out, base = self.context.outbound, self.out_base
        done = self.device.writes_now([(offset, data[at : at + length]) for _, _, _, offset, length, at in requests])
        simple = not self.session.extended
        for request, is_done in zip(requests, done, strict=True):
            reply: bytes | None
            if not is_done:
                try:
                    reply = start_request(self, request, data)
                except Exception as error:
                    reply = self.failure(request, error)
            elif simple:
                SIMPLE_REPLY.pack_into(out, position, 0x67446698, 0, request[2])
                position += 16
                reply = None
            else:
                reply = self.replies.success(request[2], request[3])
            if reply is not None:
                end = position + len(reply)
                out[position:end] = reply
                position = end
            if position > OUTBOUND:
                self.send(out[base:position])
                position = base
        return position

    def _serve_body(self, body: Body) -> None:
        """As :meth:`_serve`, for one WRITE with a buffer of its own."""
        try:
            reply = start_request(self, body.request, body.view, body.buffer)
        except Exception as error:
            reply = self.failure(body.request, error)
        if reply is not None:
            self.context.buffers.give(body.buffer)
            self.send(memoryview(reply))
        self._stalled = self._is_full()

    def send(self, data: memoryview) -> None:
        """Now, or behind what is held back for a stream's sake."""
        if self.stream is None:
            self.channel.send(data)
        else:
            self._outgoing.append((bytes(data), None))

    def failure(self, request: Request, error: BaseException, at: int | None = None) -> bytes:
        """The error reply of a request that raised; the log gets the whole truth.  From any thread.

        ``at``: where in the request what is wrong begins, if that is known; damage that was found says it itself.
        """
        command, _, cookie, offset, length, _ = request
        second = int(time.monotonic())
        if second != self._logged_second:
            self._logged_second, self._logged = second, 0
        self._logged += 1
        if self._logged <= ERRORS_LOGGED_PER_S:
            name = COMMAND_NAMES.get(command, str(command))
            expected = isinstance(error, OSError) or hasattr(error, "nbd_errno")
            what = f"{type(error).__name__}: {error}"
            log.log(
                logging.WARNING if expected else logging.ERROR,
                "%s: %s of %d bytes at %d failed: %s",
                *(self.connection.label, name, length, offset, what),
                exc_info=None if expected else error,
            )
        if at is None and isinstance(error, CorruptionError) and error.offset is not None:
            found = max(error.offset, offset)
            at = found if found < offset + length else None
        return self.replies.error(cookie, offset, nbd_errno(error), str(error), at)

    # Limits

    def begin(self, size: int) -> None:
        """A job starts, with ``size`` bytes."""
        self.pending += 1
        self.held += size
        self.context.poll.outstanding += 1

    def end(self, size: int) -> None:
        """It is over, and has said what it had to say."""
        self.pending -= 1
        self.held -= size
        self.context.poll.outstanding -= 1
        self.context.completions.touch(self)
        self._release_if_over()

    def reply(self, data: memoryview | bytes, buffer: memoryview | None = None) -> None:
        """A job's reply, to be sent at the end of the burst; ``buffer`` goes back to the pool when it has left."""
        self._outgoing.append((data, buffer))
        self.context.completions.touch(self)

    def _is_full(self) -> bool:
        limits = self._limits
        return (
            self.held + self.channel.queued > self.context.held_bytes
            or self.pending > limits.pending
            or self.stream is not None
            or self.channel.closed
        )

    def _stall(self, requests: list[Request], data: memoryview) -> None:
        """Leave the rest of a batch for later, and read no more until then: until something has changed, or only until
        others have had their turn."""
        self._stalled = True
        self._backlog = requests
        if data is self.context.inbound:
            has_payload = any(request[5] >= 0 for request in requests)
            data = memoryview(bytes(data)) if has_payload else _NOTHING
        self._backlog_data = data
        if self._has_room() and not self.channel.queued:
            self.context.loop.call_soon(self.connection.go_on)

    def end_of_burst(self) -> None:
        """Jobs have replied: send it all, and see whether there is room again."""
        try:
            self._send_outgoing()
            self.channel.flush()
            self.on_room()
        except Exception:
            self.connection.crash()

    def _send_outgoing(self) -> None:
        outgoing = self._outgoing
        if outgoing and self.stream is None:
            self._outgoing = []
            small: list[bytes] = []
            for data, buffer in outgoing:
                if isinstance(data, bytes):
                    small.append(data)
                    continue
                if small:
                    self.channel.queue(b"".join(small))
                    small = []
                self.channel.queue(data, buffer)
            if small:
                self.channel.queue(b"".join(small))

    def on_room(self) -> None:
        """Something was finished, or the client has taken some replies."""
        waiting, self.waiting_reads = self.waiting_reads, []
        for read in waiting:
            read.go_on()
        if self._stalled and not self.channel.closed and self._has_room():
            self._resume()
        self._go_on()

    def on_turn(self) -> None:
        """A request that is longer than this connection's share may ask again for its turn; or it steps back, while
        its client does not take its replies."""
        if self._stalled and not self._has_room():
            self.context.turns.leave(self)
        else:
            self.connection.go_on()

    @property
    def has_turn(self) -> bool:
        """Whether others may be waiting for this client to send the rest of a long request."""
        return self._body is not None and self.context.turns.is_held(self._body.buffer)

    @property
    def waits_for_turn(self) -> bool:
        return self.context.turns.is_waiting(self)

    def owed(self) -> object:
        """What is the client's to do, in a form that changes when it does some of it; None: nothing."""
        if self.channel.queued:
            return self.channel.taken, self.channel.queued
        if self._body is not None:
            return self._body.request, self._body.filled
        return len(self._tail) or None if self.channel.reading else None

    def _has_room(self) -> bool:
        """Half the limits, so that not every reply stops and starts the reading."""
        limits = self._limits
        return (
            2 * (self.held + self.channel.queued) <= self.context.held_bytes
            and 2 * self.pending <= limits.pending
            and self.stream is None
        )

    def _resume(self) -> None:
        self._stalled = False
        requests, data = self._backlog, self._backlog_data
        self._backlog, self._backlog_data = [], _NOTHING
        if requests:
            self._serve(requests, data)
        if not self._stalled and self._tail:
            self._keep(memoryview(self._tail), 0, len(self._tail))

    # The end

    def _go_on(self) -> None:
        """Read on, or stop reading, or close: after whatever may have changed which of these is due."""
        if self.finishing:
            self._close_when_done()
        elif self._parser.disconnected or (self._refusing and self._body is None and not self._stalled):
            self.finish()
        else:
            self.channel.set_reading(not self._stalled)

    def finish(self) -> None:
        """Read no more; close when everything outstanding has been answered."""
        if self.finishing:
            return
        self.finishing = True
        self.channel.set_reading(False)
        self._close_when_done()

    def _close_when_done(self) -> None:
        if self.pending or self._backlog or self._outgoing:
            return
        if self.channel.queued:
            self.connection.linger()
        else:
            self.connection.close()

    def shut_down(self) -> None:
        """Finish what is in flight, refuse what arrives from now on, then close."""
        self._refusing = True
        self._leave_turns()
        if self._body is None and not self._stalled and not self.finishing:
            self.receive()  # what the client has sent already
        self._go_on()

    def _leave_turns(self) -> None:
        """A request that waits for its turn was not begun."""
        if self.context.turns.is_waiting(self):
            self.context.turns.leave(self)
            self._stalled, self._tail = False, b""

    def _refuse(self, requests: list[Request]) -> None:
        self.send(memoryview(b"".join(self._refusal(request) for request in requests if request[0] != NBD_CMD_DISC)))

    def _refusal(self, request: Request) -> bytes:
        return self.replies.error(request[2], request[3], NBD_ESHUTDOWN, "the server is shutting down")

    def abandon(self) -> None:
        """The connection is closed: forget what was not begun.  Jobs under way end by themselves."""
        self.finishing = True
        self._leave_turns()
        self._backlog, self._tail = [], b""
        if self._body is not None:
            self.held -= len(self._body.view)
            self.context.buffers.give(self._body.buffer)
            self._body = None
        for _, buffer in self._outgoing:
            if buffer is not None:
                self.context.buffers.give(buffer)
        self._outgoing = []
        waiting, self.waiting_reads = self.waiting_reads, []
        for read in waiting:
            read.go_on()
        self._release_if_over()

    def _release_if_over(self) -> None:
        """Not at once: the device may be in use further up on the stack, by the batch whose reply could not be sent."""
        if self.channel.closed and not self.pending:
            self.context.loop.call_soon(self.connection.release)
