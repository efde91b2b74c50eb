"""Bare sockets to a server, and the rude things that one can do with them."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

TIMEOUT_S = 20.0
"""Of each single send or receive: a healthy server answers in milliseconds."""


def dial(address: Path | tuple[str, int], *, receive_buffer: int | None = None) -> socket.socket:
    """A connection on which nothing has been said."""
    sock = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
    sock.settimeout(TIMEOUT_S)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(address if isinstance(address, tuple) else str(address))
    return sock


def is_closed_by_peer(sock: socket.socket) -> bool:
    """Wait for the end of the stream, discarding what still comes; False when the deadline passes first."""
    try:
        while sock.recv(1 << 20):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def reset(sock: socket.socket) -> None:
    """Close with a TCP reset, dropping whatever is under way in either direction."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
