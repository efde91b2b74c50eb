"""Power cuts of a pool under load, as many as one likes: records runs, explores the states, keeps what breaks a
promise.

::

    python -m tests.crash.campaign --seeds 1:20 --states 5000 --workers 2
    python -m tests.crash.campaign --repeat /tmp/found/stage.pickle 3771:torn_pages:12345

A seed's first run starts on an empty disk.  With ``--stages 2`` one of its states is the start of a second run, so
that recovery itself, and what comes after it, is cut, too.  States are named as
:class:`~tests.crash.explorer.StateId`.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.crash.explorer import Report, StateId, build, explore, plan, scratch_root
from tests.crash.pool_verify import Earlier, PoolVerifier, make_verify, until
from tests.crash.pool_workload import initial_content, origin_path
from tests.crash.recording import Kind, Recording
from tests.crash.tracer import record
from tests.model import profiles

MAPPED = ("*/index.mdb*-lock",)
"""LMDB's reader table: means nothing after a reboot."""

OPERATIONS = 40
"""Of each of the four writers, in each of a run's two phases."""


def record_run(module: str, volume: str) -> Recording:
    """One run of the program ``module`` on a disk that has the origin of ``volume`` on it, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="nbdsnap-crash-", dir=scratch_root()) as scratch:
        disk = Path(scratch) / "disk"
        disk.mkdir()
        (disk / origin_path(volume).name).write_bytes(initial_content(volume))
        command = [sys.executable, "-m", module, str(profiles.seed())]
        return record(command, disk, Path(scratch) / "trace", mapped=MAPPED)


@dataclass
class Stage:
    """A recorded run on a pool, and what had happened to the pool before."""

    seed: int
    number: int
    recording: Recording
    earlier: Earlier | None = None

    @property
    def make_verify(self) -> Callable[[], PoolVerifier]:
        return make_verify(self.recording, self.seed, self.earlier)

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(self))

    @staticmethod
    def load(path: Path) -> Stage:
        stage = pickle.loads(path.read_bytes())
        if not isinstance(stage, Stage):
            raise TypeError(f"{path} is no stage")
        return stage


def first_stage(seed: int, operations: int = OPERATIONS) -> Stage:
    """A run on an empty disk, but for one origin."""
    with tempfile.TemporaryDirectory(prefix="nbdsnap-crash-", dir=scratch_root()) as scratch:
        disk = Path(scratch) / "disk"
        disk.mkdir()
        (disk / origin_path("old").name).write_bytes(initial_content("old"))
        return Stage(seed, 0, _record(Path(scratch), seed, operations, 0))


def next_stage(stage: Stage, cut: StateId, operations: int = OPERATIONS) -> Stage:
    """A run on what a cut has left of the one before."""
    with tempfile.TemporaryDirectory(prefix="nbdsnap-crash-", dir=scratch_root()) as scratch:
        build(stage.recording, cut, Path(scratch) / "disk")
        number = stage.number + 1
        recording = _record(Path(scratch), stage.seed, operations, number)
    return Stage(stage.seed, number, recording, until(stage.recording, cut.time, stage.earlier))


def _record(scratch: Path, seed: int, operations: int, number: int) -> Recording:
    words = [str(value) for value in (seed, operations, number)]
    command = [sys.executable, "-m", "tests.crash.pool_workload", *words]
    return record(command, scratch / "disk", scratch / "trace", mapped=MAPPED)


_LOG_HEADER = struct.Struct(">8sIIQQQ")


def features(recording: Recording) -> set[str]:
    """What happened in a run that does not in each: see :mod:`tests.crash.pool_workload`."""
    found: set[str] = set()
    for operation in recording.operations:
        if operation.kind is Kind.RENAME and operation.target == "pool/intent.log":
            found.add("log renewed")
        elif operation.kind is Kind.RENAME and fnmatch(operation.target, "pool/intents-*.log"):
            found.add("writes stranded")
        elif operation.kind is Kind.UNLINK and fnmatch(operation.path, "pool/intents-*.log"):
            found.add("stranded writes applied")
        elif operation.path == "pool/intent.log" and operation.offset == 0 and operation.data.startswith(b"NBDSNLOG"):
            *_, size, tail = _LOG_HEADER.unpack_from(operation.data)
            if tail > size:
                found.add("log wrapped")
    if any(mark.fields.get("dropped") for mark in recording.marks):
        found.add("snapshots dropped")
    return found


def explore_stages(stages: int, seed: int, count: int, workers: int = 1) -> tuple[Report, Stage]:
    """Explore ``count`` states of each stage; stops at the first that breaks a promise, which is then the one
    returned."""
    total = Report()
    stage = first_stage(seed)
    for number in range(stages):
        if number:
            stage = next_stage(stage, plan(stage.recording, seed, 7)[3])
        total.features |= features(stage.recording)
        stage.make_verify().expectation.check_instants()
        total.add(explore(stage.recording, stage.make_verify, seed=seed, count=count, workers=workers))
        if total.violations:
            break
    return total, stage


def repeat(path: Path, state: str) -> None:
    """Verify one state again, with all that it writes."""
    stage, name = Stage.load(path), StateId.parse(state)
    folder = Path(tempfile.mkdtemp(prefix="nbdsnap-crash-", dir=scratch_root()))
    build(stage.recording, name, folder)
    print(f"the state is in {folder}")
    stage.make_verify()(folder, name.time)
    print("it is fine")
    shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1:2", help="first:end")
    parser.add_argument("--states", type=int, default=5000, help="of each stage")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()), help="where to put what was found")
    parser.add_argument("--repeat", nargs=2, metavar=("STAGE", "STATE"))
    options = parser.parse_args()
    if options.repeat:
        repeat(Path(options.repeat[0]), options.repeat[1])
        return 0
    first, end = (int(number) for number in options.seeds.split(":"))
    states = 0
    for seed in range(first, end):
        report, stage = explore_stages(options.stages, seed, options.states, options.workers)
        states += report.states
        print(f"seed {seed}: {report} ({states} in all; {', '.join(sorted(report.features))})", flush=True)
        if report.violations:
            path = options.keep / f"nbdsnap-crash-{seed}.pickle"
            stage.save(path)
            for name, _ in report.violations:
                print(f"python -m tests.crash.campaign --repeat {path} {name}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
