"""The scale test: ``python -m benchmarks.scale``.  Do the costs stay what docs/design.md promises when a pool is large?

A large pool (by default 10 million preserved chunks under 10,000 snapshots of a 16 TiB sparse volume) is measured
beside a small one (1 GiB, 10 snapshots, as much overwritten between two of them) on the same machine, one after the
other: what must not depend on the size has to cost about the same in both, what may is held to a bound.

The volumes' files are sparse and lie in memory (/dev/shm) where that is possible: ext4 holds no file of 16 TiB, and
scattering millions of blocks over a disk would take hours that say nothing about nbdsnap.  The pools lie on the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, procs
from benchmarks.procs import PeerError
from benchmarks.report import WIDTH
from benchmarks.scaleprobe import CHANGE, CONNECTIONS, IDLE_SECONDS, Costs, Probe
from benchmarks.seedpool import CHUNK
from nbdsnap.errors import NbdsnapError
from nbdsnap.sizes import format_size, parse_size

GIB = 1 << 30
TIB = 1 << 40
SMALL_SIZE = GIB
SMALL_SNAPSHOTS = 10
INDEX_DENSITY = 10
"""To see what the index takes, one in so many chunks is preserved under one snapshot: a day of a busy disk."""

SEED_TIMEOUT_S = 4 * 3600.0
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Limit:
    """What the large pool's value is held to: at most ``factor`` times the small one's plus ``slack``, or ``bound``
    alone."""

    bound: float | None = None
    factor: float | None = None
    slack: float = 0.0
    at_least: float | None = None
    """For speeds: at least this share of the small pool's."""

    def held(self, small: float | None, large: float) -> bool:
        if self.at_least is not None:
            return small is not None and large >= small * self.at_least
        if self.factor is not None:
            return small is not None and large <= small * self.factor + self.slack
        return self.bound is None or large <= self.bound


@dataclass(frozen=True)
class Row:
    """One line of the table; ``show`` makes a value fit for people."""

    what: str
    small: float | None
    large: float
    show: Callable[[float], str]
    limit: Limit
    promise: str

    @property
    def held(self) -> bool:
        return self.limit.held(self.small, self.large)


def seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s"


def per_second(value: float) -> str:
    return f"{value:,.0f}/s"


def percent(value: float) -> str:
    return f"{value * 100:.2f} %"


def rows(small: Costs, large: Costs, size: int, connections: int) -> list[Row]:
    """The table's lines for the two pools; ``size``: of the large volume."""
    tib = size / TIB
    memory = Limit(bound=(100 + 40 * tib) * (1 << 20))
    flat = Limit(factor=2.0, slack=0.02)
    fair = Limit(at_least=0.7)
    listing = Limit(bound=2.0)
    quiet = Limit(bound=2.5 * procs.TICK_S)
    as_small = "as in the small pool"
    memory_promise = "100 MiB + 40 MiB/TiB"
    per_connection = Limit(bound=(1 << 20))
    growth = max(1, connections - CONNECTIONS)
    return [
        Row("start", small.start_s, large.start_s, seconds, Limit(bound=5.0), "at most 5 s"),
        Row(
            "start after a kill", small.killed_start_s, large.killed_start_s, seconds, Limit(bound=10.0), "at most 10 s"
        ),
        Row("memory after the start", small.memory, large.memory, _size, memory, memory_promise),
        Row(f"memory, {CONNECTIONS} connections", small.memory_64, large.memory_64, _size, memory, memory_promise),
        Row(
            "memory per further connection",
            (small.memory_many - small.memory_64) / growth,
            (large.memory_many - large.memory_64) / growth,
            _size,
            per_connection,
            "at most 1 MiB",
        ),
        Row("with mapped files after the start", small.resident, large.resident, _size, Limit(), ""),
        Row(f"CPU time in {IDLE_SECONDS:g} idle s", small.idle_cpu_s, large.idle_cpu_s, seconds, quiet, "none"),
        Row("snapshot create", small.create_s, large.create_s, seconds, flat, as_small),
        Row(f"snapshot delete, {CHANGE} chunks", small.delete_s, large.delete_s, seconds, flat, as_small),
        Row("the same, the newest one", small.delete_newest_s, large.delete_newest_s, seconds, flat, as_small),
        Row(f"diff, {CHANGE} chunks", small.diff_s, large.diff_s, seconds, flat, as_small),
        Row("rollback, nothing changed", small.rollback_s, large.rollback_s, seconds, flat, as_small),
        Row("status", small.status_s, large.status_s, seconds, listing, "at most 2 s"),
        Row("volume show", small.show_s, large.show_s, seconds, listing, "at most 2 s"),
        Row("snapshot list", small.list_s, large.list_s, seconds, listing, "at most 2 s"),
        Row("first overwrites", small.first_overwrites, large.first_overwrites, per_second, fair, as_small),
        Row("reads, oldest snapshot", small.read_oldest, large.read_oldest, per_second, fair, as_small),
        Row("reads, newest snapshot", small.read_newest, large.read_newest, per_second, fair, as_small),
    ]


