"""The workloads, as data: what ``python -m benchmarks --list`` shows and ``--cells`` chooses from.

A cell's name is ``GROUP/WHAT``, with ``+random`` where the page cache was filled under POSIX_FADV_RANDOM (without it:
by a plain read; see pagecache.py).  The groups:

========  ==============================================================================================
live      no snapshot anywhere: the raw file, read and written in place
fresh     right after a snapshot, first overwrites only: each 4 KiB block is written at most once
second    the same blocks once more
snapread  the snapshot is read, after half of its chunks have been overwritten (peers: the overlay is read)
conns     four connections at once
flat      first overwrites again, with more and more snapshots (nbdsnap against itself)
tcp       over TCP on the loopback interface
cold      nothing in the page cache
========  ==============================================================================================

Targets say what nbdsnap is held to: its speed over the named contender's, as the median over the rounds.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.clients import Client, Load
from benchmarks.pagecache import Filling
from benchmarks.peers import Role, Transport

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """What the median ratio (our speed over the peer's) must reach, or must not pass."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)

    def __str__(self) -> str:
        return f">={self.at_least:g}" if self.at_least is not None else f"<={self.at_most:g}"


@dataclass(frozen=True)
class Cell:
    """One workload.

    ``region``: bytes from the export's start that it stays in; None for the whole volume.
    ``before``: how much of the region is overwritten, block by block in random order, before the timed run.
    ``read_snapshot``: the timed run reads the snapshot, not the live volume.
    ``snapshot_counts``: nbdsnap also runs with so many snapshots.
    ``unit``: what speed is given in: "IOPS" or "MiB/s".
    """

    name: str
    role: Role
    load: Load
    filling: Filling = Filling.PLAIN
    transport: Transport = Transport.UNIX
    region: int | None = None
    before: float = 0.0
    read_snapshot: bool = False
    snapshot_counts: tuple[int, ...] = ()
    unit: str = "IOPS"
    targets: dict[str, Target] = field(default_factory=dict)
    quick: bool = False

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]

    def describe(self) -> str:
        load = self.load
        words = [load.client.value, f"{load.rw} {size_words(load.block)}", f"depth {load.depth}"]
        if load.client is Client.NBDCOPY:
            words = ["nbdcopy to null"]
        if load.connections > 1:
            words.append(f"{load.connections} connections")
        if load.flush_every:
            words.append(f"flush every {load.flush_every}" + (", waited for" if load.wait_at_flush else ""))
        if self.transport is not Transport.UNIX:
            words.append(self.transport.value)
        words.append(f"{self.filling.value} cache")
        return ", ".join(words)


def size_words(size: int) -> str:
    return f"{size // MIB} MiB" if size % MIB == 0 else f"{size // KIB} KiB"


def _at_least(**ratios: float) -> dict[str, Target]:
    return {key.replace("_", "-"): Target(at_least=ratio) for key, ratio in ratios.items()}


def _raw(nbdkit: float) -> dict[str, Target]:
    return _at_least(nbdkit=nbdkit, qemu=2.0, qemu_uring=2.0)


_BEST = _at_least(nbdkit=1.0, qemu=1.0, qemu_uring=1.0, nbd_server=1.0)
_FRESH = _at_least(qcow2=2.0, qcow2_ext=1.0)
_TWICE = _at_least(qcow2=2.0, qcow2_ext=2.0)


def _live() -> list[Cell]:
    fsync = Load("randwrite", 4 * KIB, 32, flush_every=32)
    own = replace(fsync, client=Client.PIPELINE)
    live = Role.LIVE
    return [
        Cell("live/randread-4k-d1", live, Load("randread", 4 * KIB, 1), targets=_raw(1.0)),
        Cell("live/randread-4k-d8", live, Load("randread", 4 * KIB, 8), targets=_raw(1.0)),
        Cell("live/randread-4k-d64", live, Load("randread", 4 * KIB, 64), targets=_raw(1.5), quick=True),
        Cell("live/latency-4k-d1", live, Load("randread", 4 * KIB, 1, Client.PIPELINE), targets=_raw(1.0)),
        *_both(Cell("live/randwrite-4k-d1", live, Load("randwrite", 4 * KIB, 1), targets=_raw(1.0))),
        *_both(Cell("live/randwrite-4k-d64", live, Load("randwrite", 4 * KIB, 64), targets=_raw(1.0), quick=True)),
        Cell("live/randwrite-4k-d32-fsync32", live, fsync, targets=_raw(1.0)),
        Cell("live/randwrite-4k-d32-flush32", live, own, targets=_raw(1.0)),
        Cell("live/randwrite-4k-d32-wait32", live, replace(own, wait_at_flush=True), targets=_raw(1.0)),
        Cell("live/mixed-64k-d16", live, Load("randrw", 64 * KIB, 16)),
        Cell("live/read-1m-d4", live, Load("read", MIB, 4), unit="MiB/s", targets=_BEST),
        Cell("live/write-1m-d4", live, Load("write", MIB, 4), unit="MiB/s", targets=_BEST),
        Cell("live/nbdcopy", live, Load("read", 256 * KIB, 64, Client.NBDCOPY), unit="MiB/s", targets=_BEST),
    ]


