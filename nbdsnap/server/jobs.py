"""Requests that can't be answered on the spot: each becomes a job, which replies when it is done.

==============  =============================================  ==================================
job             for                                            works on
==============  =============================================  ==================================
(reads.py)      READs that are not in memory, or long          a worker
Modify          WRITE, FLUSH                                   the engine (Device.submit)
ModifyInPieces  TRIM, WRITE_ZEROES                             the engine, a piece after the other
StatusJob       BLOCK_STATUS                                   a worker
CacheJob        CACHE                                          a worker
==============  =============================================  ==================================

A job counts on its connection from ``begin`` to ``end`` (both on the loop's thread), with the bytes it holds.  ``run``
is on another thread and never raises; ``finish`` is on the loop's, also when the connection has gone meanwhile: then it
only gives back what it holds.  Payloads belong to the job, so an engine that is still writing never sees a buffer used
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nbdsnap.engine.device import Op, OpKind
from nbdsnap.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_ENOTSUP,
    NBD_EOVERFLOW,
    NBD_EPERM,
)
from nbdsnap.nbd.replies import status_extents
from nbdsnap.nbd.transmission import DROPPED, Request, check_request, status_query
from nbdsnap.server.context import WRITE_INLINE
from nbdsnap.server.maps import HELD_PER_MAP
from nbdsnap.server.reads import start_read

if TYPE_CHECKING:
    from nbdsnap.server.datapath import DataPath

PIECE = 1 << 30
"""Bytes of a TRIM or WRITE_ZEROES that the engine gets at a time: what it keeps of one operation grows with the chunks
in it, and extended headers allow lengths of 64 bits."""

CACHE_MOST = 256 << 20
"""Bytes that one CACHE reads ahead: it is a hint, and no page cache holds a whole disk."""

STATUS_LEAST = 4096
"""Bytes that a block status of length 0 is answered for, as far as there are so many."""

_REFUSALS: Final = {
    NBD_EPERM: "the export is read-only",
    NBD_EINVAL: "invalid request",
    NBD_ENOSPC: "past the end of the export",
    NBD_EOVERFLOW: "longer than the maximum payload",
}


def start_request(path: DataPath, request: Request, data: memoryview, buffer: memoryview | None = None) -> bytes | None:
    """Validate a request and begin it; the reply where it is there already, None where a job will give it.

    A WRITE's payload is ``data[request[5]:]``.  Where it has a ``buffer`` of the pool to itself, the caller keeps that
    if there is a reply, else the job takes it.
    """
    command, flags, cookie, offset, length, position = request
    if command == NBD_CMD_DISC:
        return None
    payload = data[position : position + length] if position >= 0 else None
    contexts: tuple[tuple[int, str], ...] = ()
    effect = length
    if command == NBD_CMD_BLOCK_STATUS:
        query = status_query(flags, length, payload, path.session)
        if query is None:
            return path.replies.error(cookie, offset, NBD_EINVAL, "invalid payload")
        effect, contexts = query
    size = path.device.size
    error = check_request(command, flags, offset, effect, size, path.session.export.read_only, path.session)
    if error:
        return _refuse(path, request, error, effect, size)
    if position == DROPPED:
        return path.replies.error(cookie, offset, NBD_EINVAL, f"{length} bytes are more than a payload may have")
    if command == NBD_CMD_READ:
        return start_read(path, request)
    if command == NBD_CMD_WRITE:
        assert payload is not None
        return _start_write(path, request, payload, buffer)
    if command == NBD_CMD_BLOCK_STATUS:
        StatusJob(path, request, effect or min(STATUS_LEAST, size - offset), contexts).start()
        return None
    return _START[command](path, request)


def _refuse(path: DataPath, request: Request, error: int, length: int, size: int) -> bytes:
    """The error's reply, with a text, and with the first byte that is past the end where that is the reason."""
    _, _, cookie, offset, _, _ = request
    if error in (NBD_EINVAL, NBD_ENOSPC) and offset + length > size:
        text = f"{length} bytes at {offset} are past the end, {size}"
        is_sane = 0 < length < (1 << 64) - offset  # else clients take any offset for one outside the request
        return path.replies.error(cookie, offset, error, text, max(offset, size) if is_sane else None)
    return path.replies.error(cookie, offset, error, _REFUSALS[error])


def _start_write(path: DataPath, request: Request, payload: memoryview, buffer: memoryview | None) -> bytes | None:
    _, flags, cookie, offset, length, _ = request
    if not length:
        return path.replies.success(cookie, offset)
    fua = bool(flags & NBD_CMD_FLAG_FUA)
    if not fua and buffer is not None and length <= WRITE_INLINE and path.device.write_now(offset, payload):
        return path.replies.success(cookie, offset)
    job = Modify(path, request, length, buffer)
    job.start(Op(OpKind.WRITE, offset, length, job, bytes(payload) if buffer is None else payload, fua))
    return None


def _start_flush(path: DataPath, request: Request) -> bytes | None:
    if path.device.flush_now():
        return path.replies.success(request[2], request[3])
    job = Modify(path, request)
    job.start(Op(OpKind.FLUSH, 0, 0, job))
    return None


def _start_trim(path: DataPath, request: Request) -> bytes | None:
    _, _, cookie, offset, length, _ = request
    if not length:
        return path.replies.success(cookie, offset)
    ModifyInPieces(path, request, OpKind.TRIM).begin()
    return None


