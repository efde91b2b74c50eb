"""Servers that replicate to each other, with certificates, and a network between them that can be cut."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from nbdsnap.models import ReplicationStatus
from nbdsnap.operations import REPLICATE_RUN, REPLICATE_STATUS
from tests.support.server import NBDSNAP, Server, Volume

MIB = 1 << 20
SIZE = 32 * MIB


def make_certificates(folder: Path, *names: str) -> Path:
    """An authority, a server on 127.0.0.1 and clients of those names."""
    words = [word for name in names for word in ("--client", name)]
    subprocess.run([NBDSNAP, "tls", "make-ca", folder, "--host", "127.0.0.1", *words], check=True, capture_output=True)
    return folder


def section(certificates: Path, name: str, *, port: int | None = None) -> str:
    listen = "" if port is None else f'listen = "tcp://127.0.0.1:{port}"\n'
    return (
        f"[replication]\n{listen}"
        f'certificate = "{certificates}/server/server-cert.pem"\nkey = "{certificates}/server/server-key.pem"\n'
        f'ca = "{certificates}/ca-cert.pem"\n'
        f'client_certificate = "{certificates}/{name}/client-cert.pem"\n'
        f'client_key = "{certificates}/{name}/client-key.pem"\n'
    )


def replicate(port: int, *, every: str = "1h", keys: str = "", volume: str = "vol") -> str:
    target = f"https://127.0.0.1:{port}"
    return f'[[replicate]]\nvolume = "{volume}"\ntarget = "{target}"\nevery = "{every}"\n{keys}\n'


def accept(name: str, *, create: bool = True, volumes: str = "vol") -> str:
    return f'[[accept]]\ncertificate = ["{name}"]\nvolumes = ["{volumes}"]\ncreate = {str(create).lower()}\n'


def node(folder: Path, sections: str, *, volume: bool = False, size: int = SIZE) -> Server:
    volumes: Sequence[Volume] = [Volume("vol", folder / "vol.img", size)] if volume else []
    return Server(folder, volumes, sections=sections)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def run(server: Server) -> ReplicationStatus:
    """One cycle, now."""
    (status,) = server.manage(REPLICATE_RUN, volume="vol", wait=True)
    return status


def status(server: Server) -> ReplicationStatus:
    (found,) = server.manage(REPLICATE_STATUS)
    return found


def write(server: Server, pattern: int, offset: int, length: int, volume: str = "vol") -> None:
    command = f"write -P {pattern} {offset} {length}"
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", command, server.uri(volume, "unix")], check=True, stdout=subprocess.DEVNULL
    )


def compare(one: Server, other: Server, *names: str) -> None:
    for name in names:
        uris = [server.uri(name, "unix") for server in (one, other)]
        done = subprocess.run(
            ["qemu-img", "compare", "-f", "raw", "-F", "raw", *uris], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


def names(server: Server, volume: str = "vol") -> list[str]:
    return [one["name"] for one in server.json("snapshot", "list", volume)]


class Network:
    """A TCP relay to ``port``: what connects to :attr:`port` gets there, as long as it is not cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.is_cut = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break what is connected, and refuse what wants to be, until :meth:`mend`."""
        with self._lock:
            self.is_cut = True
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                if self.is_cut:
                    sock.close()
                    continue
                try:
                    other = socket.create_connection(("127.0.0.1", self._target), 5)
                except OSError:
                    sock.close()
                    continue
                with self._lock:
                    self._open |= {sock, other}
                for pair in ((sock, other), (other, sock)):
                    threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        if self.is_cut:
            with self._lock:
                self._open -= {source, target}
            source.close()
            target.close()
