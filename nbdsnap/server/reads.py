"""READs that are not answered from memory on the spot: cold ones, long ones, and those in pieces.

Three ways, by length:

* up to ``READ_INLINE``: :class:`ColdReads`.  The failed attempt to read without waiting (RWF_NOWAIT) has already told
  the kernel to fetch the pages.  A disk that answers in a fraction of a millisecond is looked at again and again by the
  busy-poll, which costs less than handing the read to a thread and back (55 us until it is there, measured, against 96
  us in a blocking read alone).  For a slower one, a worker waits: one for each connection, who goes on as long as there
  are reads, and tells the kernel of all of them before waiting for the first.
* longer ones: a :class:`BigRead`, in pieces of ``READ_PIECE``, and without the holes;
* where the reply has to be in one piece, up to ``READ_WHOLE``: a :class:`ReadJob` for any worker.

What turns out to be zeroes is not sent, where the reply can say so (:mod:`nbdsnap.server.holes`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nbdsnap.engine.device import Device
from nbdsnap.errors import CorruptionError
from nbdsnap.nbd.constants import NBD_CMD_FLAG_DF, NBD_MAX_STRING, PREFERRED_BLOCK
from nbdsnap.nbd.replies import MAX_HOLE
from nbdsnap.nbd.transmission import Request
from nbdsnap.server.buffers import HEADROOM
from nbdsnap.server.context import OUTBOUND, READ_INLINE
from nbdsnap.server.holes import HOLE_LEAST, is_zero, pieces

if TYPE_CHECKING:
    from nbdsnap.server.datapath import DataPath

READ_PIECE = 1 << 20
"""Bytes of one piece of a long read: two of them at a time keep a worker and the socket busy."""

READ_WHOLE = 8 << 20
"""Bytes that are read as a whole before the reply begins where it can't be taken back once it has begun (simple
replies, and DF): an error in its midst is then an error reply.  In a longer one it ends the connection, or follows the
data."""

READ_AHEAD = 2 * READ_PIECE
"""Bytes queued to the client, past which the next piece waits."""

ERROR_ROOM = NBD_MAX_STRING + HEADROOM
"""What a reply may need in place of data."""


PATIENCE_S = 500e-6
"""How long the busy-poll looks for the next read that is due: several times what an SSD takes, a tenth of a hard
disk."""

MOST_SKIPPED = 64
"""Batches that go to a worker at once after a disk was too slow again and again."""

JOB_READS = 64
"""Reads of one job: their replies share a buffer."""


def start_read(path: DataPath, request: Request) -> bytes | None:
    """Begin a READ of a valid range; the reply where it is empty."""
    _, flags, cookie, offset, length, _ = request
    if not length:
        return path.replies.read_done(cookie, offset)
    whole = not path.session.structured or bool(flags & NBD_CMD_FLAG_DF)
    if length <= READ_INLINE:
        path.cold_reads.add([request])  # a READ with a flag, then, which needs no haste
    elif whole and length <= min(READ_WHOLE, max(READ_PIECE, path.context.held_bytes // 2)):
        job = ReadJob(path, [request])
        path.context.workers.submit(job.run)
    else:
        BigRead(path, request, contiguous=whole).start()
    return None


def _as_hole(path: DataPath, request: Request, data: memoryview) -> bytes | None:
    """The reply to a READ of ``data``, if it is zeroes that need not be sent."""
    _, flags, cookie, offset, length, _ = request
    if length < HOLE_LEAST or not path.session.structured or flags & NBD_CMD_FLAG_DF or not is_zero(data):
        return None
    return path.replies.read_hole(cookie, offset, offset, length)


class ReadJob:
    """READs whose replies are laid one behind the other into one buffer.

    They are handed over as they come: always before the disk is waited for, and at the end.
    """

    __slots__ = ("_buffer", "_held", "_path", "_requests", "announced")

    def __init__(self, path: DataPath, requests: Sequence[Request]) -> None:
        self._path = path
        self._requests = requests
        self._held = HEADROOM + sum(max(request[4], ERROR_ROOM) + HEADROOM for request in requests)
        self._buffer = path.context.buffers.take(self._held)
        self.announced = False
        path.begin(self._held)

    def announce(self, device: Device) -> None:
        """Have the kernel begin to read."""
        self.announced = True
        for _, _, _, offset, length, _ in self._requests:
            try:
                device.cache(offset, length)
            except Exception:
                return  # the read itself will tell

    def run(self, others: deque[ReadJob] | None = None) -> None:
        """On a worker.  ``others`` come after this one, and are announced before anything is waited for."""
        path = self._path
        device = path.device
        buffer = self._buffer
        sent = position = HEADROOM - path.read_header
        for request in self._requests:
            if path.channel.closed:
                break
            _, _, cookie, offset, length, _ = request
            data = position + path.read_header
            view = buffer[data : data + length]
            try:
                if not device.read_now(view, offset):
                    if position > sent:
                        path.context.completions.post(self._hand_over, buffer[sent:position])
                        sent = position
                    self._announce_all(device, others)
                    device.read(view, offset)
                hole = _as_hole(path, request, view)
                if hole is None:
                    reply = path.replies.read_data(cookie, offset, offset, length)
                    position = data + length
                else:
                    reply = hole
                    data = position = position + len(hole)
            except Exception as error:
                reply = path.failure(request, error)
                data = position + len(reply)
                position = data
            buffer[data - len(reply) : data] = reply
        path.context.completions.post(self._finish, buffer[sent:position])

    def _announce_all(self, device: Device, others: deque[ReadJob] | None) -> None:
        if not self.announced and len(self._requests) > 1:
            self.announce(device)
        for job in list(others or ()):  # in one step: the loop's thread appends
            if not job.announced:
                job.announce(device)

    def _hand_over(self, replies: memoryview) -> None:
        self._path.reply(replies)

    def _finish(self, replies: memoryview) -> None:
        self._path.reply(replies, self._buffer)
        self._path.end(self._held)


class ColdReads:
    """One connection's cold reads: looked for by the busy-poll first, then given to a worker."""

    def __init__(self, path: DataPath) -> None:
        self._path = path
        self._due: deque[Request] = deque()
        """What the busy-poll looks for, in the order that the disk was asked."""
        self._since = 0.0
        """When the first of these became the first."""
        self._looked_for = False
        self._in_vain = 0
        self._skip = 0
        self._jobs: deque[ReadJob] = deque()
        self._running = False

    def add(self, requests: Sequence[Request]) -> None:
        """Reads that ``read_now`` has just refused."""
        if self._skip or self._jobs or self._path.context.poll.outstanding:
            self._skip = max(0, self._skip - 1)
            self._hand_to_worker(requests)
            return
        if not self._due:
            self._since = time.monotonic()
        if not self._looked_for:
            self._looked_for = True
            self._path.context.poll.expect(self)
        self._path.pending += len(requests)
        self._due.extend(requests)

    # The busy-poll's

    def look(self) -> bool:
        path = self._path
        if path.channel.closed:
            self.give_up()
            return False
        out = path.context.outbound
        base = position = path.out_base
        before = len(self._due)
        while self._due and position + HEADROOM + self._due[0][4] <= OUTBOUND:
            reply_end = self._try(self._due[0], out, position)
            if reply_end == position:
                break
            self._due.popleft()
            position = reply_end
        if position > base:
            path.send(out[base:position])
            path.pending -= before - len(self._due)
            self._since = time.monotonic()
            self._in_vain = 0
            path.connection.go_on()
        elif time.monotonic() - self._since > PATIENCE_S:
            self._in_vain = min(2 * self._in_vain + 1, MOST_SKIPPED)
            self._skip = self._in_vain
            self.give_up()
        self._looked_for = bool(self._due)
        return self._looked_for

    def _try(self, request: Request, out: memoryview, position: int) -> int:
        """Put the reply at ``position`` of ``out``; where it ends, or ``position`` if it can't be given yet."""
        path = self._path
        _, _, cookie, offset, length, _ = request
        begin = position + path.read_header
        end = begin + length
        try:
            if not path.device.read_now(out[begin:end], offset):
                return position
            hole = _as_hole(path, request, out[begin:end])
            if hole is not None:
                end = position + len(hole)
                out[position:end] = hole
                return end
            out[position:begin] = path.replies.read_data(cookie, offset, offset, length)
        except Exception as error:
            reply = path.failure(request, error)
            end = position + len(reply)
            out[position:end] = reply
        return end

    def give_up(self) -> None:
        """What has not come by now is a worker's."""
        self._looked_for = False
        due = list(self._due)
        self._due.clear()
        for first in range(0, len(due), JOB_READS):
            self._hand_to_worker(due[first : first + JOB_READS])
        self._path.pending -= len(due)

    # The worker's

    def _hand_to_worker(self, requests: Sequence[Request]) -> None:
        self._jobs.append(ReadJob(self._path, requests))
        if not self._running:
            self._running = True
            self._path.context.workers.submit(self._run)

    def _run(self) -> None:
        """On a worker.  What is added after its last look is seen by the loop's thread, which wakes another."""
        while self._jobs:
            self._jobs.popleft().run(self._jobs)
        self._path.context.completions.post(self._pause, None)

    def _pause(self, _: None) -> None:
        if self._jobs:
            self._path.context.workers.submit(self._run)
        else:
            self._running = False


