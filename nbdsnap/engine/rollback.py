"""Rollback: the live volume gets a snapshot's content back.

It has it from one instant on, which is a transaction: ``rollback`` in the volume's record then names the snapshot's
epoch.  Until then nothing has changed; from then on, after a crash too, the volume's content *is* the snapshot's, and
what is left is to put it in place::

    writes wait, what was acknowledged is in place  <  the record says ``rollback``  <  reads see the snapshot
    <  what changed since the snapshot is written over, in steps  <  synced
    (<  where it is the newest snapshot: the index forgets what it has of it  <  these slots are free)
    <  the record forgets it  <  reads see the volume itself, writes go on

* Only what changed since the snapshot is written, by the volume's ordinary operations: so whatever another snapshot
  still needs is preserved first, and a chunk that needs nothing is written in place.
* Reads are exact at any moment, since they see the snapshot.  Its chunks are all in the store where anything is
  written, so it reads the same the whole time.
* Steps are commands of the preserver, between which other volumes' operations have their turn.
* Done twice, a step does no harm, so nothing is remembered of how far it came: a start begins again, before the volume
  is served.
* The newest snapshot then differs in nothing from the live volume, and takes no space: no older state of the volume
  needs what was preserved since.
* The snapshot is open as long as that lasts, and its epoch is in the record: it can't be deleted, or dropped.

Where it can't go on (no space for what newer snapshots need, a disk that fails), reads still see the snapshot, and
writes fail until the same command, or the next start, brings it to its end.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from nbdsnap.engine.device import STATE_HOLE, STATE_ZERO, Device, Extent, Op, OpKind
from nbdsnap.engine.diff import changed_blocks, extents
from nbdsnap.engine.preserver import Preserver
from nbdsnap.engine.reclaim import END_OF_EPOCHS, forget_slice
from nbdsnap.engine.records import SnapshotRecord, VolumeRecord, VolumeState
from nbdsnap.engine.space import Space
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import ConflictError, CorruptionError, InUseError, NbdsnapError, NoSpaceError
from nbdsnap.models import RollbackReport
from nbdsnap.sizes import format_size
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.index import Index
from nbdsnap.store.layout import CHUNK

log = logging.getLogger(__name__)

Run = Callable[[Callable[[], bool]], bool]
Progress = Callable[[int, int], None]
"""Gets the bytes that are done, and all of them."""

STEP_BYTES = 4 << 20
"""Put in place by one command, while other volumes' operations wait: some tens of milliseconds."""

STEP_OPS = 1024

_ZEROES = bytes(CHUNK)


class View:
    """A snapshot, opened, as the content of a volume that has grown since: behind its end there are zeroes."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.name = device.name
        self.size = device.size
        self.read_only = True
        self.write_now = device.write_now
        self.writes_now = device.writes_now
        self.flush_now = device.flush_now
        self.submit = device.submit
        self.changes = device.changes
        self.close = device.close

    def _inside(self, offset: int, length: int) -> int:
        """Bytes of the range that are the snapshot's."""
        return max(0, min(length, self.size - offset))

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        inside = self._inside(offset, len(buffer))
        buffer[inside:] = bytes(len(buffer) - inside)
        return not inside or self.device.read_now(buffer[:inside], offset)

    def read(self, buffer: memoryview, offset: int) -> None:
        inside = self._inside(offset, len(buffer))
        buffer[inside:] = bytes(len(buffer) - inside)
        if inside:
            self.device.read(buffer[:inside], offset)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        inside = self._inside(offset, length)
        found = self.device.extents(offset, inside) if inside else []
        zeroes = STATE_HOLE | STATE_ZERO
        if inside < length:
            before = found.pop()[0] if found and found[-1][1] == zeroes else 0
            found.append((before + length - inside, zeroes))
        return found

    def depths(self, offset: int, length: int) -> list[Extent]:
        return [(size, 0 if flags & STATE_HOLE else 1) for size, flags in self.extents(offset, length)]

    def is_sparse(self) -> bool:
        return True

    def cache(self, offset: int, length: int) -> None:
        inside = self._inside(offset, length)
        if inside:
            self.device.cache(offset, inside)


@dataclass(frozen=True)
class Target:
    """What is put in place: ``snapshot`` of ``volume``, which ``view`` shows."""

    volume: Volume
    snapshot: SnapshotRecord
    view: View

    @property
    def name(self) -> str:
        return f"{self.volume.name}@{self.snapshot.name}"


