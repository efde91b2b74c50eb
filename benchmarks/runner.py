"""Runs cells: rounds over contenders, one run at a time, each on a server of its own.

A run: a clean scratch folder; prepare and start the server; in a snapshot cell take the point in time; the untimed
pass where the cell has one; bring the files into the page cache as the cell says; read the server's CPU time; run the
client; wait until the server is quiet and read its CPU time again; stop it; remove the folder.  What fails is recorded
as failed, and the other contenders go on.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import clients, pagecache, procs
from benchmarks.cells import KIB, Cell
from benchmarks.clients import Client, Limits, Load, Outcome
from benchmarks.peers import Nbdsnap, Peer, Place, Role, Running
from benchmarks.procs import PeerError
from benchmarks.stats import rotated

FIRST_SEED = 4242
"""Round n uses FIRST_SEED + n for all contenders: equal work within a round, other blocks in the next one."""

BEFORE_TIMEOUT_S = 300.0
SEED_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Run:
    """One contender's measurement in one round of one cell; ``error`` instead of numbers where it failed."""

    cell: str
    contender: str
    round: int
    outcome: Outcome | None = None
    cpu_s: float = 0.0
    memory_bytes: int = 0
    error: str | None = None

    @property
    def iops(self) -> float:
        return self.outcome.operations / self.outcome.seconds if self.outcome else 0.0

    @property
    def mib_s(self) -> float:
        return self.outcome.bytes / self.outcome.seconds / (1 << 20) if self.outcome else 0.0

    @property
    def cpu_us(self) -> float:
        """The server's CPU time per request."""
        return self.cpu_s / self.outcome.operations * 1e6 if self.outcome and self.outcome.operations else 0.0

    def speed(self, unit: str) -> float:
        return self.mib_s if unit == "MiB/s" else self.iops

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Run:
        outcome = data["outcome"]
        return Run(**{**data, "outcome": None if outcome is None else Outcome(**outcome)})


@dataclass(frozen=True)
class Settings:
    """``folder``: where data, scratch and pools go; its file system is part of what is measured."""

    folder: Path
    size: int
    rounds: int
    seconds: float

    @property
    def origin(self) -> Path:
        return self.folder / f"origin-{self.size >> 20}m.img"


class Runner:
    """Runs one cell after the other.  A context manager: what it keeps between cells is removed at the end."""

    def __init__(self, settings: Settings, peers: Sequence[Peer]) -> None:
        self.settings = settings
        self.peers = list(peers)
        self._templates: dict[int, Path] = {}

    def __enter__(self) -> Runner:
        pagecache.ensure_data(self.settings.origin, self.settings.size)
        return self

    def __exit__(self, *_exception: object) -> None:
        for template in self._templates.values():
            shutil.rmtree(template.parent, ignore_errors=True)

    def contenders(self, cell: Cell) -> list[Peer]:
        """Who takes part in a cell; in one with snapshot counts nbdsnap runs against itself."""
        if cell.snapshot_counts:
            ours = [peer for peer in self.peers if peer.key == "nbdsnap"]
            return [*ours, *(Nbdsnap(count, f"nbdsnap-{count}") for count in cell.snapshot_counts if ours)]
        return [peer for peer in self.peers if cell.role in peer.roles and (peer.lasting or not cell.before)]

    def run_cell(self, cell: Cell) -> Iterator[Run]:
        """All rounds of a cell; each run as soon as it is done."""
        contenders = self.contenders(cell)
        for number in range(self.settings.rounds):
            for index in rotated(len(contenders), number):
                yield self.run_one(cell, contenders[index], number)

    def run_one(self, cell: Cell, peer: Peer, number: int) -> Run:
        try:
            with self._scratch(peer.key) as scratch:
                place = Place(self.settings.origin, scratch, cell.transport, self._template(cell, peer))
                return self._measure(cell, peer, place, number)
        except (PeerError, OSError, ValueError, KeyError) as error:
            return Run(cell.name, peer.key, number, error=str(error) or type(error).__name__)

    def _measure(self, cell: Cell, peer: Peer, place: Place, number: int) -> Run:
        limits = self._limits(cell, number)
        running = peer.start(place)
        try:
            if cell.role is Role.SNAPSHOT:
                peer.arm(place)
            if cell.before:
                self._overwrite(cell, running, limits, place.scratch)
            pagecache.fill(peer.files(place), cell.filling)
            uri = running.snapshot_uri if cell.read_snapshot else running.uri
            cpu_before = procs.settled_cpu_seconds(running.pid)
            outcome = clients.measure(uri, cell.load, limits, place.scratch)
            cpu_s = procs.settled_cpu_seconds(running.pid) - cpu_before
            memory = procs.memory_bytes(running.pid)
        finally:
            running.stop()
        return Run(cell.name, peer.key, number, outcome, cpu_s, memory)

    def _limits(self, cell: Cell, number: int) -> Limits:
        region = min(cell.region or self.settings.size, self.settings.size)
        return Limits(region, self.settings.seconds, FIRST_SEED + number)

    @staticmethod
    def _overwrite(cell: Cell, running: Running, limits: Limits, scratch: Path) -> None:
        """The untimed pass over the live volume: blocks of 4 KiB in random order, flushed at its end."""
        load = Load("randwrite", 4 * KIB, 64, Client.FIO, once=True)
        amount = Limits(limits.region, BEFORE_TIMEOUT_S, limits.seed, end_flush=True, share=cell.before)
        clients.measure(running.uri, load, amount, scratch)

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        scratch = self.settings.folder / f"run-{name}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _template(self, cell: Cell, peer: Peer) -> Path | None:
        """A pool whose volume has snapshots already, for the cells that ask for many; made once for each count.

        All contenders of such a cell start from one, that with a single snapshot too: only the count differs.
        """
        if not isinstance(peer, Nbdsnap) or cell.role is not Role.SNAPSHOT:
            return None
        if peer.snapshots == 1 and not cell.snapshot_counts:
            return None
        count = peer.snapshots - 1
        if count not in self._templates:
            pool = self.settings.folder / f"template-{count}" / "pool"
            shutil.rmtree(pool.parent, ignore_errors=True)
            pool.parent.mkdir(parents=True)
            self._templates[count] = pool
            seed_pool(pool, self.settings.origin, count)
        return self._templates[count]


def seed_pool(pool: Path, origin: Path, snapshots: int) -> None:
    """Make a pool with a volume on ``origin`` and ``snapshots`` snapshots, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.seedpool", str(pool), str(origin), "--snapshots", str(snapshots)]
    procs.run(command, SEED_TIMEOUT_S)
