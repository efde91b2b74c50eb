"""The control API: the operations table over HTTP/JSON, on a unix socket of mode 0600, in the server's own event loop.

``POST /v1/OPERATION`` with the request as JSON runs a row of :mod:`nbdsnap.operations`; ``GET /v1`` describes them all.

* An operation without events is answered by its response as JSON.
* One with events is answered by lines of JSON as they come: ``{"event": …}`` any number of times, then exactly one of
  ``{"result": …}`` and ``{"error": …}``.  A stream that ends without one of these two was cut.
* An error before the first line has its own HTTP status; its body is :meth:`nbdsnap.errors.NbdsnapError.to_wire`.

The engine's calls wait for disks, so each runs on a worker thread; the loop only passes lines on.  A thread is at
most EVENTS_AHEAD lines ahead of its client, and ends (its ``emit`` raises) once the client is gone or the server stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nbdsnap import __version__
from nbdsnap.errors import InUseError, NbdsnapError, NotFoundError, ServerError, UsageError, from_exception
from nbdsnap.operations import EVENTS_AHEAD, OPERATIONS, AbandonedError, Operation, Request
from nbdsnap.server.unixsocket import bind_unix_socket, socket_inode, unlink_unix_socket

if TYPE_CHECKING:
    from nbdsnap.engine.pool import Pool

log = logging.getLogger(__name__)

CONTROL_MODE = 0o600
"""Whoever may connect may delete volumes: the server's user (and root)."""

MAX_REQUEST_BYTES = 16 << 20
"""Room for a hundred thousand snapshot names; more is a mistake, and would be held in memory."""

WORKERS = 8
"""Operations without events at once; more wait for their turn.  They are short, and the pool takes turns anyway."""

MAX_STREAMS = 16
"""Operations with events at once; more are refused, since each may last as long as its client likes."""

FLUSH_TIMEOUT_S = 2
"""Seconds that the last answers may take on their way to clients when the server stops."""

BACKLOG = 128

MEDIA_TYPE_LINES = "application/x-ndjson"


class Runner:
    """Runs operations on worker threads; knows which are under way, so that the pool is closed after the last."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._workers = ThreadPoolExecutor(WORKERS, "control")
        self._streamers = ThreadPoolExecutor(MAX_STREAMS, "control-stream")
        self._streams: set[EventStream] = set()
        self._closing = False

    async def run(self, operation: Operation[Any, Any], request: Request) -> Any:
        self._check_open()
        future = self._workers.submit(operation.run, self._pool, request, _emit_nothing)
        return await asyncio.shield(asyncio.wrap_future(future))  # a client's leaving doesn't undo what it asked for

    def stream(self, operation: Operation[Any, Any], request: Request) -> EventStream:
        self._check_open()
        if len(self._streams) >= MAX_STREAMS:
            raise InUseError(f"{MAX_STREAMS} diffs and checks run already", hint="wait for one of them to finish")
        stream = EventStream(self._pool, operation, request)
        self._streams.add(stream)
        future = self._streamers.submit(stream.run)
        asyncio.wrap_future(future).add_done_callback(lambda _: self._streams.discard(stream))
        return stream

    def _check_open(self) -> None:
        if self._closing:
            raise ServerError("the server is shutting down")

    async def close(self) -> None:
        """Refuse new operations, end those with events, wait for the others.  Nothing uses the pool afterwards."""
        self._closing = True
        for stream in self._streams:
            stream.cancel()
        await asyncio.to_thread(self._streamers.shutdown)
        await asyncio.to_thread(self._workers.shutdown)


def _emit_nothing(event: BaseModel) -> None:
    raise AssertionError(f"an operation without events emitted {event!r}")


class EventStream:
    """One operation with events: :meth:`run` on a worker thread makes lines, :meth:`next` on the loop takes them."""

    def __init__(self, pool: Pool, operation: Operation[Any, Any], request: Request) -> None:
        self._pool = pool
        self._operation = operation
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[bytes | NbdsnapError | None] = asyncio.Queue()
        self._room = threading.Semaphore(EVENTS_AHEAD)
        self._cancelled = False

    def run(self) -> None:
        try:
            result = self._operation.run(self._pool, self._request, self._emit)
            self._put(b'{"result":%b}\n' % self._operation.response_adapter.dump_json(result, by_alias=True))
        except AbandonedError:
            self._put(ServerError("the server is shutting down"))
        except Exception as error:
            self._put(report(error))
        self._put(None)

    def _emit(self, event: BaseModel) -> None:
        self._room.acquire()
        if self._cancelled:
            raise AbandonedError
        self._put(b'{"event":%b}\n' % event.model_dump_json(by_alias=True).encode())

    def _put(self, line: bytes | NbdsnapError | None) -> None:
        self._loop.call_soon_threadsafe(self._lines.put_nowait, line)

    async def next(self) -> bytes | NbdsnapError | None:
        """A line; the error that ended the operation; None after its end."""
        line = await self._lines.get()
        self._room.release()
        return line

    def cancel(self) -> None:
        """Nobody waits for it any more: its next ``emit`` raises.  Harmless when it has ended."""
        self._cancelled = True
        self._room.release()


def report(error: Exception) -> NbdsnapError:
    """What the client is told; what we did not expect is in the log with its traceback."""
    known = from_exception(error)
    if known is None:
        log.error("an operation failed unexpectedly", exc_info=error)
        return NbdsnapError(
            f"unexpected {type(error).__name__}: {error}", hint="the server's log says where; please report it"
        )
    return known


def error_response(error: NbdsnapError) -> JSONResponse:
    return JSONResponse(error.to_wire(), status_code=error.http_status)


class EventResponse(Response):
    """The lines of an :class:`EventStream`, until its end or the client's, whichever comes first."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__(media_type=MEDIA_TYPE_LINES)
        self._stream = stream
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send_all(scope, receive, send))
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            done, _ = await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._stream.cancel()
            sender.cancel()
            watcher.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = await self._stream.next()
        if isinstance(line, NbdsnapError):
            await error_response(line)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while line is not None:
            body = error_line(line) if isinstance(line, NbdsnapError) else line
            await send({"type": "http.response.body", "body": body, "more_body": True})
            line = await self._stream.next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_line(error: NbdsnapError) -> bytes:
    return b'{"error":%b}\n' % TypeAdapter(dict[str, str]).dump_json(error.to_wire())


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# The application


