"""Do clients notice that snapshots are deleted?  ``python -m benchmarks.bulkdelete``

A server with many snapshots is read and written at random, a flush after each 32 writes, while they are deleted in a
few commands, with a pause before each.  The requests' latencies while space is given back are set beside those in the
pauses; the 99th percentile is to stay within three times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.peers import VOLUME, Nbdsnap, Place, uri
from benchmarks.pipeline import Pipeline, PipelineError, Schedule, connect, offsets_of
from benchmarks.procs import PeerError
from benchmarks.seedpool import CHUNK, snapshot_name
from benchmarks.stats import percentile
from nbdsnap import operations
from nbdsnap.client import RemoteClient
from nbdsnap.errors import NbdsnapError
from nbdsnap.operations import SnapshotCreate, SnapshotDelete
from nbdsnap.sizes import format_size

SIZE = 1 << 30
SPAN = 256 << 20
"""Of the volume: where snapshots differ, and the load lies."""

DEPTH = 4
FLUSH_EVERY = 32
PAUSE_S = 3.0
FACTOR = 3.0
TIMEOUT_S = 3600.0

Window = tuple[int, int]
"""Nanoseconds of the monotonic clock: from, to."""


class TimedPipeline(Pipeline):
    """Remembers, too, when each answer came."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.moments: list[int] = []

    def _take_answers(self, now: int) -> None:
        super()._take_answers(now)
        self.moments += [now] * (len(self.latencies_ns) - len(self.moments))


class Load:
    """Random reads, or writes, in a process of its own."""

    def __init__(self, where: str, *, write: bool) -> None:
        context = multiprocessing.get_context("fork")
        self._stop = context.Event()
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=self._run, args=(where, write, sender), daemon=True)
        self._process.start()

    def _run(self, where: str, write: bool, sender: Connection) -> None:
        sock, _ = connect(where)
        with sock:
            offsets = offsets_of("randwrite", CHUNK, SPAN, seed=3 + write, once=False)
            schedule = Schedule(offsets, once=False, flush_every=FLUSH_EVERY if write else 0)
            pipeline = TimedPipeline(sock, schedule, write=write, block=CHUNK, depth=DEPTH)
            while not self._stop.is_set():
                pipeline.run(0.2)
        sender.send((pipeline.moments, pipeline.latencies_ns))

    def result(self) -> tuple[list[int], list[int]]:
        """``(moments, latencies)`` of all answers, ascending by moment."""
        self._stop.set()
        found: tuple[list[int], list[int]] = self._receiver.recv()
        self._process.join()
        return found


def within(moments: list[int], latencies: list[int], windows: list[Window]) -> list[int]:
    """The latencies of what was answered within the windows, ascending."""
    found: list[int] = []
    for begin, end in windows:
        found += latencies[bisect_left(moments, begin) : bisect_left(moments, end)]
    return sorted(found)


def measure(place: Place, snapshots: int, commands: int) -> tuple[list[dict[str, Any]], float]:
    """A row for each kind of load; and the seconds that giving back took in all."""
    running = Nbdsnap().start(place)
    quiet: list[Window] = []
    busy: list[Window] = []
    try:
        with RemoteClient(place.scratch / "control.sock") as client:
            where = uri(place, 0, VOLUME)
            client.call(operations.SNAPSHOT_CREATE, SnapshotCreate(names=[f"{VOLUME}@last"]))
            loads = {"reads": Load(where, write=False), "writes": Load(where, write=True)}
            time.sleep(PAUSE_S)  # the first overwrites
            each = snapshots // commands
            for number in range(commands):
                quiet.append(_during(lambda: time.sleep(PAUSE_S)))
                names = [f"{VOLUME}@{snapshot_name(n)}" for n in range(number * each, (number + 1) * each)]
                busy.append(_during(lambda names=names: _delete(client, names)))
            quiet.append(_during(lambda: time.sleep(PAUSE_S)))
            results = {name: load.result() for name, load in loads.items()}
    finally:
        running.stop()
    return [_row(name, *result, quiet, busy) for name, result in results.items()], sum(e - b for b, e in busy) / 1e9


def _delete(client: RemoteClient, names: list[str]) -> None:
    client.call(operations.SNAPSHOT_DELETE, SnapshotDelete(names=names))


def _during(action: Any) -> Window:
    begin = time.perf_counter_ns()
    action()
    return begin, time.perf_counter_ns()


def _row(
    what: str, moments: list[int], latencies: list[int], quiet: list[Window], busy: list[Window]
) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what}
    for name, windows in (("quiet", quiet), ("busy", busy)):
        found = within(moments, latencies, windows)
        seconds = sum(end - begin for begin, end in windows) / 1e9
        row[name] = {
            "per_second": len(found) / seconds,
            **{f"p{p}_us": percentile(found, p) / 1000 for p in (50, 99, 99.9)},
        }
    row["p99_ratio"] = row["busy"]["p99_us"] / row["quiet"]["p99_us"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':<8}{'':<10}{'per second':>12}{'p50':>12}{'p99':>12}{'p99.9':>12}"]
    for row in rows:
        for when in ("quiet", "busy"):
            one = row[when]
            times = "".join(f"{one[key] / 1000:>9.2f} ms" for key in ("p50_us", "p99_us", "p99.9_us"))
            name = row["what"] if when == "quiet" else ""
            lines.append(f"{name:<8}{'deleting' if when == 'busy' else 'before':<10}{one['per_second']:>12,.0f}{times}")
        verdict = "ok" if row["p99_ratio"] <= FACTOR else "NOT HELD"
        lines.append(f"{'':<18}p99: {row['p99_ratio']:.2f} times (held to {FACTOR:g}: {verdict})")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulkdelete", description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=int, default=1000, help="to be deleted (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=500, help="overwritten after each (default: %(default)s)")
    parser.add_argument("--commands", type=int, default=2, help="that delete them (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the pool")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    options = parser.parse_args(arguments)
    scratch = Path(tempfile.mkdtemp(prefix="nbdsnap-bulkdelete-", dir=options.folder))
    try:
        image = scratch / "vol.img"
        with image.open("wb") as file:
            file.truncate(SIZE)
        seed = [sys.executable, "-m", "benchmarks.seedpool", str(scratch / "pool"), str(image), "--span", str(SPAN)]
        words = ["--snapshots", str(options.snapshots), "--chunks", str(options.chunks)]
        subprocess.run([*seed, *words], check=True, timeout=TIMEOUT_S)
        rows, seconds = measure(Place(image, scratch), options.snapshots, options.commands)
    except (PeerError, PipelineError, NbdsnapError, OSError) as error:
        sys.stderr.write(f"python -m benchmarks.bulkdelete: {error}\n")
        return 1
    finally:
        shutil.rmtree(scratch)
    preserved = format_size(options.snapshots * options.chunks * CHUNK)
    print(f"{options.snapshots} snapshots, {preserved} overwritten between them; deleted in {seconds:.1f} s")
    print(table(rows))
    if options.json:
        about = {"machine": machine.describe(options.folder), "seconds": seconds, "rows": rows}
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    return 0 if all(row["p99_ratio"] <= FACTOR for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
