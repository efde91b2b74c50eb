"""The clients of one set of exports: admitted within the limits, looked at now and again, and seen out at the end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Sequence

from nbdsnap.addresses import Tls
from nbdsnap.nbd.negotiation import TlsMode
from nbdsnap.server.connection import Connection
from nbdsnap.server.context import Context
from nbdsnap.server.exports import ExportPool, PoolExports
from nbdsnap.server.listeners import Listener
from nbdsnap.server.peer import Peer, peer_of
from nbdsnap.server.security import Security
from nbdsnap.server.throttle import COMPLAIN_S, Throttle
from nbdsnap.server.watch import looks_s

log = logging.getLogger(__name__)


class NbdServer:
    """The clients of one set of exports, and the listeners that bring them.  For the loop's thread."""

    def __init__(self, context: Context, pool: ExportPool, security: Security | None = None) -> None:
        self._context = context
        self._security = security or Security()
        self._exports = PoolExports(pool)
        self._connections: set[Connection] = set()
        self._of_client: Counter[object] = Counter()
        self._refusals = Throttle(COMPLAIN_S)
        self._looks: asyncio.TimerHandle | None = None
        self._listeners: Sequence[Listener] = ()
        self._idle = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stopping = False

    def start(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        for listener in listeners:
            listener.start(self._context.loop, self.add_client)
        self._look_on()

    def add_client(self, sock: socket.socket, tls: Tls = "off") -> None:
        """Serve a connected socket, which is the server's from now on."""
        peer = peer_of(sock)
        refusal = self._refusal(peer)
        if refusal:
            if self._refusals.passes():
                log.warning("%s: refused: %s (and %d before)", peer, refusal, self._refusals.taken())
            sock.close()
            return
        self._of_client[peer.key] += 1
        connection = Connection(self._context, self._exports, sock, peer, self._ended, self._security, TlsMode(tls))
        self._connections.add(connection)
        self._context.share(len(self._connections))
        if connection.ended:  # it was gone before it was served
            self._ended(connection)

    def _refusal(self, peer: Peer) -> str:
        limits = self._context.limits
        if self._stopping:
            return "the server is shutting down"
        if len(self._connections) >= limits.connections:
            return f"there are {len(self._connections)} connections"
        if self._of_client[peer.key] >= limits.connections_per_client:
            return f"there are {self._of_client[peer.key]} connections of its kind"
        return ""

    def reloaded(self) -> None:
        """The rules or the limits are others: look at every client anew."""
        for connection in list(self._connections):
            connection.enforce()
        self._context.share(len(self._connections))
        self._look_on()

    def _look_on(self) -> None:
        """Look at the clients, and again after a while."""
        loop = self._context.loop
        if self._looks is not None:
            self._looks.cancel()
        for connection in list(self._connections):
            connection.look(loop.time())
        self._looks = loop.call_later(looks_s(self._context.limits), self._look_on)

    @property
    def connections(self) -> int:
        return len(self._connections)

    def _ended(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._of_client[connection.peer.key] -= 1
            if not self._of_client[connection.peer.key]:
                del self._of_client[connection.peer.key]
            self._context.share(len(self._connections))
        self._look_if_idle()

    def _look_if_idle(self) -> None:
        """Idle: nobody is in transmission.  Who still negotiates has nothing in flight."""
        if all(connection.negotiating for connection in self._connections):
            self._idle.set()

    def hurry(self) -> None:
        """Wait no longer for what is in flight."""
        self._hurry.set()

    async def stop(self) -> None:
        """The ordered end.  Afterwards no connection and no socket of ours is left."""
        self._stopping = True
        if self._looks is not None:
            self._looks.cancel()
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.shut_down()
        self._look_if_idle()
        await self._wait_until_idle(self._context.limits.shutdown_s)
        if self._connections:
            log.warning("%d connections are closed with requests in flight", len(self._connections))
        for connection in list(self._connections):
            connection.close()

    async def _wait_until_idle(self, timeout_s: float) -> None:
        idle = asyncio.create_task(self._idle.wait())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((idle, hurry), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurry.cancel()
