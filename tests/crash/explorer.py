"""The explorer: cuts the power at many moments of a recording, builds disk states, and has each verified.

A state is named by a :class:`StateId`, from which :func:`build` makes it again.  Verification runs in worker
processes: a state that kills its verifier (a bus error in a mapped file, say) is a violation like any other, and
named.
"""

from __future__ import annotations

import faulthandler
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import xxhash

from tests.crash.disk import Disk, DiskState
from tests.crash.recording import Operation, Recording
from tests.crash.strategies import STRATEGIES

Verify = Callable[[Path, int], None]
"""``verify(folder, time)``: raises where the state in ``folder`` is not what a cut at ``time`` may leave.  It may
change it."""

Drop = Callable[[Operation], bool]

MAX_VIOLATIONS = 5
"""Of one exploration: then it stops, since more would tell the same."""

VERIFY_TIMEOUT_S = 60.0
"""For one state: a recovery that hangs is a violation."""

SEARCH_ROUNDS = (60, 250, 1000, 4000)
"""States in each round of a search for a planted bug: most show at once, a few hide in a single moment of the run."""

NEAR_POINTS = 40
FAR_POINTS = 300
"""How many moments after what is dropped are looked at: at first, and later, in turn."""

_BLOCK = 16384
_ZEROES = bytes(_BLOCK)
_NOTE_BYTES = 256


class ViolationError(AssertionError):
    """A state breaks a promise."""


def nothing_dropped(operation: Operation) -> bool:
    return False


@dataclass(frozen=True)
class StateId:
    time: int
    strategy: str
    seed: int

    def __str__(self) -> str:
        return f"{self.time}:{self.strategy}:{self.seed}"

    @staticmethod
    def parse(text: str) -> StateId:
        time, strategy, seed = text.split(":")
        return StateId(int(time), strategy, int(seed))


@dataclass(repr=False)
class Report:
    """What an exploration found.  ``states`` counts those verified; ``repeated`` those met, and verified, before."""

    states: int = 0
    repeated: int = 0
    seconds: float = 0.0
    violations: list[tuple[StateId, str]] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    """What the explored runs did."""

    def __str__(self) -> str:
        rate = self.states / self.seconds if self.seconds else 0.0
        found = "".join(f"\n--- state {state}\n{text}" for state, text in self.violations)
        return f"{self.states} states ({self.repeated} more were repetitions), {rate:.0f}/s{found or ', no violation'}"

    def add(self, other: Report) -> None:
        self.states += other.states
        self.repeated += other.repeated
        self.seconds += other.seconds
        self.violations += other.violations
        self.features |= other.features


def plan(recording: Recording, seed: int, states: int, among: Sequence[int] = ()) -> list[StateId]:
    """``states`` states, in order of time: spread over all moments (or those ``among``) and strategies evenly, and by
    chance."""
    rng = random.Random(seed)
    chosen: list[StateId] = []
    while len(chosen) < states:
        points = list(among) or recording.points()
        rng.shuffle(points)
        points = points[: states - len(chosen)]
        chosen += [StateId(point, rng.choice(list(STRATEGIES)), rng.getrandbits(32)) for point in points]
    return sorted(chosen, key=lambda state: state.time)


def points_after(recording: Recording, drop: Drop, count: int = NEAR_POINTS) -> list[int]:
    """The ``count`` moments after what is dropped: there its loss is most likely to show."""
    points = recording.points()
    near: set[int] = set()
    for operation in recording.operations:
        if operation.is_sync and drop(operation):
            first = bisect_left(points, operation.end)
            near.update(points[first : first + count])
    return sorted(near)


def states(
    recording: Recording, wanted: list[StateId], drop: Drop = nothing_dropped
) -> Iterator[tuple[StateId, DiskState]]:
    """The states named by ``wanted``, which is in order of time."""
    disk = Disk(recording, drop)
    for name in wanted:
        disk.advance(name.time)
        yield name, disk.state(STRATEGIES[name.strategy](disk, random.Random(name.seed)))


def write_state(state: DiskState, folder: Path) -> None:
    """Put a state into ``folder``, in place of what is there.  Zeroes become holes."""
    for found in sorted(folder.rglob("*"), reverse=True):
        name = str(found.relative_to(folder))
        if found.is_dir():
            if name not in state.directories:
                found.rmdir()
        elif name not in state.files:
            found.unlink()
    for name in state.directories:
        (folder / name).mkdir(exist_ok=True)
    for name, content in state.files.items():
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, len(content))
            with memoryview(content) as view:
                for offset in range(0, len(content), _BLOCK):
                    block = view[offset : offset + _BLOCK]
                    if block != _ZEROES[: len(block)]:
                        os.pwrite(fd, block, offset)
            os.utime(fd, ns=(state.modified[name], state.modified[name]))
        finally:
            os.close(fd)


