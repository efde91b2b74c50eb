"""Load on a pool from several threads, with a journal of what each asked for and was told.

Writers own disjoint bytes of a volume: in its first half slices that end inside sectors, so that writers share chunks
and sectors; in its second half runs of chunks.  Each keeps several operations under way, never two on the same
bytes.  Beside them snapshots are taken (of one volume, or of all at one instant), read, and deleted in any order.

:mod:`tests.support.expectation` says from the journal what the pool must hold.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nbdsnap.engine.device import Device, Op, OpKind
from nbdsnap.errors import InUseError, NbdsnapError, NotFoundError, ServerError
from tests.support.client import DisconnectedError
from tests.support.deadline import Deadline
from tests.support.history import content

SLICE = 1300
"""Bytes of a slice: shares chunks and sectors with its neighbours."""

RUN = 4 * 4096
DEPTH = 3
"""Operations of one writer under way at once."""

HOT_RANGES = DEPTH + 2

MAX_SNAPSHOTS = 5
CALMS = (0, 0, 10, 40)
"""Operations between two snapshots: at once, or when most writes go in place again."""

TIMEOUT_S = 60.0

_KINDS = (OpKind.WRITE, OpKind.ZERO, OpKind.TRIM, OpKind.FLUSH)
_WEIGHTS = (60, 10, 10, 20)


class Journal(Protocol):
    """Takes events in the order of their happening.  Safe to use from any thread."""

    def record(self, event: str, **fields: Any) -> None:
        """Before a request is sent, or after its answer is there."""

    def keep(self, name: str, content: bytes) -> None:
        """The content of a snapshot, as it was read."""


class MemoryJournal:
    """Times are positions in ``events``."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.images: dict[str, bytes] = {}

    def record(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def keep(self, name: str, content: bytes) -> None:
        self.images[name] = content

    def timed(self) -> list[tuple[int, dict[str, Any]]]:
        return list(enumerate(self.events))


class SnapshotTarget(Protocol):
    """What :class:`Snapshots` and :class:`Reader` need of a :class:`~tests.support.targets.Target`."""

    def open(self, name: str) -> Device: ...

    def close(self, device: Device) -> None: ...

    def snapshot_create(self, names: Sequence[str]) -> object: ...

    def snapshot_delete(self, names: Sequence[str]) -> object: ...


@dataclass(frozen=True)
class Plan:
    """``count``: operations of each writer.  ``first``: the number before the first operation's.  ``prefix``: of the
    snapshots' names.  ``snapshots``: how many are taken at least.  ``tolerant``: operations may fail, and snapshots may
    vanish."""

    sizes: Mapping[str, int]
    seed: int
    count: int
    writers: int = 2
    first: int = 0
    prefix: str = "s"
    snapshots: int = 3
    tolerant: bool = False


def owned(size: int, writer: int, writers: int) -> list[tuple[int, int]]:
    """``(offset, length)`` of the ranges of a volume that a writer owns."""
    half = size // 2
    slices = [(offset, min(SLICE, half - offset)) for offset in range(0, half, SLICE)]
    runs = [(offset, min(RUN, size - offset)) for offset in range(half, size, RUN)]
    return [where for number, where in enumerate(slices + runs) if number % writers == writer]


class Worker(threading.Thread):
    """``failure``: what it died of.  A server that is gone ends it without one."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        try:
            self.work()
        except (DisconnectedError, ServerError, ConnectionError):
            return
        except BaseException as error:
            self.failure = error

    def work(self) -> None:
        raise NotImplementedError


class Progress:
    """Counts what the writers have done, for who wants to wait for some of it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._count = 0
        self._ended = False

    def add(self) -> None:
        with self._condition:
            self._count += 1
            self._condition.notify_all()

    def end(self) -> None:
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def wait_for_more(self, count: int) -> None:
        """Until ``count`` more operations are done, or there will be none."""
        with self._condition:
            wanted = self._count + count
            self._condition.wait_for(lambda: self._ended or self._count >= wanted, TIMEOUT_S)


class Writer(Worker):
    """Keeps DEPTH operations under way on its own bytes of one volume, never two on the same.

    Half of them are on a few hot ranges: what is written again soon after meets the engine in the middle of things.
    """

    def __init__(
        self,
        device: Device,
        journal: Journal,
        numbers: itertools.count[int],
        progress: Progress,
        plan: Plan,
        writer: int,
    ) -> None:
        super().__init__(f"{device.name} writer {writer}")
        self._device = device
        self._journal = journal
        self._numbers = numbers
        self._progress = progress
        self._seed = plan.seed
        self._count = plan.count
        self._tolerant = plan.tolerant
        self._rng = random.Random(f"{plan.seed} {plan.first} {device.name} {writer}")
        self._ranges = owned(plan.sizes[device.name], writer, plan.writers)
        hot = random.Random(f"{plan.seed} {device.name} {writer}")  # the same in each run
        self._hot = hot.sample(self._ranges, min(HOT_RANGES, len(self._ranges)))
        self._places = threading.Semaphore(DEPTH)
        self._lock = threading.Lock()
        self._busy: set[tuple[int, int]] = set()
        self._gone: BaseException | None = None

    def work(self) -> None:
        """Zeroes, and a flush of them, come first: a run may begin where another was cut off in the middle."""
        self._begin(OpKind.ZERO, self._hot)
        self._drain()
        self._begin(OpKind.FLUSH)
        for _ in range(self._count):
            if self.stopping.is_set():
                break
            among = self._hot if self._rng.random() < 0.5 else self._ranges
            self._begin(self._rng.choices(_KINDS, _WEIGHTS)[0], among)
        self._drain()

    def _begin(self, kind: OpKind, among: Sequence[tuple[int, int]] = ()) -> None:
        """Start an operation on one of the ranges ``among``, when there is a place for it."""
        self._wait_for_place()
        number = next(self._numbers)
        if kind == OpKind.FLUSH:
            self._flush(number)
        else:
            self._change(kind, number, among)

    def _drain(self) -> None:
        """Wait until nothing is under way."""
        for _ in range(DEPTH):
            self._wait_for_place()
        self._places.release(DEPTH)

    def _wait_for_place(self) -> None:
        if not self._places.acquire(timeout=TIMEOUT_S):
            raise TimeoutError(f"{self.name}: an operation is not done")
        if self._gone is not None:
            raise self._gone

    def _flush(self, number: int) -> None:
        self._journal.record("flush", number=number, volume=self._device.name)
        done = self._done(number, None)
        if self._device.flush_now():
            done(None)
        else:
            self._device.submit(Op(OpKind.FLUSH, 0, 0, done))

    def _change(self, kind: OpKind, number: int, among: Sequence[tuple[int, int]]) -> None:
        rng = self._rng
        with self._lock:
            where = rng.choice([where for where in among if where not in self._busy])
            self._busy.add(where)
        start, size = where
        low = rng.choice((0, rng.randrange(size)))
        length = rng.choice((size - low, rng.randint(1, size - low)))
        offset = start + low
        fua = rng.random() < 0.1
        data = content(self._seed, number, length) if kind == OpKind.WRITE else None
        self._journal.record(
            "change", number=number, volume=self._device.name, kind=kind.name, offset=offset, length=length, fua=fua
        )
        done = self._done(number, where)
        at_once = data is not None and not fua and rng.random() < 0.7
        no_hole = kind == OpKind.ZERO and rng.random() < 0.3
        try:
            if at_once and data is not None and self._device.write_now(offset, memoryview(data)):
                done(None)
                return
        except OSError as error:
            done(error)
            return
        self._device.submit(Op(kind, offset, length, done, data, fua=fua, no_hole=no_hole))

    def _done(self, number: int, where: tuple[int, int] | None) -> Callable[[BaseException | None], None]:
        def done(failure: BaseException | None) -> None:
            if failure is None:
                self._journal.record("done", number=number)
            elif self._tolerant and isinstance(failure, (OSError, NbdsnapError)):
                self._journal.record("failed", number=number)  # it may have been done, in part
            else:
                self._gone = failure
            if where is not None:
                with self._lock:
                    self._busy.discard(where)
            self._progress.add()
            self._places.release()

        return done


class Snapshots(Worker):
    """Takes, reads and deletes snapshots until it is told to stop and has taken enough; or none at all."""

    def __init__(self, target: SnapshotTarget, journal: Journal, progress: Progress, plan: Plan) -> None:
        super().__init__("snapshots")
        self._progress = progress
        self._target = target
        self._journal = journal
        self._plan = plan
        self._rng = random.Random(f"{plan.seed} {plan.first} snapshots")
        self._live: list[str] = []
        self.images: dict[str, bytes] = {}
        """Of those that live; for readers."""

    def work(self) -> None:
        if not self._plan.snapshots:
            return
        for number in itertools.count(1):
            if self.stopping.is_set() and number > self._plan.snapshots:
                break
            self._progress.wait_for_more(self._rng.choice(CALMS))
            self._take(number)
            while len(self._live) > MAX_SNAPSHOTS:
                self._remove(self._rng.sample(self._live, self._rng.randint(1, 2)))
        if self._rng.random() < 0.5:  # one volume may end without any
            volume = self._rng.choice(sorted(self._plan.sizes))
            self._remove([name for name in self._live if name.startswith(f"{volume}@")])

    def _take(self, number: int) -> None:
        volumes = sorted(self._plan.sizes)
        chosen = volumes if self._rng.random() < 0.5 else [self._rng.choice(volumes)]
        names = [f"{volume}@{self._plan.prefix}{number}" for volume in chosen]
        self._journal.record("create", names=names)
        try:
            self._target.snapshot_create(names)
        except (OSError, NbdsnapError):
            if not self._plan.tolerant:
                raise
            return
        self._journal.record("created", names=names)
        for name in names:
            try:
                device = self._target.open(name)
            except NotFoundError:
                if not self._plan.tolerant:
                    raise
                continue
            image = bytearray(device.size)
            device.read(memoryview(image), 0)
            self._target.close(device)
            self._journal.keep(name, bytes(image))
            self.images[name] = bytes(image)
            self._live.append(name)

    def _remove(self, names: list[str]) -> None:
        if not names:
            return
        self._journal.record("delete", names=names)
        try:
            self._target.snapshot_delete(names)
        except InUseError:  # a reader has one of them open: all or none
            self._journal.record("kept", names=names)
            return
        except NotFoundError:  # some of them vanished meanwhile; which of the others are there does not matter any more
            if not self._plan.tolerant:
                raise
        else:
            self._journal.record("deleted", names=names)
        for name in names:
            self._live.remove(name)
            del self.images[name]


class Reader(Worker):
    """Reads parts of snapshots, which must never change, whatever else goes on."""

    def __init__(self, target: SnapshotTarget, snapshots: Snapshots, plan: Plan, number: int) -> None:
        super().__init__(f"reader {number}")
        self._target = target
        self._snapshots = snapshots
        self._rng = random.Random(f"{plan.seed} {plan.first} reader {number}")

    def work(self) -> None:
        while not self.stopping.wait(0.001):
            known = sorted(self._snapshots.images.items())
            if known:
                self._read(*self._rng.choice(known))

    def _read(self, name: str, image: bytes) -> None:
        try:
            device = self._target.open(name)
        except NotFoundError:  # deleted meanwhile
            return
        for _ in range(20):
            offset = self._rng.randrange(len(image))
            length = self._rng.randint(1, min(len(image) - offset, 64 * 1024))
            buffer = bytearray(length)
            if not device.read_now(memoryview(buffer), offset):
                device.read(memoryview(buffer), offset)
            assert buffer == image[offset : offset + length], f"{name} at {offset}, {length} bytes, has changed"
        self._target.close(device)


def run(target: SnapshotTarget, journal: Journal, plan: Plan, *, connections: int = 1, readers: int = 0) -> None:
    """All of it, to its end.  ``connections``: devices for the writers of one volume, each in turn."""
    load = Load(target, journal, plan, connections=connections, readers=readers)
    load.start()
    load.finish()


class Load:
    """The threads.  :meth:`start`, then :meth:`finish`; or :meth:`abort` when the server has been killed."""

    def __init__(
        self, target: SnapshotTarget, journal: Journal, plan: Plan, *, connections: int = 1, readers: int = 0
    ) -> None:
        self._target = target
        self._devices = {name: [target.open(name) for _ in range(connections)] for name in plan.sizes}
        numbers = itertools.count(plan.first + 1)
        self._progress = Progress()
        self._writers = [
            Writer(devices[writer % connections], journal, numbers, self._progress, plan, writer)
            for devices in self._devices.values()
            for writer in range(plan.writers)
        ]
        self._snapshots = Snapshots(target, journal, self._progress, plan)
        self._readers = [Reader(target, self._snapshots, plan, number) for number in range(readers)]

    @property
    def _workers(self) -> list[Worker]:
        return [*self._writers, self._snapshots, *self._readers]

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def wait_for(self, count: int) -> None:
        """Until so many more operations are done."""
        self._progress.wait_for_more(count)

    def finish(self) -> None:
        """Wait for the writers, then stop the others, and close everything.  Raises what any of them died of."""
        deadline = Deadline(TIMEOUT_S)
        self._join(self._writers, deadline)
        self._stop()
        self._join([*self._readers, self._snapshots], deadline)
        for devices in self._devices.values():
            for device in devices:
                self._target.close(device)

    def abort(self) -> None:
        """The server is gone: every worker notices.  Raises what one died of otherwise."""
        self._stop()
        self._join(self._workers, Deadline(TIMEOUT_S))

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stopping.set()
        self._progress.end()

    def _join(self, workers: Sequence[Worker], deadline: Deadline) -> None:
        for worker in workers:
            worker.join(deadline.remaining())
            if worker.is_alive():
                raise TimeoutError(f"{worker.name} does not end")
            if worker.failure is not None:
                raise worker.failure