class BigRead:
    """A READ in pieces, so that a long one needs neither as much memory as it is long nor the client to wait for its
    end.

    With structured replies each piece is a chunk of its own, and so is each hole, which is not even read; other replies
    may come between.  Where the reply has to be one piece (``contiguous``: simple replies, and DF), its header says so
    at once, and the connection's other replies wait until it is over.  An error then comes too late for an error reply:
    with DF the rest is zeroes and an error chunk follows, as the protocol has it; a simple reply can't be told from
    data, so the connection ends.
    """

    def __init__(self, path: DataPath, request: Request, *, contiguous: bool) -> None:
        self._path = path
        self._request = request
        self._contiguous = contiguous
        self._done = 0
        self._room = 0
        """Bytes that the next piece may have in the buffer."""
        self._piece = 0
        """Bytes that it has; the worker says."""
        self._hole = False
        """Whether it is one."""
        self._pieces: deque[tuple[int, bool]] | None = None
        """What lies ahead, as of :func:`nbdsnap.server.holes.pieces`; None before that was asked."""
        self._buffer = memoryview(b"")
        self._failed: bytes | None = None
        """The error chunk that ends the reply."""

    def start(self) -> None:
        if self._contiguous:
            self._path.stream = self
        self._path.begin(0)
        self._next()

    def _next(self) -> None:
        unaligned = (self._request[3] + self._done) % PREFERRED_BLOCK  # only of the first piece
        self._room = min(READ_PIECE - unaligned, self._request[4] - self._done)
        self._buffer = self._path.context.buffers.take(HEADROOM + self._room)
        self._path.held += self._room
        self._path.context.workers.submit(self._run)

    def _run(self) -> None:
        failure: Exception | None = None
        self._piece = self._room
        if self._failed is not None:
            self._buffer[HEADROOM : HEADROOM + self._piece] = bytes(self._piece)
        elif not self._path.channel.closed:
            try:
                self._read()
            except Exception as error:
                failure = error
        self._path.context.completions.post(self._finish_piece, failure)

    def _read(self) -> None:
        """The next piece, into the buffer if it is no hole."""
        device = self._path.device
        offset = self._request[3] + self._done
        if not self._contiguous:
            if self._pieces is None:
                self._pieces = deque(pieces(device, offset, self._request[4] - self._done))
            length, self._hole = self._pieces.popleft()
            self._piece = min(length, MAX_HOLE if self._hole else self._room)
            if self._piece < length:
                self._pieces.appendleft((length - self._piece, self._hole))
            if self._hole:
                return
        view = self._buffer[HEADROOM : HEADROOM + self._piece]
        device.read(view, offset)
        self._hole = not self._contiguous and self._piece >= HOLE_LEAST and is_zero(view)

    def _finish_piece(self, failure: Exception | None) -> None:
        path = self._path
        path.held -= self._room
        if path.channel.closed:
            path.context.buffers.give(self._buffer)
            self._end()
            return
        if failure is not None and not self._survives(failure):
            path.context.buffers.give(self._buffer)
            self._end()
            return
        header = self._piece_header()
        if self._hole:
            path.context.buffers.give(self._buffer)
            self._send(header, None)
        else:
            start = HEADROOM - len(header)
            self._buffer[start:HEADROOM] = header
            self._send(self._buffer[start : HEADROOM + self._piece], self._buffer)
        self._done += self._piece
        if self._done == self._request[4]:
            self._end_reply()
        else:
            path.waiting_reads.append(self)
            path.context.completions.touch(path)

    def _piece_header(self) -> bytes:
        _, _, cookie, offset, length, _ = self._request
        replies = self._path.replies
        if not self._contiguous:
            last = self._done + self._piece == length
            make = replies.read_hole if self._hole else replies.read_data
            return make(cookie, offset, offset + self._done, self._piece, done=last)
        if self._done:
            return b""
        return replies.read_data(cookie, offset, offset, length, done=not self._path.session.structured)

    def _survives(self, failure: Exception) -> bool:
        """Whether the reply goes on after a failed piece."""
        path = self._path
        at = self._request[3] + self._done  # what came before is good
        if not self._contiguous and isinstance(failure, CorruptionError) and failure.offset is not None:
            at = max(at, failure.offset)
        error = path.failure(self._request, failure, at)
        if not self._contiguous or not self._done:
            self._send(error, None)
            return False
        if not path.session.structured:
            path.connection.lost("a read failed in the middle of its reply")
            return False
        self._failed = error
        self._buffer[HEADROOM : HEADROOM + self._piece] = bytes(self._piece)
        return True

    def _send(self, data: memoryview | bytes, buffer: memoryview | None) -> None:
        """A stream's own pieces pass by what is held back for its sake."""
        if self._contiguous:
            self._path.channel.queue(data, buffer)
        else:
            self._path.reply(data, buffer)

    def _end_reply(self) -> None:
        """With DF, the chunk of data was not marked done, so that an error could follow."""
        if self._contiguous and self._path.session.structured:
            _, _, cookie, offset, _, _ = self._request
            self._send(self._failed or self._path.replies.read_done(cookie, offset), None)
        self._end()

    def go_on(self) -> None:
        """The client has taken something, or gone."""
        path = self._path
        if path.channel.closed:
            self._end()
        elif path.channel.queued < min(READ_AHEAD, path.context.held_bytes // 2):
            self._next()
        else:
            path.waiting_reads.append(self)

    def _end(self) -> None:
        if self._contiguous:
            self._path.stream = None
        self._path.end(0)