def _start_zero(path: DataPath, request: Request) -> bytes | None:
    """Keeping the range allocated need not be fast, so that is refused at once; the engine knows about the rest."""
    _, flags, cookie, offset, length, _ = request
    if not length:
        return path.replies.success(cookie, offset)
    no_hole = bool(flags & NBD_CMD_FLAG_NO_HOLE)
    if no_hole and flags & NBD_CMD_FLAG_FAST_ZERO:
        return path.replies.error(cookie, offset, NBD_ENOTSUP, "zeroing without a hole may be slow")
    ModifyInPieces(path, request, OpKind.ZERO, no_hole).begin()
    return None


def _start_cache(path: DataPath, request: Request) -> bytes | None:
    if not request[4]:
        return path.replies.success(request[2], request[3])
    CacheJob(path, request).start()
    return None


_START: Final[dict[int, Callable[[DataPath, Request], bytes | None]]] = {
    NBD_CMD_FLUSH: _start_flush,
    NBD_CMD_TRIM: _start_trim,
    NBD_CMD_WRITE_ZEROES: _start_zero,
    NBD_CMD_CACHE: _start_cache,
}


class Modify:
    """A modifying operation at the engine.  The object is the operation's ``done``."""

    __slots__ = ("buffer", "held", "path", "request")

    def __init__(self, path: DataPath, request: Request, held: int = 0, buffer: memoryview | None = None) -> None:
        self.path = path
        self.request = request
        self.held = held
        self.buffer = buffer

    def start(self, op: Op) -> None:
        self.path.begin(self.held)
        try:
            self.path.device.submit(op)
        except BaseException:
            self.path.end(self.held)
            raise

    def __call__(self, error: BaseException | None) -> None:
        """On the engine's thread: it is done."""
        self.path.context.completions.post(self.finish, error)

    def finish(self, error: BaseException | None) -> None:
        path = self.path
        if self.buffer is not None:
            path.context.buffers.give(self.buffer)
        if error is None:
            path.reply(path.replies.success(self.request[2], self.request[3]))
        else:
            path.reply(path.failure(self.request, error))
        path.end(self.held)


class ModifyInPieces:
    """A TRIM or WRITE_ZEROES, a piece after the other.  With FUA the last one's sync covers all."""

    __slots__ = ("_done", "_kind", "_no_hole", "_path", "_request")

    def __init__(self, path: DataPath, request: Request, kind: OpKind, no_hole: bool = False) -> None:
        self._path = path
        self._request = request
        self._kind = kind
        self._no_hole = no_hole
        self._done = 0

    def begin(self) -> None:
        self._path.begin(0)
        try:
            self._next()
        except BaseException:
            self._path.end(0)
            raise

    def _next(self) -> None:
        _, flags, _, offset, length, _ = self._request
        start = offset + self._done
        step = min(PIECE, length - self._done)
        self._done += step
        fua = bool(flags & NBD_CMD_FLAG_FUA) and self._done == length
        fast = bool(flags & NBD_CMD_FLAG_FAST_ZERO) and self._kind == OpKind.ZERO
        done = self._finish_piece
        self._path.device.submit(Op(self._kind, start, step, done, fua=fua, no_hole=self._no_hole, fast=fast))

    def _finish_piece(self, error: BaseException | None) -> None:
        """On the engine's thread."""
        self._path.context.completions.post(self._go_on, error)

    def _go_on(self, error: BaseException | None) -> None:
        path = self._path
        if error is None and self._done < self._request[4]:
            try:
                self._next()
                return
            except Exception as failure:
                error = failure
        if error is None:
            path.reply(path.replies.success(self._request[2], self._request[3]))
        else:
            path.reply(path.failure(self._request, error))
        path.end(0)


class WorkerJob:
    """What runs on a worker: ``work`` there, then ``finish`` on the loop."""

    __slots__ = ("held", "path", "request")

    def __init__(self, path: DataPath, request: Request, held: int) -> None:
        self.path = path
        self.request = request
        self.held = held

    def start(self) -> None:
        self.path.begin(self.held)
        self.path.context.workers.submit(self.run)

    def run(self) -> None:
        try:
            reply = self.work()
        except Exception as error:
            reply = self.path.failure(self.request, error)
        self.path.context.completions.post(self.finish, reply)

    def work(self) -> bytes:
        raise NotImplementedError

    def finish(self, reply: bytes) -> None:
        self.path.reply(reply)
        self.path.end(self.held)


class CacheJob(WorkerJob):
    __slots__ = ()

    def __init__(self, path: DataPath, request: Request) -> None:
        super().__init__(path, request, 0)

    def work(self) -> bytes:
        _, _, cookie, offset, length, _ = self.request
        self.path.device.cache(offset, min(length, CACHE_MOST))
        return self.path.replies.success(cookie, offset)


class StatusJob(WorkerJob):
    __slots__ = ("contexts", "length")

    def __init__(self, path: DataPath, request: Request, length: int, contexts: tuple[tuple[int, str], ...]) -> None:
        super().__init__(path, request, HELD_PER_MAP * len(contexts))
        self.length = length
        self.contexts = contexts

    def work(self) -> bytes:
        """One chunk for each context."""
        path = self.path
        _, flags, cookie, offset, _, _ = self.request
        if not self.contexts:
            return path.replies.read_done(cookie, offset)
        req_one, extended = bool(flags & NBD_CMD_FLAG_REQ_ONE), path.session.extended
        last = len(self.contexts) - 1
        chunks = []
        for number, (context_id, _) in enumerate(self.contexts):
            found = path.maps[context_id](offset, self.length)
            extents = status_extents(found, self.length, req_one=req_one, extended=extended)
            chunks.append(path.replies.block_status(cookie, offset, context_id, extents, done=number == last))
        return b"".join(chunks)
