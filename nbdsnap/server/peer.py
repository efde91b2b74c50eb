"""Who is at the other end: what the operating system says of a socket, and later what TLS says of its user."""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

SO_PEERGROUPS = 59
"""Of a unix socket: the supplementary groups of whoever connected (unix(7), Linux 4.13)."""

GROUPS = 256
"""What Python takes of them; of a user in more groups, only the first group counts."""

_CREDENTIALS = struct.Struct("3i")


@dataclass
class Peer:
    """``key`` tells clients apart for counting: an IPv4 address, an IPv6 network of 64 bits (whoever has one address of
    it has all), a user of this machine, a virtual machine.  ``certificates`` and ``psk`` are known after TLS.
    """

    label: str
    key: object
    address: IPv4Address | IPv6Address | None = None
    uid: int | None = None
    gids: frozenset[int] = frozenset()
    cid: int | None = None
    certificates: frozenset[str] = frozenset()
    psk: str | None = None

    def __str__(self) -> str:
        return self.label


def peer_of(sock: socket.socket) -> Peer:
    with contextlib.suppress(OSError, ValueError):
        if sock.family == socket.AF_UNIX:
            return _unix_peer(sock)
        if sock.family == socket.AF_VSOCK:
            cid, port = sock.getpeername()
            return Peer(f"vsock {cid}:{port}", ("vsock", cid), cid=cid)
        return _internet_peer(*sock.getpeername()[:2])
    return Peer("a client that has left", None)


def _unix_peer(sock: socket.socket) -> Peer:
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    groups = {gid}
    with contextlib.suppress(OSError):
        packed = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * GROUPS)
        groups.update(value for (value,) in struct.iter_unpack("I", packed))
    return Peer(f"unix client, pid {pid}", ("uid", uid), uid=uid, gids=frozenset(groups))


def _internet_peer(host: str, port: int) -> Peer:
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if isinstance(address, IPv4Address):
        return Peer(f"{address}:{port}", address, address)
    return Peer(f"[{address}]:{port}", ("network", int(address) >> 64), address)
