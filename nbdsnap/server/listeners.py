"""Sockets that accept clients: TCP, unix and vsock; those of the configuration, or those that systemd passed.

An address that can't be had is one clear error, before anything is served; sockets opened until then are closed again.
A unix socket's file appears with its mode and owner and disappears at the end; see :mod:`nbdsnap.server.unixsocket` for
what happens to a file that is there already.

Whoever reaches a listener beyond this machine could read and write everything, were it not for TLS or a rule: such a
listener is refused (:func:`check_exposure`) unless the configuration says that it is meant.

Whatever goes wrong with one client, or with accepting it, costs that client: where ``accept`` fails, for want of file
descriptors or for anything else, the listener rests for RETRY_S and tries again.  It neither spins nor ends.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import logging
import os
import pwd
import socket
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

from nbdsnap.addresses import VSOCK_ANY, Address, TcpAddress, Tls, UnixAddress, VsockAddress
from nbdsnap.errors import ConfigError, InUseError, ServerError
from nbdsnap.server.throttle import COMPLAIN_S, Throttle
from nbdsnap.server.unixsocket import bind_unix_socket, socket_inode, unlink_unix_socket

log = logging.getLogger(__name__)

BACKLOG = 1024
"""Clients that connect at the same moment, before they are accepted."""

ACCEPTS = 64
"""Clients accepted before others have their turn."""

RETRY_S = 0.1
"""After an accept that failed, for want of a file descriptor as a rule: the client waits in the backlog."""

VSOCK_LOCAL = 1
"""VMADDR_CID_LOCAL (vsock(7)): reachable from this machine only."""

OnClient = Callable[[socket.socket, Tls], None]


class Listener:
    """One address.  ``uri`` is what a client connects to, with the real port; ``tls`` the mode for its clients;
    ``exposed``: other machines may reach it.

    ``inode`` is that of a unix socket's file that is ours to remove.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], uri: str, tls: Tls = "off", inode: tuple[int, int] | None = None
    ) -> None:
        self.uri = uri
        self.tls = tls
        self.exposed = not all(map(_is_local, sockets))
        self._sockets = sockets
        self._inode = inode
        self._loop: asyncio.AbstractEventLoop | None = None
        self._complaints = Throttle(COMPLAIN_S)

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
                if self._complaints.passes():
                    log.error("clients have to wait: %s (%s)", error.strerror, self.uri)
                loop.remove_reader(listening.fileno())
                loop.call_later(RETRY_S, self._go_on, loop, listening, on_client)
                return
            try:
                on_client(sock, self.tls)
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
            if self._inode is not None:
                unlink_unix_socket(Path(listening.getsockname()), self._inode)
            if self._loop is not None:
                self._loop.remove_reader(listening.fileno())
            listening.close()


def open_listeners(addresses: Sequence[Address], tls: Tls = "off", *, guarded: bool = False) -> list[Listener]:
    """Bind them all, or none.  InUseError, ServerError, ConfigError.

    ``tls``: the mode of those that have none of their own.  ``guarded``: clients from everywhere may come.
    """
    listeners: list[Listener] = []
    try:
        for address in addresses:
            opened = _open(address, address.tls or tls)
            listeners.append(opened)
        check_exposure(listeners, guarded)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def adopt_listeners(sockets: Sequence[socket.socket], tls: Tls = "off", *, guarded: bool = False) -> list[Listener]:
    """What systemd has bound already.  Their files, where they have some, are systemd's.  ConfigError."""
    listeners = [Listener([sock], _uri(sock, tls), tls) for sock in sockets]
    check_exposure(listeners, guarded)
    return listeners


def check_exposure(listeners: Iterable[Listener], guarded: bool) -> None:
    """ConfigError where clients could come from elsewhere, without proof of who they are."""
    for listener in listeners:
        if listener.exposed and not guarded and listener.tls != "required":
            raise ConfigError(
                f"{listener.uri} can be reached from other machines, and whoever reaches it could write every volume",
                hint="require TLS ([tls] mode), or say who may come ([[allow]]), or set [server] insecure = true",
            )


def _open(address: Address, tls: Tls) -> Listener:
    if isinstance(address, UnixAddress):
        return _open_unix(address, tls)
    if isinstance(address, VsockAddress):
        return _open_vsock(address, tls)
    return _open_tcp(address, tls)


def _open_unix(address: UnixAddress, tls: Tls) -> Listener:
    owner = _account(address.owner, lambda name: pwd.getpwnam(name).pw_uid, "owner")
    group = _account(address.group, lambda name: grp.getgrnam(name).gr_gid, "group")
    listening = bind_unix_socket(address.path, address.mode, owner, group)
    return Listener([listening], _uri(listening, tls), tls, socket_inode(address.path))


def _account(account: str | int | None, find: Callable[[str], int], key: str) -> int:
    """The number; -1 leaves things as they are, as for chown(2)."""
    if not isinstance(account, str):
        return -1 if account is None else account
    try:
        return find(account)
    except KeyError:
        raise ConfigError(f"[server] listen: {key}: this machine knows no {account!r}") from None


def _open_vsock(address: VsockAddress, tls: Tls) -> Listener:
    try:
        listening = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise ServerError(
            f"cannot listen on {address}: {error.strerror or error}", hint="load the kernel's vsock module"
        ) from None
    try:
        listening.bind((address.cid, address.port or VSOCK_ANY))
    except OSError as error:
        listening.close()
        raise _bind_error(address, error) from None
    return Listener([listening], _uri(listening, tls), tls)


def _open_tcp(address: TcpAddress, tls: Tls) -> Listener:
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
        raise _bind_error(address, error) from None
    host = f"[{address.host}]" if ":" in address.host else address.host
    return Listener(sockets, f"{_scheme(tls)}://{host}:{port}", tls)


def _bind_error(address: Address, error: OSError) -> InUseError | ServerError:
    if error.errno == errno.EADDRINUSE:
        return InUseError(
            f"cannot listen on {address}: the port is in use",
            hint="stop the process that has it, or name another port in the configuration",
        )
    return ServerError(f"cannot listen on {address}: {error.strerror or error}")


def _is_local(sock: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    if sock.family == socket.AF_UNIX:
        return True
    where = sock.getsockname()
    if sock.family == socket.AF_VSOCK:
        return bool(where[0] == VSOCK_LOCAL)
    return ip_address(where[0].partition("%")[0]).is_loopback


def _scheme(tls: Tls) -> str:
    return "nbds" if tls == "required" else "nbd"


def _uri(sock: socket.socket, tls: Tls = "off") -> str:
    """What a client connects to."""
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"{_scheme(tls)}+unix:///?socket={quote(os.fsdecode(where))}"
    if sock.family == socket.AF_VSOCK:
        return f"{_scheme(tls)}+vsock://{'' if where[0] == VSOCK_ANY else where[0]}:{where[1]}"
    host = f"[{where[0]}]" if ":" in where[0] else where[0]
    return f"{_scheme(tls)}://{host}:{where[1]}"