def _size(value: float) -> str:
    return format_size(int(value))


def table(lines: Sequence[Row]) -> str:
    """The rows as text, at most WIDTH columns wide."""
    text = [f"{'':<34}{'small':>12}{'large':>12}  {'held to':<22}"]
    for row in lines:
        small = "" if row.small is None else row.show(row.small)
        verdict = "" if not row.promise else ("ok" if row.held else "NOT HELD")
        text.append(f"{row.what:<34}{small:>12}{row.show(row.large):>12}  {row.promise:<22}{verdict}".rstrip()[:WIDTH])
    return "\n".join(text)


# --- the pools ---


@dataclass(frozen=True)
class Sizes:
    """What the command line asks for.  ``per_snapshot``: chunks overwritten after each snapshot, in either pool."""

    size: int
    snapshots: int
    per_snapshot: int
    connections: int
    index_chunks: int


class Scale:
    """Makes pools below ``folder``, their volumes' files in ``images``, and measures them."""

    def __init__(self, folder: Path, images: Path, sizes: Sizes, reuse: bool) -> None:
        self.folder = folder
        self.images = images
        self.sizes = sizes
        self.reuse = reuse

    def measure(self) -> tuple[list[Row], list[str], dict[str, Any]]:
        """The table's rows, what was plainly wrong, and everything measured."""
        sizes = self.sizes
        small = self._pool("small", SMALL_SIZE, SMALL_SNAPSHOTS)
        large = self._pool("large", sizes.size, sizes.snapshots)
        lines = rows(small, large, sizes.size, sizes.connections)
        lines += self._index_rows(large)
        problems = [
            *(f"small pool: {one}" for one in small.problems),
            *(f"large pool: {one}" for one in large.problems),
        ]
        return lines, problems, {"small": asdict(small), "large": asdict(large)}

    def _pool(self, name: str, size: int, snapshots: int) -> Costs:
        scratch, image = self._seeded(name, size, ["--snapshots", str(snapshots)], self.sizes.per_snapshot)
        say(f"{name} pool: measuring")
        return Probe(scratch, image, snapshots, self.sizes.connections).measure()

    def _index_rows(self, large: Costs) -> list[Row]:
        """What the index takes for each preserved byte: at random, in sequence, and in the large pool."""
        span = self.sizes.index_chunks * CHUNK * INDEX_DENSITY
        at_random = self._index_share("random", ["--span", str(span)])
        in_order = self._index_share("sequential", ["--sequential"])
        thinly = large.index_bytes / (self.sizes.snapshots * self.sizes.per_snapshot * CHUNK)
        one_percent = Limit(bound=0.011)
        return [
            Row(
                f"index, random 4 KiB, 1 in {INDEX_DENSITY}",
                None,
                at_random,
                percent,
                one_percent,
                "about 1 % of the data",
            ),
            Row(
                "index, sequential (small: random)",
                at_random,
                in_order,
                percent,
                Limit(factor=0.75),
                "far less than random",
            ),
            Row("index of the large pool", None, thinly, percent, Limit(), ""),
        ]

    def _index_share(self, name: str, words: list[str]) -> float:
        chunks = self.sizes.index_chunks
        scratch, _image = self._seeded(name, chunks * CHUNK * INDEX_DENSITY, ["--snapshots", "1", *words], chunks)
        index = sum(path.stat().st_blocks * 512 for path in (scratch / "pool").glob("*.mdb"))
        return index / (chunks * CHUNK)

    def _seeded(self, name: str, size: int, words: list[str], chunks: int) -> tuple[Path, Path]:
        """The scratch folder of a pool, made unless it is there and may be used again, and its volume's file."""
        scratch, image = self.folder / name, self.images / f"nbdsnap-scale-{name}.img"
        if not image.exists() or image.stat().st_size != size:  # else its time stays: the pool knows it
            with image.open("ab") as file:
                file.truncate(size)
        if not (self.reuse and (scratch / "complete").exists()):
            say(f"{name} pool: filling")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            seed = [sys.executable, "-m", "benchmarks.seedpool", str(scratch / "pool"), str(image), "--sparse"]
            done = subprocess.run([*seed, "--chunks", str(chunks), *words], timeout=SEED_TIMEOUT_S)
            if done.returncode:
                raise PeerError(f"filling the {name} pool failed: exit {done.returncode}")
            (scratch / "complete").touch()
        return scratch, image

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for image in self.images.glob("nbdsnap-scale-*.img"):
            image.unlink(missing_ok=True)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# --- the command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.snapshots < 1 or options.chunks < options.snapshots or options.connections <= CONNECTIONS:
        parser.error(f"at least one snapshot, one chunk for each, and more than {CONNECTIONS} connections")
    per_snapshot = options.chunks // options.snapshots
    sizes = Sizes(options.size, options.snapshots, per_snapshot, options.connections, options.index_chunks)
    if sizes.per_snapshot > SMALL_SIZE // CHUNK or sizes.size < SMALL_SIZE:
        parser.error(f"--size is at least {format_size(SMALL_SIZE)}, and one snapshot's chunks have to fit into that")
    scale = Scale(options.folder.resolve(), options.images, sizes, options.keep)
    try:
        lines, problems, measured = scale.measure()
    except (PeerError, NbdsnapError, OSError) as error:
        say(f"python -m benchmarks.scale: {error}")
        return 1
    finally:
        if not options.keep:
            scale.remove()
    return _finish(options, sizes, lines, problems, measured)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=10_000_000, help="preserved in all (default: %(default)s)")
    parser.add_argument(
        "--snapshots", type=int, default=10_000, help="that they are spread over (default: %(default)s)"
    )
    parser.add_argument("--size", type=parse_size, default="16TiB", help="of the volume (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=256, help="held open at the end (default: %(default)s)")
    parser.add_argument("--index-chunks", type=int, default=400_000, help="to size the index by (default: %(default)s)")
    folder = Path(tempfile.gettempdir()) / "nbdsnap-scale"
    parser.add_argument("--folder", type=Path, default=folder, help="for the pools (default: %(default)s)")
    images = SHM if SHM.is_dir() else Path(tempfile.gettempdir())
    parser.add_argument(
        "--images", type=Path, default=images, help="folder of the volumes' files (default: %(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the pools, and use those that an earlier run kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    return parser


def _finish(
    options: argparse.Namespace, sizes: Sizes, lines: list[Row], problems: list[str], measured: dict[str, Any]
) -> int:
    chunks = sizes.per_snapshot * sizes.snapshots
    print(f"small: {format_size(SMALL_SIZE)}, {SMALL_SNAPSHOTS} snapshots")
    print(f"large: {format_size(sizes.size)}, {sizes.snapshots} snapshots, {chunks} preserved chunks")
    print(table(lines))
    for problem in problems:
        print(f"WRONG: {problem}")
    if options.json:
        verdicts = [
            {"what": row.what, "small": row.small, "large": row.large, "promise": row.promise, "held": row.held}
            for row in lines
        ]
        about = {"machine": machine.describe(options.folder), "sizes": asdict(sizes), "rows": verdicts}
        options.json.write_text(json.dumps({**about, "problems": problems, **measured}, indent=1) + "\n")
    return 1 if problems or not all(row.held for row in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
