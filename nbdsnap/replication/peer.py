"""The sending end's view of one target: what it has, and how to give it more."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from urllib.parse import quote, urlencode, urlsplit

from pydantic import BaseModel, ValidationError

from nbdsnap.errors import NbdsnapError, ServerError
from nbdsnap.models import ReceiveReport
from nbdsnap.operations import ErrorReport
from nbdsnap.replication.wire import PATH, ReplicaState, tune
from nbdsnap.transfer.pace import Progress, RateLimit
from nbdsnap.transfer.send import Sender
from nbdsnap.transfer.streams import TICK_S, Tick

Answer = TypeVar("Answer", bound=BaseModel)

CONNECT_S = 10.0
ANSWER_S = 3600.0
"""For a target to make what was sent durable; what keeps it alive meanwhile is TCP's own keepalive."""

WRITE_S = 120.0
MAX_ANSWER = 64 << 20


class Peer:
    """``url``: ``https://HOST:PORT[/VOLUME]``; ``volume`` is the name here, and there, where the URL has none.

    ``context`` is asked for each connection: certificates are renewed while a server runs.
    """

    def __init__(self, url: str, volume: str, context: Callable[[], ssl.SSLContext], tick: Tick) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self.url = url
        self._address = parts.hostname, parts.port
        self._path = PATH + quote(parts.path.strip("/") or volume)
        self._context = context
        self._tick = tick

    def state(self) -> ReplicaState:
        with self._connected() as connection:
            connection.request("GET", self._path)
            return self._read(connection, ReplicaState)

    def send(self, sender: Sender, limit: RateLimit, progress: Progress, keep: int) -> ReceiveReport:
        """Send it; it is a snapshot there when this returns."""
        with self._connected() as connection:
            query = urlencode({"size": sender.header.to.size, "keep": keep})
            connection.putrequest("POST", f"{self._path}?{query}")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            sink = _Chunks(connection.sock, self._tick)
            try:
                sender.send(sink, progress, limit)
                sink.finish()
            except _AnsweredError:
                pass  # it has something to say before it has got all
            except (OSError, ssl.SSLError) as error:
                with contextlib.suppress(OSError, http.client.HTTPException, NbdsnapError):
                    connection.sock.settimeout(1.0)
                    return self._read(connection, ReceiveReport)
                raise _broken(self.url, error) from None
            self._await_answer(connection)
            return self._read(connection, ReceiveReport)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        host, port = self._address
        try:
            sock = socket.create_connection((host, port), CONNECT_S)
            tune(sock)
            tls = self._context().wrap_socket(sock, server_hostname=host)
        except (OSError, ssl.SSLError) as error:
            raise _broken(self.url, error) from None
        connection = http.client.HTTPConnection(host, port)
        tls.settimeout(WRITE_S)
        connection.sock = tls
        try:
            yield connection
        except (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            raise _broken(self.url, error) from None
        finally:
            tls.close()

    def _await_answer(self, connection: http.client.HTTPConnection) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not _readable(connection.sock, TICK_S):
            self._tick()
            if time.monotonic() > deadline:
                raise ServerError(f"{self.url} does not answer")

    def _read(self, connection: http.client.HTTPConnection, model: type[Answer]) -> Answer:
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER)
        try:
            if answer.status != http.client.OK:
                raise ErrorReport.model_validate_json(body).error()
            return model.model_validate_json(body)
        except ValidationError:
            raise ServerError(f"{self.url} speaks another language", hint="is an nbdsnap listening there?") from None


class _AnsweredError(Exception):
    """The target answers although not all was sent."""


class _Chunks:
    """Writes a body in chunks, and looks whether there is an answer already."""

    def __init__(self, sock: socket.socket, tick: Tick) -> None:
        self._sock = sock
        self._tick = tick

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        length = sum(map(len, buffers))
        if not length:
            return
        self._tick()
        if _readable(self._sock, 0):
            raise _AnsweredError
        small = b"".join([b"%x\r\n" % length, *(one for one in buffers if len(one) < 4096)])
        if all(len(one) < 4096 for one in buffers):
            self._sock.sendall(small + b"\r\n")
            return
        self._sock.sendall(b"%x\r\n" % length)
        for one in buffers:
            self._sock.sendall(one)
        self._sock.sendall(b"\r\n")

    def finish(self) -> None:
        self._sock.sendall(b"0\r\n\r\n")


def _readable(sock: socket.socket, timeout_s: float) -> bool:
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    return bool(select.select([sock], [], [], timeout_s)[0])


def _broken(url: str, error: Exception) -> ServerError:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ServerError(f"{url}: {text}", hint="it is tried again")