class Rollbacks:
    """Of one pool, whose ``lock`` this is.  ``refuses``: whether a full store refuses writes."""

    def __init__(
        self,
        lock: threading.RLock,
        index: Index,
        store: ChunkStore,
        preserver: Preserver,
        space: Space,
        workers: Executor,
        *,
        refuses: bool,
    ) -> None:
        self._lock = lock
        self._index = index
        self._store = store
        self._preserver = preserver
        self._space = space
        self._workers = workers
        self._refuses = refuses
        self._running: set[Volume] = set()

    def plan(self, volume: Volume, snapshot: SnapshotRecord) -> RollbackReport:
        """What a rollback would do now."""
        with self._index.read() as reader:
            number = volume.record.number
            newer = dict(changed_blocks(reader, number, volume.newest_epoch, END_OF_EPOCHS))
            blocks = changed_blocks(reader, number, snapshot.epoch, END_OF_EPOCHS)
        total = sum(length for _, length in extents(blocks, volume.size, snapshot.size))
        if volume.record.origin is None:  # what is put in place may need a slot of its own in any case
            newer = {}
        kept = sum((members & ~newer.get(block, 0)).bit_count() for block, members in blocks)
        name = f"{volume.name}@{snapshot.name}"
        return RollbackReport(snapshot=name, bytes=total, preserved_bytes=kept * CHUNK, done=False)

    def roll_back(
        self, volume: Volume, snapshot: SnapshotRecord, device: Device, *, force: bool, progress: Progress | None
    ) -> RollbackReport:
        """Do it, or go on with it.  ``device``: the snapshot, opened; it is closed in here.

        Where ``progress`` raises, what has begun is finished in the background.
        """
        target = Target(volume, snapshot, View(device))
        with contextlib.ExitStack() as undo:
            undo.callback(device.close)
            with self._lock:
                _check_possible(target)
                if volume in self._running:
                    raise InUseError(f"volume {volume.name} is being rolled back", hint="wait until that is done")
                self._running.add(volume)
            undo.callback(self._running.discard, volume)
            plan = self.plan(volume, snapshot)
            if volume.record.rollback is None:
                self._check_room(plan)
                self._read_all(target)
                self._preserver.run(lambda: self._begin(target, force=force))
                log.info("volume %s: rolling back to %s", volume.name, target.name)
                undo.pop_all()
            else:  # its view is open from the first time on
                assert isinstance(volume.view, View)
                target = replace(target, view=volume.view)
                self._preserver.run(volume.park)
                undo.pop_all()
                device.close()
        try:
            self._finish(target, self._preserver.run, progress)
        except _AbandonedError as error:
            self._workers.submit(self._go_on, target)
            assert error.__cause__ is not None
            raise error.__cause__ from None
        return plan.model_copy(update={"done": True})

    def adopt(self, volume: Volume, snapshot: SnapshotRecord, device: Device) -> Target:
        """At start: an earlier process did not finish this one.  The volume shows it from here on."""
        target = Target(volume, snapshot, View(device))
        volume.park()
        volume.view = target.view
        return target

    def resume(self, target: Target) -> None:
        """Finish what was adopted, before the preserver's thread is started."""
        log.info("volume %s: going on with the rollback to %s", target.volume.name, target.name)
        self._finish(target, _run_here, None)

    # The steps

    def _check_room(self, plan: RollbackReport) -> None:
        room = self._space.room * CHUNK
        if self._refuses and plan.preserved_bytes > room:
            raise NoSpaceError(
                f"newer snapshots need up to {format_size(plan.preserved_bytes)} of what would be overwritten, "
                f"and the exception store has room for {format_size(room)}",
                hint="make room (store_limit, or the disk), or delete the newer snapshots",
            )

    def _read_all(self, target: Target) -> None:
        """Raise what would keep the snapshot from being read, before anything is changed."""
        buffer = memoryview(bytearray(STEP_BYTES))
        for offset, length in self._changes(target):
            if offset < target.view.size:
                target.view.read(buffer[:length], offset)

    def _begin(self, target: Target, *, force: bool) -> None:
        volume = target.volume
        if volume.connections and not force:
            raise InUseError(
                f"volume {volume.name} is open: {volume.connections} connections",
                hint="disconnect its clients first; or, with --force, change its content under them",
            )
        volume.park()
        try:
            self._preserver.drain([volume])
            self._put(volume, replace(volume.record, rollback=target.snapshot.epoch))
        except BaseException:
            volume.unpark()
            raise
        volume.view = target.view

    def _finish(self, target: Target, run: Run, progress: Progress | None) -> None:
        volume = target.volume
        try:
            total = sum(length for _, length in self._changes(target))
            done = 0
            for steps in self._steps(target):
                run(partial(self._apply, volume, steps))
                done += sum(step.op.length for step in steps)
                _report(progress, done, total)
            volume.sync_in_place()
            while run(partial(self._forget, target)):
                pass
            run(partial(self._end, target))
        except _AbandonedError:
            raise
        except BaseException as error:
            log.error("volume %s: the rollback to %s can't go on: %s", volume.name, target.name, error)
            volume.refuse_parked(_unfinished(target, error))
            self._running.discard(volume)
            raise
        log.info("volume %s: rolled back to %s", volume.name, target.name)

    def _go_on(self, target: Target) -> None:
        """In the background; nobody is there to be told."""
        with contextlib.suppress(Exception):
            self._finish(target, self._preserver.run, None)

    def _apply(self, volume: Volume, steps: Sequence[_Step]) -> bool:
        self._preserver.execute(volume, [step.op for step in steps])
        for step in steps:
            if step.failure is not None:
                raise step.failure
        return True

    def _forget(self, target: Target) -> bool:
        """Of what was put in place, and is synced.  Whether there is more."""
        volume = target.volume
        if target.snapshot.epoch != volume.newest_epoch:
            return False
        slots, more = forget_slice(self._index, volume.record.number, target.snapshot.epoch)
        volume.generation += 1  # before the slots are used again: see SnapshotDevice
        self._store.free(slots)
        return more

    def _end(self, target: Target) -> bool:
        volume = target.volume
        self._put(volume, replace(volume.record, rollback=None))
        volume.forget_exclusive()
        volume.unpark()
        target.view.close()
        self._running.discard(volume)
        return True

    def _put(self, volume: Volume, record: VolumeRecord) -> None:
        self._index.update(lambda txn: txn.put_volume(record.number, record.to_json()))
        with self._lock:
            volume.record = record

    # What to write

    def _changes(self, target: Target) -> Iterator[tuple[int, int]]:
        """``(offset, length)`` of what differs, or may, in pieces of at most STEP_BYTES."""
        with self._index.read() as reader:
            blocks = changed_blocks(reader, target.volume.record.number, target.snapshot.epoch, END_OF_EPOCHS)
        for start, size in extents(blocks, target.volume.size, target.snapshot.size):
            for offset in range(start, start + size, STEP_BYTES):
                yield offset, min(STEP_BYTES, start + size - offset)

    def _steps(self, target: Target) -> Iterator[list[_Step]]:
        step: list[_Step] = []
        size = 0
        for offset, length in self._changes(target):
            if step and (size + length > STEP_BYTES or len(step) >= STEP_OPS):
                yield step
                step, size = [], 0
            step.extend(_operations(target.view, offset, length))
            size += length
        if step:
            yield step


