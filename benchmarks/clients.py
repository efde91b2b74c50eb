"""The clients: what they are told to do, and what they report.

* fio's nbd engine (libnbd below) for most cells;
* nbdcopy for reading a whole export;
* :mod:`benchmarks.pipeline`, our own, where fio can't do what is asked: exactly one FLUSH per so many writes, and
  latency with next to no client in it.

Each runs as a process of its own, and times only its requests, not its start (but for nbdcopy, whose start is a few
milliseconds of a run that copies a whole volume).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks import procs
from benchmarks.procs import PeerError

CLIENT_SLACK_S = 60.0
"""What a client may take beyond its own run time: to start, to finish what is in flight, to flush on a slow disk."""

NBDCOPY_REQUEST = 256 << 10
"""Bytes of one of nbdcopy's requests, its default: for the CPU time per request."""


class Client(Enum):
    FIO = "fio"
    NBDCOPY = "nbdcopy"
    PIPELINE = "own client"


@dataclass(frozen=True)
class Load:
    """What a client does.

    ``rw``: read, write, randread, randwrite or randrw (70 % reads), in fio's words.
    ``once``: each block is touched at most once, in random or sequential order: first overwrites only.
    ``flush_every``: a FLUSH per so many writes; 0 for none.
    ``wait_at_flush``: all writes are answered before the FLUSH is sent, and it before the next ones, as a file system's
    journal does it (own client).
    """

    rw: str
    block: int
    depth: int
    client: Client = Client.FIO
    connections: int = 1
    once: bool = False
    flush_every: int = 0
    wait_at_flush: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a client measured.  Latencies are of reads and writes, not of FLUSH; None where it does not tell."""

    operations: int
    bytes: int
    seconds: float
    p50_us: float | None = None
    p99_us: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """How much of a load is run: ``region`` bytes from the export's start, for at most ``seconds``.

    ``seed``: of the order of random blocks; equal in all contenders of a round.
    ``share``: of the region's bytes, how many are touched (fio, with a ``once`` load).
    ``end_flush``: a FLUSH after the last write (fio).
    """

    region: int
    seconds: float
    seed: int
    share: float = 1.0
    end_flush: bool = False


def measure(uri: str, load: Load, limits: Limits, scratch: Path) -> Outcome:
    """Run the load's client against ``uri``; :class:`PeerError` where it fails."""
    if load.client is Client.FIO:
        return parse_fio(_run_fio(uri, load, limits, scratch))
    if load.client is Client.NBDCOPY:
        return _nbdcopy(uri, limits)
    return _pipeline(uri, load, limits)


def fio_command(uri: str, load: Load, limits: Limits, output: Path) -> list[str]:
    """fio's command line for a load.  Its random map keeps a ``once`` load from touching a block again."""
    share = limits.region // load.connections
    once = [f"--size={share}", f"--offset_increment={share}"]
    again = [f"--size={limits.region}", "--time_based", "--norandommap"]
    command = [
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={load.rw}",
        f"--bs={load.block}",
        f"--iodepth={load.depth}",
        f"--runtime={max(1, round(limits.seconds * 1000))}ms",
        f"--randseed={limits.seed}",
        *(once if load.once else again),
        "--thread",
        "--group_reporting",
        "--disable_slat=1",
        "--disable_lat=1",
        "--percentile_list=50:99",
        "--output-format=json",
        f"--output={output}",
    ]
    if load.rw == "randrw":
        command.append("--rwmixread=70")
    if load.connections > 1:
        command.append(f"--numjobs={load.connections}")
    if load.flush_every:
        command.append(f"--fsync={load.flush_every}")
    if limits.share < 1.0:
        command.append(f"--io_size={int(share * limits.share)}")
    if limits.end_flush:
        command.append("--end_fsync=1")
    return command


def _run_fio(uri: str, load: Load, limits: Limits, scratch: Path) -> dict[str, Any]:
    output = scratch / "fio.json"
    procs.run(fio_command(uri, load, limits, output), limits.seconds + CLIENT_SLACK_S)
    text = output.read_text()
    return json.loads(text[text.index("{") :])  # type: ignore[no-any-return]


def parse_fio(report: dict[str, Any]) -> Outcome:
    """The outcome in fio's JSON, where all jobs are reported as one group."""
    job = report["jobs"][0]
    if job["error"]:
        raise PeerError(f"fio: error {job['error']}")
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise PeerError("fio did nothing")
    seconds = max(side["runtime"] for side in sides) / 1000
    busier = max(sides, key=lambda side: side["total_ios"])
    centiles = busier["clat_ns"].get("percentile", {})
    return Outcome(
        operations=sum(side["total_ios"] for side in sides),
        bytes=sum(side["io_bytes"] for side in sides),
        seconds=max(seconds, 0.001),
        p50_us=_micro(centiles.get("50.000000")),
        p99_us=_micro(centiles.get("99.000000")),
    )


def _micro(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1000


def _nbdcopy(uri: str, limits: Limits) -> Outcome:
    begin = time.perf_counter()
    procs.run(["nbdcopy", uri, "null:"], CLIENT_SLACK_S)
    seconds = time.perf_counter() - begin
    return Outcome(-(-limits.region // NBDCOPY_REQUEST), limits.region, seconds)


def _pipeline(uri: str, load: Load, limits: Limits) -> Outcome:
    command = [
        *(sys.executable, "-m", "benchmarks.pipeline", uri),
        *("--rw", load.rw, "--block", str(load.block), "--depth", str(load.depth)),
        *("--region", str(limits.region), "--seconds", str(limits.seconds), "--seed", str(limits.seed)),
        *("--flush-every", str(load.flush_every)),
    ]
    if load.once:
        command.append("--once")
    if load.wait_at_flush:
        command.append("--wait-at-flush")
    return Outcome(**json.loads(procs.run(command, limits.seconds + CLIENT_SLACK_S)))
