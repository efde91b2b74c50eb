"""Sockets that accept clients: TCP and unix.

An address that can't be had is one clear error, before anything is served; sockets opened until then are closed again.
A unix socket's file appears with its mode and disappears at the end; see :mod:`nbdsnap.server.unixsocket` for what
happens to a file that is there already.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from nbdsnap.config import Address, TcpAddress, UnixAddress
from nbdsnap.errors import InUseError, ServerError
from nbdsnap.server.unixsocket import bind_unix_socket, socket_inode, unlink_unix_socket

log = logging.getLogger(__name__)

BACKLOG = 1024
"""Clients that connect at the same moment, before they are accepted."""

ACCEPTS = 64
"""Clients accepted before others have their turn."""

UNIX_MODE = 0o660
"""Of a unix socket: its owner and group may connect."""

RETRY_S = 0.1
"""After an accept for which there was no file descriptor left: the client waits in the backlog."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

OnClient = Callable[[socket.socket, str], None]


class Listener:
    """One address.  ``uri`` is what a client connects to, with the real port."""

    def __init__(self, sockets: Sequence[socket.socket], uri: str, inode: tuple[int, int] = (0, 0)) -> None:
        self.uri = uri
        self._sockets = sockets
        self._inode = inode
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop, on_client: OnClient) -> None:
        self._loop = loop
        for listening in self._sockets:
            listening.listen(BACKLOG)
            listening.setblocking(False)
            loop.add_reader(listening.fileno(), self._accept, loop, listening, on_client)

    def _accept(self, loop: asyncio.AbstractEventLoop, listening: socket.socket, on_client: OnClient) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    log.error("clients have to wait: %s", error.strerror)
                    loop.remove_reader(listening.fileno())
                    loop.call_later(RETRY_S, self._go_on, loop, listening, on_client)
                else:
                    log.error("accepting on %s failed: %s", self.uri, error)
                return
            try:
                on_client(sock, _label(sock))
            except Exception:
                log.exception("a client could not be served")
                sock.close()

    def _go_on(self, loop: asyncio.AbstractEventLoop, listening: socket.socket, on_client: OnClient) -> None:
        if listening.fileno() >= 0:
            loop.add_reader(listening.fileno(), self._accept, loop, listening, on_client)

    def close(self) -> None:
        """Accept no more, and remove the socket's file.  Idempotent."""
        for listening in self._sockets:
            if listening.fileno() < 0:
                continue
            if listening.family == socket.AF_UNIX:
                unlink_unix_socket(Path(listening.getsockname()), self._inode)
            if self._loop is not None:
                self._loop.remove_reader(listening.fileno())
            listening.close()


def open_listeners(addresses: Sequence[Address]) -> list[Listener]:
    """Bind them all, or none.  InUseError, ServerError."""
    listeners: list[Listener] = []
    try:
        for address in addresses:
            opened = _open_unix(address) if isinstance(address, UnixAddress) else _open_tcp(address)
            listeners.append(opened)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _open_unix(address: UnixAddress) -> Listener:
    listening = bind_unix_socket(address.path, UNIX_MODE)
    return Listener([listening], f"nbd+unix:///?socket={quote(str(address.path))}", socket_inode(address.path))


def _open_tcp(address: TcpAddress) -> Listener:
    """Every address that the host's name has.  With port 0, the first one's choice is all the others'."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServerError(f"cannot listen on {address}: {error.strerror or error}") from None
    sockets: list[socket.socket] = []
    port = address.port
    try:
        for family, _, _, _, where in dict.fromkeys(found):
            listening = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((where[0], port, *where[2:]))
            port = listening.getsockname()[1]
    except OSError as error:
        for listening in sockets:
            listening.close()
        if error.errno == errno.EADDRINUSE:
            raise InUseError(
                f"cannot listen on {address}: the port is in use",
                hint="stop the process that has it, or name another port in the configuration",
            ) from None
        raise ServerError(f"cannot listen on {address}: {error.strerror or error}") from None
    host = f"[{address.host}]" if ":" in address.host else address.host
    return Listener(sockets, f"nbd://{host}:{port}")


def _label(sock: socket.socket) -> str:
    """The client, for the log: its address, or the process at the other end of a unix socket."""
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return f"unix client, pid {struct.unpack('3i', credentials)[0]}"
        host, port = sock.getpeername()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "a client that has left"
