"""The servers that are compared: how each is prepared, started and stopped.

Every run has its server to itself: prepared afresh (an empty overlay, or a new pool with a snapshot just taken),
started, measured, stopped, and its leavings removed.  All serve the same origin file, one after the other.

A peer's *role* in a cell says what it serves:

* ``Role.LIVE``: the raw file itself, written in place;
* ``Role.SNAPSHOT``: the state right after a point in time was taken, so that a first overwrite must keep the old
  content: an empty overlay for those that redirect (then the origin is the snapshot), a new snapshot for nbdsnap.

``lasting``: what was written can be seen by a later connection (nbd-server's copy-on-write forgets it).
``durable``: a FLUSH reaches the disk.  nbdkit's cow filter and nbd-server's copyonwrite keep throw-away state, and are
not crash-safe; they stand in the tables for orientation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from benchmarks import procs
from benchmarks.procs import PeerError

VOLUME = "vol"
SNAPSHOT = "bench"
COMMAND_TIMEOUT_S = 120.0


class Role(Enum):
    LIVE = "live"
    SNAPSHOT = "snapshot"


class Transport(Enum):
    UNIX = "unix"
    TCP = "tcp"


@dataclass(frozen=True)
class Place:
    """Where one run happens: the origin, a scratch folder that is empty at the start, and how clients come in.

    ``template``: a pool to begin with (nbdsnap), None for a new one.
    """

    origin: Path
    scratch: Path
    transport: Transport = Transport.UNIX
    template: Path | None = None

    @property
    def socket(self) -> Path:
        return self.scratch / "nbd.sock"


@dataclass
class Running:
    """A server that accepts clients.

    ``files``: what its data lies in, and so what the page cache must hold in a warm run.
    """

    pid: int
    uri: str
    snapshot_uri: str
    files: list[Path]
    process: subprocess.Popen[bytes] | None = None
    port: int = 0

    def stop(self) -> None:
        procs.terminate(self.pid, self.process)


class Peer(ABC):
    """One way of serving the data."""

    key: str
    """Short and stable: what --peers matches, and the column's head in the table."""
    label: str
    roles: frozenset[Role]
    programs: tuple[str, ...] = ()
    lasting = True
    durable = True
    export = ""

    def missing(self) -> list[str]:
        """The programs it needs that are not installed."""
        return [name for name in self.programs if shutil.which(name) is None]

    def start(self, place: Place) -> Running:
        """Prepare and start it; returns once it accepts clients."""
        port = procs.free_port() if place.transport is Transport.TCP else 0
        self.prepare(place)
        log = place.scratch / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(place, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "TMPDIR": str(place.scratch)},
            )
        running = Running(process.pid, "", "", self.files(place), process, port)
        self._await(running, place, log)
        running.uri = running.snapshot_uri = uri(place, port, self.export)
        return running

    def arm(self, place: Place) -> None:  # noqa: B027 (most have nothing to do)
        """Take the point in time that a snapshot cell needs; nothing to do where an overlay was made new."""

    def prepare(self, place: Place) -> None:  # noqa: B027 (most have nothing to do)
        """Make whatever the server needs to exist before it starts."""

    @abstractmethod
    def command(self, place: Place, port: int) -> list[str]:
        """The server's command line, for a server that stays in the foreground."""

    def files(self, place: Place) -> list[Path]:
        return [place.origin]

    def _await(self, running: Running, place: Place, log: Path) -> None:
        address: str | tuple[str, int] = ("127.0.0.1", running.port) if running.port else str(place.socket)

        def ready() -> bool:
            if running.process is not None and running.process.poll() is not None:
                words = procs.last_words(log.read_text(errors="replace"))
                raise PeerError(f"{self.key} ended at once: {words}")
            return procs.accepts(address)

        try:
            procs.wait_until(ready, f"{self.key} to accept clients", procs.START_TIMEOUT_S)
        except PeerError:
            running.stop()
            raise


def uri(place: Place, port: int, export: str) -> str:
    return f"nbd://127.0.0.1:{port}/{export}" if port else f"nbd+unix:///{export}?socket={place.socket}"


class Nbdkit(Peer):
    """nbdkit's file plugin, bare or below its cow filter (whose overlay is a temporary file)."""

    programs = ("nbdkit",)

    def __init__(self, cow: bool) -> None:
        self.cow = cow
        self.key = "nbdkit-cow" if cow else "nbdkit"
        self.label = "nbdkit, cow filter" if cow else "nbdkit, file plugin"
        self.roles = frozenset({Role.SNAPSHOT if cow else Role.LIVE})
        self.durable = not cow

    def command(self, place: Place, port: int) -> list[str]:
        listen = ["-i", "127.0.0.1", "-p", str(port)] if port else ["-U", str(place.socket)]
        filters = ["--filter=cow"] if self.cow else []
        return ["nbdkit", "-f", *listen, *filters, "file", str(place.origin)]


class QemuNbd(Peer):
    """qemu-nbd on the raw file, or on a new qcow2 overlay of it."""

    programs = ("qemu-nbd", "qemu-img")

    def __init__(self, key: str, label: str, aio: str, overlay: str | None = None) -> None:
        """``overlay``: the options of the overlay's creation; None to serve the raw file."""
        self.key = key
        self.label = label
        self.aio = aio
        self.overlay = overlay
        self.roles = frozenset({Role.LIVE if overlay is None else Role.SNAPSHOT})

    def prepare(self, place: Place) -> None:
        if self.overlay is None:
            return
        options = ["-o", self.overlay] if self.overlay else []
        base = ["-F", "raw", "-b", str(place.origin), str(self._image(place))]
        procs.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, *base], COMMAND_TIMEOUT_S)

    def command(self, place: Place, port: int) -> list[str]:
        listen = ["-b", "127.0.0.1", "-p", str(port)] if port else ["-k", str(place.socket)]
        image = ["-f", "raw" if self.overlay is None else "qcow2", str(self._image(place))]
        return ["qemu-nbd", "-t", "-e", "1024", "--cache=writeback", f"--aio={self.aio}", *listen, *image]

    def files(self, place: Place) -> list[Path]:
        return [place.origin] if self.overlay is None else [place.origin, self._image(place)]

    def _image(self, place: Place) -> Path:
        return place.origin if self.overlay is None else place.scratch / "overlay.qcow2"