def _fresh() -> list[Cell]:
    def cell(what: str, load: Load, unit: str = "IOPS", quick: bool = False) -> Cell:
        return Cell(f"fresh/{what}", Role.SNAPSHOT, load, unit=unit, targets=_FRESH, quick=quick)

    fsync = Load("randwrite", 4 * KIB, 32, once=True, flush_every=32)
    own = replace(fsync, client=Client.PIPELINE)
    return [
        *_both(cell("randwrite-4k-d1", Load("randwrite", 4 * KIB, 1, once=True))),
        *_both(cell("randwrite-4k-d64", Load("randwrite", 4 * KIB, 64, once=True), quick=True)),
        cell("randwrite-4k-d32-fsync32", fsync),
        cell("randwrite-4k-d32-flush32", own, quick=True),
        cell("randwrite-4k-d32-wait32", replace(own, wait_at_flush=True)),
        cell("randwrite-64k-d16", Load("randwrite", 64 * KIB, 16, once=True)),
        cell("write-1m-d4", Load("write", MIB, 4, once=True), unit="MiB/s"),
    ]


def _overwritten() -> list[Cell]:
    def second(what: str, load: Load, region: int, quick: bool = False) -> Cell:
        return Cell(f"second/{what}", Role.SNAPSHOT, load, region=region, before=1.0, targets=_TWICE, quick=quick)

    snapread = Cell(
        "snapread/randread-4k-d64",
        Role.SNAPSHOT,
        Load("randread", 4 * KIB, 64),
        region=128 * MIB,
        before=0.5,
        read_snapshot=True,
        targets=_TWICE,
        quick=True,
    )
    return [
        second("randwrite-4k-d1", Load("randwrite", 4 * KIB, 1), 64 * MIB),
        *_both(second("randwrite-4k-d64", Load("randwrite", 4 * KIB, 64), 64 * MIB, quick=True)),
        second("randwrite-4k-d32-flush32", Load("randwrite", 4 * KIB, 32, Client.PIPELINE, flush_every=32), 64 * MIB),
        snapread,
        replace(snapread, name="snapread/randread-4k-d1", load=Load("randread", 4 * KIB, 1), quick=False),
        replace(snapread, name="snapread/read-1m-d4", load=Load("read", MIB, 4), unit="MiB/s", quick=False),
    ]


def _elsewhere() -> list[Cell]:
    four_reads = Load("randread", 4 * KIB, 16, connections=4)
    four_writes = Load("randwrite", 4 * KIB, 16, connections=4)
    counts = (16, 64, 256, 1000)
    flat = {f"nbdsnap-{count}": Target(at_most=1.11) for count in counts}
    deep, tcp, cold = Load("randread", 4 * KIB, 64), Transport.TCP, Filling.COLD
    return [
        Cell("conns/randread-4k-d16x4", Role.LIVE, four_reads, targets=_raw(1.0)),
        Cell("conns/randwrite-4k-d16x4", Role.LIVE, four_writes, targets=_raw(1.0)),
        Cell("conns/fresh-randwrite-4k-d16x4", Role.SNAPSHOT, replace(four_writes, once=True), targets=_FRESH),
        Cell(
            "flat/fresh-randwrite-4k-d64",
            Role.SNAPSHOT,
            Load("randwrite", 4 * KIB, 64, once=True),
            snapshot_counts=counts,
            targets=flat,
        ),
        Cell("tcp/randread-4k-d1", Role.LIVE, Load("randread", 4 * KIB, 1), transport=tcp),
        Cell("tcp/randread-4k-d64", Role.LIVE, deep, transport=tcp),
        Cell("tcp/randwrite-4k-d64", Role.LIVE, Load("randwrite", 4 * KIB, 64), transport=tcp),
        Cell("tcp/fresh-randwrite-4k-d64", Role.SNAPSHOT, Load("randwrite", 4 * KIB, 64, once=True), transport=tcp),
        Cell("cold/randread-4k-d1", Role.LIVE, Load("randread", 4 * KIB, 1), filling=cold),
        Cell("cold/randread-4k-d64", Role.LIVE, deep, filling=cold),
        Cell("cold/read-1m-d4", Role.LIVE, Load("read", MIB, 4, once=True), filling=cold, unit="MiB/s"),
        Cell("cold/fresh-randwrite-4k-d64", Role.SNAPSHOT, Load("randwrite", 4 * KIB, 64, once=True), filling=cold),
    ]


def _both(cell: Cell) -> list[Cell]:
    """The cell with either filling of the page cache."""
    return [cell, replace(cell, name=f"{cell.name}+random", filling=Filling.RANDOM, quick=False)]


CELLS: tuple[Cell, ...] = (*_live(), *_fresh(), *_overwritten(), *_elsewhere())


def select(names: Sequence[str], patterns: str | None) -> list[str]:
    """The names that match one of the comma-separated patterns, in their own order; all of them without patterns.

    A pattern with ``*``, ``?`` or ``[`` is a shell pattern for the whole name; any other one matches as a part of the
    name, or, where a name is equal to it, that name alone.  ValueError where a pattern matches nothing.
    """
    if patterns is None:
        return list(names)
    chosen: set[str] = set()
    for pattern in filter(None, re.split(r"[,\s]+", patterns)):
        found = _matches(names, pattern)
        if not found:
            raise ValueError(f"{pattern!r} matches none of: {', '.join(names)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _matches(names: Sequence[str], pattern: str) -> list[str]:
    if pattern in names:
        return [pattern]
    if any(character in pattern for character in "*?["):
        return fnmatch.filter(names, pattern)
    return [name for name in names if pattern in name]
