"""Measures one served pool, for :mod:`benchmarks.scale`: what management and data cost there, in seconds and bytes.

Everything is asked of a real server: data over NBD, management over its control socket (without the command line's
start).  Each management operation meets the same change in every pool: CHANGE chunks overwritten between snapshots.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import ParamSpec, TypeVar

from benchmarks import procs
from benchmarks.peers import VOLUME, Nbdsnap, Place, Running, pool, uri
from benchmarks.pipeline import Pipeline, Schedule, connect
from benchmarks.seedpool import CHUNK, snapshot_name
from nbdsnap import operations
from nbdsnap.client import RemoteClient
from nbdsnap.operations import DiffRange, Nothing, RollbackTo, SnapshotCreate, SnapshotDelete, SnapshotList, VolumeShow

P = ParamSpec("P")
T = TypeVar("T")

CHANGE = 1000
LOGGED = 12_000
"""First overwrites right before the kill: three quarters of the intent log, all to be replayed."""

REPEATS = 7
"""Snapshots taken, filled and deleted again; the costs are the medians."""

DEPTH = 64
READ_SECONDS = 1.0
READ_OFFSETS = 50_000
CONNECTIONS = 64
IDLE_SECONDS = 3.0
SEED = 11


@dataclass
class Costs:
    """What was measured; times in seconds, memory in bytes, rates in requests per second."""

    start_s: float = 0.0
    killed_start_s: float = 0.0
    memory: int = 0
    resident: int = 0
    create_s: float = 0.0
    delete_s: float = 0.0
    delete_newest_s: float = 0.0
    diff_s: float = 0.0
    rollback_s: float = 0.0
    status_s: float = 0.0
    list_s: float = 0.0
    show_s: float = 0.0
    first_overwrites: float = 0.0
    read_oldest: float = 0.0
    read_newest: float = 0.0
    memory_64: int = 0
    memory_many: int = 0
    idle_cpu_s: float = 0.0
    index_bytes: int = 0
    store_bytes: int = 0
    problems: list[str] = field(default_factory=list)


class Probe:
    """One pool on its own server; ``scratch`` holds the pool already."""

    def __init__(self, scratch: Path, origin: Path, snapshots: int, connections: int) -> None:
        self.peer = Nbdsnap()
        self.place = Place(origin, scratch)
        self.snapshots = snapshots
        self.connections = connections
        self.costs = Costs()
        self._rng = random.Random(SEED)

    def measure(self) -> Costs:
        costs = self.costs
        begin = time.perf_counter()
        running = self.peer.start(self.place)
        costs.start_s = time.perf_counter() - begin
        try:
            costs.memory = procs.memory_bytes(running.pid)
            costs.resident = procs.resident_bytes(running.pid)
            with RemoteClient(self.place.scratch / "control.sock") as client:
                self._ask(client)
                self._change(client)
            costs.read_oldest = self._read(snapshot_name(0))
            costs.read_newest = self._read(snapshot_name(self.snapshots - 1))
            self._hold_connections(running)
            self._kill(running)
        finally:
            running.stop()
        self._sizes()
        return costs

    def _kill(self, running: Running) -> None:
        """The time of a start after a kill under load, with as much to replay as can be had; and a stop in order."""
        names = [f"{VOLUME}@killed"]
        with RemoteClient(self.place.scratch / "control.sock") as client:
            client.call(operations.SNAPSHOT_CREATE, SnapshotCreate(names=names))
        self._overwrite(LOGGED)
        os.kill(running.pid, signal.SIGKILL)
        running.stop()
        begin = time.perf_counter()
        again = self.peer.start(self.place)
        self.costs.killed_start_s = time.perf_counter() - begin
        with RemoteClient(self.place.scratch / "control.sock") as client:
            client.call(operations.SNAPSHOT_DELETE, SnapshotDelete(names=names))
        again.stop()

    def _ask(self, client: RemoteClient) -> None:
        costs = self.costs
        costs.status_s, _ = timed(client.call, operations.STATUS, Nothing())
        costs.list_s, listed = timed(client.call, operations.SNAPSHOT_LIST, SnapshotList(volume=VOLUME))
        costs.show_s, _ = timed(client.call, operations.VOLUME_SHOW, VolumeShow(name=VOLUME))
        if len(listed) != self.snapshots:
            costs.problems.append(f"{len(listed)} snapshots are listed, {self.snapshots} were taken")

    def _change(self, client: RemoteClient) -> None:
        """Take snapshots with CHANGE chunks overwritten after each, diff them, delete them: the newest one last."""
        costs = self.costs
        names = [f"{VOLUME}@probe{number}" for number in range(REPEATS)]
        creates, rates, diffs = [], [], []
        for name in names:
            creates.append(timed(client.call, operations.SNAPSHOT_CREATE, SnapshotCreate(names=[name]))[0])
            rates.append(self._overwrite())
        for older, newer in pairwise(names):
            seconds, changed = timed(_diff, client, older, newer)
            diffs.append(seconds)
            if changed != CHANGE * CHUNK:
                costs.problems.append(f"diff {older} {newer} is {changed} bytes, {CHANGE * CHUNK} were changed")
        rollback = RollbackTo(name=f"{VOLUME}@undo")
        client.call(operations.SNAPSHOT_CREATE, SnapshotCreate(names=[rollback.name]))
        rollbacks = [timed(client.call, operations.ROLLBACK, rollback)[0] for _ in names]
        client.call(operations.SNAPSHOT_DELETE, SnapshotDelete(names=[rollback.name]))
        costs.rollback_s = median(rollbacks)
        deletes = [timed(client.call, operations.SNAPSHOT_DELETE, SnapshotDelete(names=[name]))[0] for name in names]
        costs.create_s, costs.diff_s = median(creates), median(diffs)
        costs.delete_s, costs.delete_newest_s = median(deletes[:-1]), deletes[-1]
        costs.first_overwrites = median(rates)

    def _overwrite(self, chunks: int = CHANGE) -> float:
        """Overwrite random chunks of the live volume: writes per second."""
        sock, size = connect(self._uri(VOLUME))
        with sock:
            offsets = [chunk * CHUNK for chunk in self._rng.sample(range(size // CHUNK), chunks)]
            pipeline = Pipeline(sock, Schedule(offsets, once=True), write=True, block=CHUNK, depth=DEPTH)
            return chunks / pipeline.run(procs.START_TIMEOUT_S)

    def _read(self, name: str) -> float:
        """Random reads of a snapshot: reads per second."""
        sock, size = connect(self._uri(f"{VOLUME}@{name}"))
        with sock:
            offsets = [self._rng.randrange(size // CHUNK) * CHUNK for _ in range(READ_OFFSETS)]
            schedule = Schedule(offsets, once=False)
            seconds = Pipeline(sock, schedule, write=False, block=CHUNK, depth=DEPTH).run(READ_SECONDS)
            return schedule.sent / seconds

    def _hold_connections(self, running: Running) -> None:
        """Memory with CONNECTIONS and with all connections open, each of which has been used; and the idle server's CPU
        time."""
        costs = self.costs
        with ExitStack() as stack:
            for _ in range(CONNECTIONS):
                self._used_connection(stack)
            costs.memory_64 = procs.memory_bytes(running.pid)
            before = procs.settled_cpu_seconds(running.pid)
            time.sleep(IDLE_SECONDS)
            costs.idle_cpu_s = procs.cpu_seconds(running.pid) - before
            for _ in range(self.connections - CONNECTIONS):
                self._used_connection(stack)
            costs.memory_many = procs.memory_bytes(running.pid)

    def _used_connection(self, stack: ExitStack) -> None:
        sock, _size = connect(self._uri(VOLUME))
        stack.enter_context(sock)
        Pipeline(sock, Schedule([0] * DEPTH, once=True), write=False, block=CHUNK, depth=DEPTH).run(1.0)

    def _sizes(self) -> None:
        """What the pool takes on disk, once the server has stopped."""
        folder = pool(self.place)
        self.costs.index_bytes = sum(path.stat().st_blocks * 512 for path in folder.glob("*.mdb"))
        self.costs.store_bytes = sum(path.stat().st_blocks * 512 for path in folder.glob("*.data"))

    def _uri(self, export: str) -> str:
        return uri(self.place, 0, export)


def timed(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> tuple[float, T]:
    """The seconds that a call took, and its result."""
    begin = time.perf_counter()
    result = function(*arguments, **keywords)
    return time.perf_counter() - begin, result


def _diff(client: RemoteClient, older: str, newer: str) -> int:
    request = DiffRange.model_validate({"from": older, "to": newer})
    return client.call(operations.DIFF, request, lambda _event: None).bytes