class NbdServer(Peer):
    """The reference server: a process per connection.

    It runs as a daemon, because in the foreground it serves one connection only; the pid file tells who it is.
    """

    programs = ("nbd-server",)
    export = VOLUME

    def __init__(self, cow: bool) -> None:
        self.cow = cow
        self.key = "nbd-srv-cow" if cow else "nbd-server"
        self.label = "nbd-server, copyonwrite" if cow else "nbd-server, raw"
        self.roles = frozenset({Role.SNAPSHOT if cow else Role.LIVE})
        self.durable = self.lasting = not cow

    def start(self, place: Place) -> Running:
        port = procs.free_port() if place.transport is Transport.TCP else 0
        procs.run(self.command(place, port), COMMAND_TIMEOUT_S)
        pid_file = self._pid_file(place)
        procs.wait_until(lambda: pid_file.exists() and bool(pid_file.read_text().strip()), "its pid file", 10.0)
        running = Running(int(pid_file.read_text()), "", "", self.files(place), None, port)
        self._await(running, place, pid_file)
        running.uri = running.snapshot_uri = uri(place, port, self.export)
        return running

    def command(self, place: Place, port: int) -> list[str]:
        config = place.scratch / "nbd-server.conf"
        listen = f"port = {port}\nlistenaddr = 127.0.0.1" if port else f"unixsock = {place.socket}"
        copy = f"copyonwrite = true\ncowdir = {place.scratch}\n" if self.cow else ""
        flags = "flush = true\nfua = true\ntrim = true"
        config.write_text(f"[generic]\n{listen}\n[{VOLUME}]\nexportname = {place.origin}\n{flags}\n{copy}")
        return ["nbd-server", "-C", str(config), "-p", str(self._pid_file(place))]

    def _pid_file(self, place: Place) -> Path:
        return place.scratch / "nbd-server.pid"


class Nbdsnap(Peer):
    """nbdsnap itself: the installed console script, as a user runs it.

    ``snapshots``: how many the volume has in a snapshot cell, the one taken right before the run included.
    """

    roles = frozenset({Role.LIVE, Role.SNAPSHOT})
    export = VOLUME
    program = Path(sys.executable).parent / "nbdsnap"

    def __init__(self, snapshots: int = 1, key: str = "nbdsnap") -> None:
        self.snapshots = snapshots
        self.key = key
        self.label = "nbdsnap" if snapshots == 1 else f"nbdsnap, {snapshots} snapshots"

    def missing(self) -> list[str]:
        return [] if self.program.exists() else [str(self.program)]

    def prepare(self, place: Place) -> None:
        if place.template is not None:
            procs.run(["cp", "--archive", "--sparse=always", place.template, pool(place)], COMMAND_TIMEOUT_S)

    def command(self, place: Place, port: int) -> list[str]:
        listen = f"tcp://127.0.0.1:{port}" if port else f"unix://{place.socket}"
        self.config(place).write_text(
            f'[server]\nlisten = ["{listen}"]\ncontrol = "{place.scratch / "control.sock"}"\n'
            f'[pool]\npath = "{pool(place)}"\n'
            f'[[volume]]\nname = "{VOLUME}"\norigin = "{place.origin}"\n'
        )
        return [str(self.program), "serve", "--config", str(self.config(place))]

    def start(self, place: Place) -> Running:
        running = super().start(place)
        running.snapshot_uri = uri(place, running.port, f"{VOLUME}@{SNAPSHOT}")
        return running

    def arm(self, place: Place) -> None:
        self.cli(place, "snapshot", "create", f"{VOLUME}@{SNAPSHOT}")

    def cli(self, place: Place, *words: str) -> str:
        """Standard output of a management command against the running server."""
        return procs.run([self.program, "--config", self.config(place), *words], COMMAND_TIMEOUT_S)

    def config(self, place: Place) -> Path:
        return place.scratch / "nbdsnap.toml"

    def files(self, place: Place) -> list[Path]:
        """The origin and the pool's block data; LMDB's index is mapped, and stays in memory as it is."""
        found = [place.origin]
        if pool(place).is_dir():
            found += [path for path in sorted(pool(place).iterdir()) if path.suffix == ".data"]
        return found


def pool(place: Place) -> Path:
    return place.scratch / "pool"


def all_peers(snapshots: int = 1) -> list[Peer]:
    """Every contender, ours first.  ``snapshots``: how many nbdsnap has in snapshot cells."""
    return [
        Nbdsnap(snapshots),
        Nbdkit(cow=False),
        QemuNbd("qemu", "qemu-nbd, raw, aio threads", "threads"),
        QemuNbd("qemu-uring", "qemu-nbd, raw, io_uring", "io_uring"),
        NbdServer(cow=False),
        Nbdkit(cow=True),
        QemuNbd("qcow2", "qemu-nbd, qcow2 overlay, defaults", "threads", overlay=""),
        QemuNbd("qcow2-ext", "qemu-nbd, qcow2 overlay, extended L2, io_uring", "io_uring", overlay="extended_l2=on"),
        NbdServer(cow=True),
    ]
