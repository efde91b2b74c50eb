"""The servers that the table is printed for, side by side: nbdsnap and the three that everyone knows.

Each serves a sparse raw file, and a second one read-only, below a folder of its own.  After a failure it is started
again: the case may have killed it, or it may still be busy with what it was asked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from tests.conformance.report import Column, reachable, run_all
from tests.conformance.table import Case
from tests.conformance.target import Target
from tests.support.clients import client_environment
from tests.support.deadline import wait_until
from tests.support.server import Server, Volume

PATTERN = bytes(range(1, 256)) * 64
"""What the read-only export begins with."""


class Peer(ABC):
    """One server; :meth:`start` and :meth:`stop` as often as it takes."""

    name: str
    program: str

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.size = size
        self.image = _image(folder / "vol.img", size, b"")
        self.fixed = _image(folder / "fixed.img", 64 << 20, PATTERN)

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def target(self) -> tuple[str, str]:
        """The URIs of the export to write to, and of the one that can't be written."""

    def socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"


class Nbdsnap(Peer):
    name, program = "nbdsnap", str(Path(sys.executable).parent / "nbdsnap")

    def start(self) -> None:
        self.server = Server(self.folder, [Volume("vol", self.image)])
        self.server.start()
        if not (self.folder / "snapshot").exists():
            self.server.snapshot("vol@fixed")
            (self.folder / "snapshot").touch()

    def stop(self) -> None:
        self.server.kill()

    def target(self) -> tuple[str, str]:
        return self.server.uri("vol", "unix"), self.server.uri("vol@fixed", "unix")


class _Processes(Peer):
    """A process for each of the two exports."""

    def start(self) -> None:
        self.processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=client_environment(),
            )
            for command in (self.command("vol", self.image, False), self.command("fixed", self.fixed, True))
        ]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for name in ("vol", "fixed"):
            self.socket(name).unlink(missing_ok=True)

    @abstractmethod
    def command(self, name: str, image: Path, read_only: bool) -> list[str]: ...

    def target(self) -> tuple[str, str]:
        return f"nbd+unix:///vol?socket={self.socket('vol')}", f"nbd+unix:///fixed?socket={self.socket('fixed')}"


class QemuNbd(_Processes):
    name = program = "qemu-nbd"

    def command(self, name: str, image: Path, read_only: bool) -> list[str]:
        options = ["--persistent", "--shared=0", "--allocation-depth", f"--socket={self.socket(name)}"]
        return ["qemu-nbd", *options, *(["--read-only"] if read_only else []), "-x", name, "-f", "raw", str(image)]


class Nbdkit(_Processes):
    """Its exports have no names: it accepts any."""

    name = program = "nbdkit"

    def command(self, name: str, image: Path, read_only: bool) -> list[str]:
        options = ["-f", "-U", str(self.socket(name))]
        return ["nbdkit", *options, *(["-r"] if read_only else []), "file", str(image)]

    def target(self) -> tuple[str, str]:
        return f"nbd+unix:///?socket={self.socket('vol')}", f"nbd+unix:///?socket={self.socket('fixed')}"


class NbdServer(Peer):
    """It makes itself a daemon: in the foreground it would serve one client only."""

    name = program = "nbd-server"

    def start(self) -> None:
        config = self.folder / "nbd-server.conf"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        flags = "flush = true\nfua = true\ntrim = true\n"
        config.write_text(
            f"[generic]\nallowlist = true\nport = {self.port}\nlistenaddr = 127.0.0.1\n"
            f"[vol]\nexportname = {self.image}\n{flags}[fixed]\nexportname = {self.fixed}\nreadonly = true\n"
        )
        command = ["nbd-server", "-C", str(config), "-p", str(self._pid_file)]
        subprocess.run(command, check=True, env=client_environment(), capture_output=True, timeout=30)
        wait_until(lambda: bool(self._pid()), "nbd-server's pid")

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    def _pid(self) -> int:
        return int(self._pid_file.read_text() or 0) if self._pid_file.exists() else 0

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid(), signal.SIGKILL)
        self._pid_file.unlink(missing_ok=True)

    def target(self) -> tuple[str, str]:
        return f"nbd://127.0.0.1:{self.port}/vol", f"nbd://127.0.0.1:{self.port}/fixed"


PEERS: tuple[type[Peer], ...] = (Nbdsnap, QemuNbd, Nbdkit, NbdServer)


def compare(cases: Sequence[Case], size: int, timeout_s: float) -> list[Column]:
    """The outcomes of all that are installed, ours first."""
    columns = []
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        for kind in PEERS:
            if shutil.which(kind.program, path=client_environment()["PATH"]) is None:
                print(f"{kind.name} is not installed", file=sys.stderr)
                continue
            columns.append(_run(kind(Path(folder) / kind.name, size), cases, timeout_s))
            shutil.rmtree(Path(folder) / kind.name)
    return columns


def _run(peer: Peer, cases: Sequence[Case], timeout_s: float) -> Column:
    peer.start()
    try:
        target = Target(*peer.target(), timeout_s=timeout_s)
        wait_until(lambda: reachable(target), f"{peer.name} to greet")

        def revive() -> None:
            peer.stop()
            peer.start()
            target.uri, target.read_only = peer.target()
            wait_until(lambda: reachable(target), f"{peer.name} to greet again")

        return run_all(peer.name, target, cases, revive)
    finally:
        peer.stop()


def _image(path: Path, size: int, content: bytes) -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    return path
