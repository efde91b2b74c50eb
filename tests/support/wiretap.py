"""A unix socket in front of a server, which counts what passes."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

TIMEOUT_S = 60.0


class Wiretap:
    """A context manager.  ``received``: bytes that the server has sent; ``sent``: that the client has."""

    def __init__(self, address: Path | tuple[str, int], path: Path) -> None:
        self.path = path
        self.received = 0
        self.sent = 0
        self._address = address
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(TIMEOUT_S)
        self._closing = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Wiretap:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        """What has passed is counted when this returns."""
        self._closing = True
        with socket.socket(socket.AF_UNIX) as last:  # so that accept returns
            last.connect(str(self.path))
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        self._listener.close()

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._closing:
                    return
                if isinstance(self._address, tuple):
                    server = socket.create_connection(self._address)
                else:
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(str(self._address))
                self._spawn(self._pass, client, server, "sent")
                self._spawn(self._pass, server, client, "received")

    def _pass(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, counter, getattr(self, counter) + len(data))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
