"""The data path in a thread of this process, on raw files as a rule: real sockets, a real event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from nbdsnap.addresses import Tls
from nbdsnap.server.context import Context, Limits
from nbdsnap.server.exports import ExportPool
from nbdsnap.server.listeners import Listener
from nbdsnap.server.nbdserver import NbdServer
from nbdsnap.server.security import Security
from tests.support.client import Client

T = TypeVar("T")

TIMEOUT_S = 30.0


class ServerThread:
    """``server`` and ``context`` are the loop's own: use them through :meth:`call`."""

    def __init__(
        self,
        pool: ExportPool,
        limits: Limits | None = None,
        listeners: Sequence[Listener] = (),
        security: Security | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._pool = pool
        self._listeners = listeners
        self._security = security
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop
        self.context: Context
        self.server: NbdServer
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main()), name="server")
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.context = Context(self.loop, self._limits)
        self.server = NbdServer(self.context, self._pool, self._security)
        self.server.start(self._listeners)
        self._started.set()
        await self._stop.wait()
        await self.server.stop()
        await asyncio.to_thread(self.context.close)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call on the loop's thread."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self.loop.call_soon_threadsafe(run)
        return future.result(TIMEOUT_S)

    def connect(self, tls: Tls = "off") -> socket.socket:
        """A new client's end of a unix socket pair."""
        ours, theirs = socket.socketpair()
        self.call(self.server.add_client, theirs, tls)
        return ours

    def client(self, export: str = "vol", dialect: str = "structured", *contexts: str) -> Client:
        """In transmission.  ``dialect``: simple, structured, extended."""
        client = Client(self.connect())
        if dialect != "simple":
            getattr(client, dialect)()
        if contexts:
            client.set_contexts(export, *contexts)
        return client.go(export)

    def connections(self) -> int:
        return self.call(lambda: self.server.connections)

    def begin_stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.begin_stop()
            self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the server did not stop"