def build(recording: Recording, name: StateId, folder: Path, drop: Drop = nothing_dropped) -> None:
    """Make one state again."""
    folder.mkdir(parents=True, exist_ok=True)
    for _, state in states(recording, [name], drop):
        write_state(state, folder)


def explore(
    recording: Recording,
    make_verify: Callable[[], Verify],
    *,
    seed: int,
    count: int,
    seconds: float = 600.0,
    workers: int = 1,
    drop: Drop = nothing_dropped,
    among: Sequence[int] = (),
) -> Report:
    """Verify ``count`` states, or as many as ``seconds`` allow.  ``make_verify`` runs in each worker."""
    wanted = plan(recording, seed, count, among)
    began = time.monotonic()
    context = multiprocessing.get_context("fork")
    running = []
    for number in range(workers):
        # neighbours in time are alike: deal them out, so that every worker covers the whole recording
        worker = _Worker(context, recording, make_verify, wanted[number::workers], began + seconds, drop)
        running.append(worker)
    report = Report()
    for worker in running:
        report.add(worker.result())
    report.seconds = time.monotonic() - began
    return report


def explore_until_found(
    recording: Recording,
    make_verify: Callable[[], Verify],
    *,
    seed: int,
    drop: Drop = nothing_dropped,
    rounds: Sequence[int] = SEARCH_ROUNDS,
) -> Report:
    """Look for a violation that must be there, in rounds of growing size: soon after what is dropped, and later."""
    report = Report()
    for number, count in enumerate(rounds):
        among = points_after(recording, drop, FAR_POINTS if number % 2 else NEAR_POINTS)
        report.add(explore(recording, make_verify, seed=seed + number, count=count, drop=drop, among=among))
        if report.violations:
            break
    return report


class _Worker:
    """A process that verifies its share of states.  It notes each in shared memory before, so that its death names
    it."""

    def __init__(
        self,
        context: multiprocessing.context.ForkContext,
        recording: Recording,
        make_verify: Callable[[], Verify],
        wanted: list[StateId],
        deadline: float,
        drop: Drop,
    ) -> None:
        self._note = mmap.mmap(-1, _NOTE_BYTES)
        self._folder = Path(tempfile.mkdtemp(prefix="nbdsnap-crash-", dir=scratch_root()))
        self._receiver, sender = context.Pipe(duplex=False)
        arguments = (recording, make_verify, wanted, deadline, drop, self._folder, self._note, sender)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        sender.close()

    def result(self) -> Report:
        try:
            report = self._receiver.recv()
            assert isinstance(report, Report)
        except EOFError:
            self._process.join()
            count, name = self._note[:].rstrip(b"\0").decode().split(" ")
            code = self._process.exitcode or 0
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            report = Report(states=int(count), violations=[(StateId.parse(name), f"the verifier died: {how}")])
        self._process.join()
        self._receiver.close()
        shutil.rmtree(self._folder)
        return report


def _work(
    recording: Recording,
    make_verify: Callable[[], Verify],
    wanted: list[StateId],
    deadline: float,
    drop: Drop,
    folder: Path,
    note: mmap.mmap,
    sender: Connection,
) -> None:
    faulthandler.disable()  # the death of a verifier is reported by its parent
    report = Report()
    seen: set[bytes] = set()
    marks = iter(recording.marks)
    mark = next(marks, None)
    known = 0
    verify = make_verify()
    for name, state in states(recording, wanted, drop):
        while mark is not None and mark.time < name.time:
            known += 1
            mark = next(marks, None)
        digest = _digest(state, known)
        if digest in seen:
            report.repeated += 1
            continue
        seen.add(digest)
        note[:] = f"{report.states} {name}".encode().ljust(_NOTE_BYTES, b"\0")
        write_state(state, folder)
        signal.setitimer(signal.ITIMER_REAL, VERIFY_TIMEOUT_S)  # its default action ends the process
        try:
            verify(folder, name.time)
        except Exception:
            report.violations.append((name, traceback.format_exc()))
        signal.setitimer(signal.ITIMER_REAL, 0)
        report.states += 1
        if len(report.violations) >= MAX_VIOLATIONS or time.monotonic() > deadline:
            break
    sender.send(report)
    sender.close()


def _digest(state: DiskState, marks: int) -> bytes:
    """Of a state, and of what is expected of it."""
    digest = xxhash.xxh3_128(f"{marks} {state.directories}".encode())
    for name, content in state.files.items():
        digest.update(f"{name} {len(content)} {state.modified[name]} ".encode())
        digest.update(content)
    return digest.digest()


def scratch_root() -> str | None:
    """Memory, where there is some to put files into."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
