"""A relay between a unix socket and a TCP port: run as a program beside the server in the emulated machine, and as
threads here, so that the management API can be used from outside.

Standard library only.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def relay(listening: socket.socket, connect: Callable[[], socket.socket]) -> None:
    """Until ``listening`` is closed."""
    while True:
        try:
            client, _ = listening.accept()
        except OSError:
            return
        try:
            server = connect()
        except OSError:
            client.close()
            continue
        for one, other in ((client, server), (server, client)):
            threading.Thread(target=pump, args=(one, other), daemon=True).start()


def unix_connection(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


class UnixRelay:
    """A unix socket at ``path`` that leads to 127.0.0.1:``port``."""

    def __init__(self, path: Path, port: int) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(16)
        connect = lambda: socket.create_connection(("127.0.0.1", port), timeout=60.0)  # noqa: E731
        threading.Thread(target=relay, args=(self._listening, connect), daemon=True).start()

    def close(self) -> None:
        self._listening.close()


if __name__ == "__main__":
    tcp = socket.create_server(("0.0.0.0", int(sys.argv[1])))
    relay(tcp, lambda: unix_connection(Path(sys.argv[2])))
