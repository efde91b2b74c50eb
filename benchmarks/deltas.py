"""The delta benchmark: ``python -m benchmarks.deltas --size 4GiB``.  What does a small change of a large volume cost?

Two pools on one machine, a volume of incompressible data in each:

* all of it, through a pipe: ``send | receive``, beside ``cat | dd`` of the same file, which is synced, too;
* a change of ``--percent``, in 4 KiB blocks at random places: ``send --from | receive``, beside what has to find the
  change: ``rsync --inplace --no-whole-file`` (if it is there) of the two files.

Each is a process of its own: its seconds, its CPU seconds, its most memory, and the bytes that went through the pipe.
Half of the pages of all files are in the cache or all, as the machine's memory goes: nothing is done about that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nbdsnap.engine.device import Op, OpKind
from nbdsnap.engine.pool import Pool
from nbdsnap.sizes import format_size, parse_size

NBDSNAP = Path(sys.executable).parent / "nbdsnap"
BLOCK = 4096
SEED = 1


@dataclass(frozen=True)
class Result:
    """``cpu_s`` and ``memory``: of all its processes together, and of the largest."""

    name: str
    seconds: float
    cpu_s: float
    memory: int
    shipped: int | None = None


def pipeline(name: str, commands: Sequence[Sequence[str | Path]]) -> Result:
    """Run them as a shell does ``a | b | c``."""
    began = time.monotonic()
    running: list[subprocess.Popen[bytes]] = []
    for number, command in enumerate(commands):
        last = number == len(commands) - 1
        previous = running[-1].stdout if running else subprocess.DEVNULL
        running.append(
            subprocess.Popen(command, stdin=previous, stdout=subprocess.DEVNULL if last else subprocess.PIPE)
        )
        if running[:-1] and running[-2].stdout is not None:
            running[-2].stdout.close()
    cpu = 0.0
    peak = _Peak([process.pid for process in running])
    for process in running:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{name}: exit {process.returncode}")
        cpu += usage.ru_utime + usage.ru_stime
    return Result(name, time.monotonic() - began, cpu, peak.stop())


class _Peak:
    """The most memory of any of the processes, looked at now and then: ru_maxrss would begin with ours."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pids,))
        self._thread.start()

    def _run(self, pids: Sequence[int]) -> None:
        while not self._ended.wait(0.05):
            for pid in pids:
                with contextlib.suppress(OSError, IndexError):
                    line = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2]
                    self._most = max(self._most, int(line.split()[0]) * 1024)

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._most


class Side:
    """A pool with the volume ``vol`` over ``image``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.image = folder / "vol.img"
        self.pool = folder / "pool"
        self.config = folder / "nbdsnap.toml"
        self.config.write_text(f'[server]\ncontrol = "{folder}/control.sock"\n[pool]\npath = "{self.pool}"\n')

    def cli(self, *words: str) -> list[str | Path]:
        return [NBDSNAP, "--config", self.config, *words]

    def make(self, size: int) -> None:
        pool = Pool.open(self.pool, create=True)
        pool.volume_create("vol", self.image, size)
        pool.close()

    def snapshot(self, name: str) -> None:
        subprocess.run(self.cli("snapshot", "create", f"vol@{name}"), check=True, stdout=subprocess.DEVNULL)


def fill(path: Path, size: int) -> None:
    rng = random.Random(SEED)
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 20):
            file.write(rng.randbytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())


def change(side: Side, size: int, percent: float) -> int:
    """Overwrite so much of the volume; the bytes."""
    rng = random.Random(SEED + 1)
    blocks = rng.sample(range(size // BLOCK), max(1, int(size / BLOCK * percent / 100)))
    pool = Pool.open(side.pool)
    device = pool.open_device("vol")
    free = threading.Semaphore(512)
    for block in blocks:
        free.acquire()
        device.submit(Op(OpKind.WRITE, block * BLOCK, BLOCK, lambda _: free.release(), rng.randbytes(BLOCK)))
    for _ in range(512):
        free.acquire()
    device.close()
    pool.close()
    return len(blocks) * BLOCK


def measure(folder: Path, size: int, percent: float) -> list[Result]:
    source, target = Side(folder / "source"), Side(folder / "target")
    fill(source.image, size)
    source.make(size)
    target.make(size)
    source.snapshot("a")
    results = []
    plain = folder / "plain.img"
    results.append(
        pipeline("plain pipe", [["cat", source.image], ["dd", f"of={plain}", "bs=1M", "conv=fsync", "status=none"]])
    )
    results.append(pipeline("send | receive", [source.cli("send", "vol@a"), target.cli("receive", "vol")]))
    changed = change(source, size, percent)
    source.snapshot("b")
    delta = folder / "delta"
    subprocess.run(
        [*source.cli("send", "vol@b", "--from", "vol@a"), "-o", delta], check=True, stdout=subprocess.DEVNULL
    )
    words = source.cli("send", "vol@b", "--from", "vol@a")
    found = pipeline("send --from | receive", [words, target.cli("receive", "vol")])
    results.append(Result(**{**asdict(found), "shipped": delta.stat().st_size}))
    print(f"changed: {format_size(changed)}", file=sys.stderr)
    if shutil.which("rsync"):
        words = ["rsync", "--inplace", "--no-whole-file", "--fsync", source.image, plain]
        results.append(pipeline("rsync --inplace --no-whole-file", [words]))
        subprocess.run(["cmp", source.image, plain], check=True)
    subprocess.run(["cmp", source.image, target.image], check=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4GiB", help="of the volume")
    parser.add_argument("--percent", type=float, default=1.0, help="how much of it is changed")
    parser.add_argument("--folder", type=Path, help="where to put three times that size")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = parse_size(options.size)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(Path(folder), size, options.percent)
    if options.json:
        print(json.dumps([asdict(one) for one in results], indent=2))
        return
    for one in results:
        shipped = "" if one.shipped is None else f"  shipped {format_size(one.shipped)}"
        print(
            f"{one.name:32} {one.seconds:8.2f} s  {size / one.seconds / 1e6:8.0f} MB/s of volume  "
            f"CPU {one.cpu_s:6.2f} s  memory {format_size(one.memory)}{shipped}"
        )


if __name__ == "__main__":
    main()