def build_app(pool: Pool) -> Starlette:
    """The API on ``pool``.  Its ``state.runner`` is closed by :meth:`ControlServer.stop`, before the pool."""
    app = Starlette(
        routes=[
            Route("/v1", describe, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/{operation}", run_operation, methods=["POST"]),
        ],
        exception_handlers={NbdsnapError: _on_error, 404: _on_unknown, 405: _on_unknown},
    )
    app.state.pool = pool
    app.state.runner = Runner(pool)
    return app


async def describe(_: HttpRequest) -> Response:
    operations = {
        name: {
            "summary": operation.summary,
            "request": operation.request.model_json_schema(by_alias=True),
            "event": operation.event.model_json_schema(by_alias=True) if operation.event else None,
            "response": operation.response_adapter.json_schema(by_alias=True),
        }
        for name, operation in OPERATIONS.items()
    }
    return JSONResponse({"version": __version__, "pid": os.getpid(), "operations": operations})


async def metrics(http: HttpRequest) -> Response:
    from nbdsnap.replication.metrics import render  # few ask, and its library takes long to import

    pool: Pool = http.app.state.pool
    content = await asyncio.to_thread(lambda: render(pool.replicator.status() if pool.replicator is not None else []))
    return Response(content, media_type="text/plain; version=0.0.4")


async def run_operation(http: HttpRequest) -> Response:
    operation = OPERATIONS.get(http.path_params["operation"])
    if operation is None:
        raise NotFoundError(f"no operation {http.path_params['operation']!r}", hint="GET /v1 lists them")
    try:
        request = parse_request(operation, await _body(http))
    except ClientDisconnect:
        return Response()  # to nobody
    runner: Runner = http.app.state.runner
    if operation.event is not None:
        return EventResponse(runner.stream(operation, request))
    try:
        result = await runner.run(operation, request)
    except Exception as error:
        raise report(error) from None
    return Response(operation.response_adapter.dump_json(result, by_alias=True), media_type="application/json")


async def _body(http: HttpRequest) -> bytes:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_REQUEST_BYTES:
            raise UsageError(f"the request is longer than {MAX_REQUEST_BYTES} bytes")
    return bytes(body)


def parse_request(operation: Operation[Any, Any], body: bytes) -> Request:
    """The request model of the JSON; an empty body is ``{}``."""
    try:
        request: Request = operation.request.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise UsageError(f"{operation.name}: {'; '.join(_complaints(error))}") from None
    return request


def _complaints(error: ValidationError) -> Iterator[str]:
    for one in error.errors(include_url=False, include_input=False)[:3]:
        where = ".".join(str(part) for part in one["loc"])
        yield f"{where}: {one['msg']}" if where else one["msg"]


async def _on_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, NbdsnapError)
    return error_response(error)


async def _on_unknown(http: HttpRequest, _: Exception) -> Response:
    unknown = NotFoundError(f"no {http.method} {http.url.path} here", hint="GET /v1 lists the operations")
    return error_response(unknown)


# The server


class _Uvicorn(uvicorn.Server):
    """uvicorn inside a loop that is not its own: it takes no signals, and says when it accepts connections."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        self.accepting.set()


class ControlServer:
    """Serves an app of :func:`build_app` on the unix socket ``path``, in the running loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener: socket.socket | None = None
        self._inode = (0, 0)
        self._runner: Runner | None = None
        self._server: _Uvicorn | None = None
        self._task: asyncio.Task[None] | None = None

    def bind(self) -> None:
        """Take the path.  InUseError where another process listens there, or where it is no socket."""
        self._listener = bind_unix_socket(self.path, CONTROL_MODE)
        self._inode = socket_inode(self.path)

    async def start(self, app: Starlette) -> None:
        """Accept clients; :meth:`bind` was called."""
        assert self._listener is not None
        self._listener.listen(BACKLOG)
        self._runner = app.state.runner
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
        )
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        accepting = asyncio.create_task(self._server.accepting.wait())
        await asyncio.wait((self._task, accepting), return_when=asyncio.FIRST_COMPLETED)
        if not accepting.done():
            accepting.cancel()
            await self._task  # raises why it ended

    async def stop(self) -> None:
        """End what runs, answer it, close.  Afterwards no thread of ours uses the pool.  Idempotent."""
        if self._runner is not None:
            await self._runner.close()
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
        self.close()

    def close(self) -> None:
        """Give the path back: all that is left to do where :meth:`start` was never called.  Idempotent."""
        if self._listener is not None:
            unlink_unix_socket(self.path, self._inode)
            self._listener.close()
            self._listener = None