class _AbandonedError(Exception):
    """Progress could not be reported; its cause says why."""


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is None:
        return
    try:
        progress(done, total)
    except BaseException as error:
        raise _AbandonedError from error


class _Step:
    """An operation, and what it failed with."""

    def __init__(self, kind: OpKind, offset: int, length: int, data: memoryview | None = None) -> None:
        self.failure: BaseException | None = None
        self.op = Op(kind, offset, length, self._done, data)

    def _done(self, failure: BaseException | None) -> None:
        self.failure = failure


def _operations(view: View, offset: int, length: int) -> Iterator[_Step]:
    """What makes a range of the volume equal to ``view``: data is written, zeroes are trimmed."""
    if offset >= view.size:
        yield _Step(OpKind.TRIM, offset, length)
        return
    content = memoryview(bytearray(length))
    view.read(content, offset)
    start = 0
    while start < length:
        zeroes = _is_zero(content, start)
        end = start + CHUNK
        while end < length and _is_zero(content, end) == zeroes:
            end += CHUNK
        end = min(end, length)
        if zeroes:
            yield _Step(OpKind.TRIM, offset + start, end - start)
        else:
            yield _Step(OpKind.WRITE, offset + start, end - start, content[start:end])
        start = end


def _is_zero(content: memoryview, start: int) -> bool:
    chunk = content[start : start + CHUNK]
    return not chunk[0] and bytes(chunk) == _ZEROES[: len(chunk)]


def _check_possible(target: Target) -> None:
    volume, snapshot = target.volume, target.snapshot
    if snapshot.size > volume.size:
        raise ConflictError(
            f"{target.name} has {snapshot.size} bytes, and volume {volume.name} only {volume.size}",
            hint="resize the volume to at least the snapshot's size first",
        )
    pending = volume.record.rollback
    if pending is not None and pending != snapshot.epoch:
        (other,) = (one.name for one in volume.snapshots if one.epoch == pending)
        raise InUseError(
            f"volume {volume.name} is being rolled back to {volume.name}@{other}", hint="let that one finish first"
        )


def _unfinished(target: Target, error: BaseException) -> BaseException:
    """What waiting writes are told."""
    if isinstance(error, NbdsnapError | OSError):
        return error
    return NbdsnapError(f"the rollback of volume {target.volume.name} to {target.name} is not finished: {error}")


def _run_here(command: Callable[[], bool]) -> bool:
    return command()


def find_target(state: VolumeState) -> SnapshotRecord | None:
    """The snapshot of the rollback that an earlier process left undone."""
    if state.record.rollback is None:
        return None
    for snapshot in state.snapshots:
        if snapshot.epoch == state.record.rollback:
            return snapshot
    raise CorruptionError(
        f"volume {state.name} is being rolled back to a snapshot that is not there", hint="run: nbdsnap check"
    )
