"""Receiving a snapshot that another pool has: all of it appears, at one instant, or nothing.

While it comes in, the volume shows what it held before::

    what was acknowledged is in place  <  one transaction: the *stage*, a snapshot that nobody sees, and the record
    ``receiving``  <  reads see the stage  <  what comes is written in place  <  synced  <  one transaction: the new
    snapshot, and no ``receiving``  <  reads see the volume itself  <  the stage's space is given back

* What comes is written by the volume's ordinary operations, so whatever a snapshot (the stage at least) still needs is
  preserved first.
* To undo it is to roll back to the stage (:mod:`nbdsnap.engine.rollback`), which holds its promises after a crash, too.
* A *resumable* one that was cut stays as it is, over restarts: the volume shows the stage, and refuses writes.  The
  record says how far it came: up to a position that was synced.  Any other is undone, by the next start if need be.
* A volume without snapshots that holds nothing but zeroes needs no stage: nothing is to be preserved, so it takes what
  comes as fast as its file does.  To undo that is to make it all zeroes again.

Snapshots have identifiers, which a received one takes over: it is known by it as the base of what comes next,
whichever pool that comes from.  A base counts as unchanged where the live volume's content is still its own, whatever
was written in between.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime

from nbdsnap.engine.deletion import Deletions
from nbdsnap.engine.device import STATE_HOLE, STATE_ZERO, Device, Op, OpKind
from nbdsnap.engine.diff import changed_blocks, extents
from nbdsnap.engine.preserver import Preserver
from nbdsnap.engine.reclaim import END_OF_EPOCHS
from nbdsnap.engine.records import JsonObject, SnapshotRecord, VolumeState, now
from nbdsnap.engine.rollback import Rollbacks, View
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import AlreadyExistsError, ConflictError, InUseError, NbdsnapError, WrongBaseError
from nbdsnap.sizes import format_size
from nbdsnap.store.index import Index, IndexWriter

log = logging.getLogger(__name__)

STAGE_NAME = ".receiving"
"""No user can give or name it."""

Data = bytes | bytearray | memoryview
Opener = Callable[[Volume, SnapshotRecord], Device]
"""Opens a snapshot."""

Reader = Volume | Device

COMPARE_BYTES = 1 << 20
TRIM_BYTES = 1 << 30


@dataclass(frozen=True)
class Arrival:
    """What is to be received.

    ``base``: the identifier of the snapshot that the volume has to hold; ``base_name`` is for people.
    """

    id: str
    name: str
    size: int
    created: datetime
    base: str | None = None
    base_name: str = ""
    start: int = 0
    digest: str = ""


class Blank:
    """What a volume of zeroes shows: a device without content."""

    read_only = True

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        buffer[:] = bytes(len(buffer))
        return True

    def read(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = bytes(len(buffer))

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(length, STATE_HOLE | STATE_ZERO)]

    def depths(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(length, 0)]

    def changes(self, base: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        raise AssertionError("a view is compared with nothing")

    def is_sparse(self) -> bool:
        return True

    def write_now(self, offset: int, data: memoryview) -> bool:
        raise AssertionError("a view takes no writes")

    def writes_now(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool]:
        raise AssertionError("a view takes no writes")

    def flush_now(self) -> bool:
        return True

    def submit(self, op: Op) -> None:
        raise AssertionError("a view takes no writes")

    def cache(self, offset: int, length: int) -> None:
        pass

    def close(self) -> None:
        pass


class Receives:
    """Of one pool, whose ``lock`` this is."""

    def __init__(
        self,
        lock: threading.RLock,
        index: Index,
        preserver: Preserver,
        rollbacks: Rollbacks,
        deletions: Deletions,
        workers: Executor,
        opener: Opener,
    ) -> None:
        self.lock = lock
        self.index = index
        self.preserver = preserver
        self.rollbacks = rollbacks
        self.deletions = deletions
        self.workers = workers
        self.open_snapshot = opener
        self.active: set[Volume] = set()

    # At start

    def adopt(self, volume: Volume) -> None:
        """What an earlier process did not finish: kept where it is resumable, else to be undone."""
        receiving = volume.record.receiving
        if receiving is None:
            return
        stage = find_stage(volume)
        if receiving["resumable"] or stage is None:
            volume.park()
            volume.view = self._view(volume, stage)
            volume.refuse_parked(_refusal(volume))
            return
        log.info("volume %s: what was received of %s is undone", volume.name, receiving["name"])
        record = replace(volume.record, receiving=None, rollback=stage.epoch)
        self.index.update(lambda txn: txn.put_volume(record.number, record.to_json()))
        volume.record = record

    def tidy(self, volumes: Sequence[VolumeState]) -> None:
        """After the start: finish what needs the preserver's thread."""
        for volume in volumes:
            if not isinstance(volume, Volume):
                continue
            receiving = volume.record.receiving
            if receiving is not None and not receiving["resumable"]:
                self.undo(volume)
            elif receiving is None:
                self._drop_stage(volume)

    def _view(self, volume: Volume, stage: SnapshotRecord | None) -> Device:
        return Blank(volume.name, volume.size) if stage is None else View(self.open_snapshot(volume, stage))

    # Beginning

    def begin(self, volume: Volume, arrival: Arrival, *, name: str, force: bool, resumable: bool) -> Receive:
        """Prepare the volume for what comes.  All that can be refused is refused here, with nothing changed.

        ``force``: a volume that was written since the base is rolled back to it first, whoever has it open.
        """
        with self.lock:
            if volume in self.active:
                raise InUseError(f"volume {volume.name} is receiving already", hint="wait until that is done")
            self.active.add(volume)
        with ExitStack() as undo:
            undo.callback(self.active.discard, volume)
            receiving = volume.record.receiving
            if receiving is not None:
                if arrival.start:
                    receive = self._continue(volume, arrival, receiving, resumable=resumable)
                    undo.pop_all()
                    return receive
                self.undo(volume)
            elif arrival.start:
                raise ConflictError(
                    f"volume {volume.name} has nothing of an earlier stream to go on with",
                    hint="send the snapshot from its beginning",
                )
            base = self._check(volume, arrival, name)
            if force and base is not None and self._differs(volume, base):
                self.rollbacks.roll_back(volume, base, self.open_snapshot(volume, base), force=True, progress=None)
            self.preserver.run(lambda: self._park(volume, force=force))
            try:
                if base is not None and self._differs(volume, base):
                    raise WrongBaseError(
                        f"volume {volume.name} was written since {volume.name}@{base.name}, where the delta begins",
                        hint="--force gives up what was written, and rolls the volume back first",
                    )
                self.preserver.run(lambda: self._stage(volume, arrival, name, resumable=resumable))
            except BaseException:
                volume.unpark()
                raise
            receive = Receive(self, volume, arrival, name)
            undo.pop_all()
        receive.clear_tail()
        return receive

    def _continue(self, volume: Volume, arrival: Arrival, receiving: JsonObject, *, resumable: bool) -> Receive:
        """Go on with what an earlier stream has begun."""
        if (arrival.id, arrival.base) != (receiving["id"], receiving["base"]):
            raise ConflictError(
                f"volume {volume.name} has begun to receive {receiving['name']}, which this stream does not go on with",
                hint=f"`nbdsnap receive {volume.name} --resume` says what is missing",
            )
        if (arrival.start, arrival.digest) != (receiving["position"], receiving["digest"]):
            raise ConflictError(
                f"the stream goes on at {arrival.start}, but volume {volume.name} has {receiving['position']}",
                hint=f"`nbdsnap receive {volume.name} --resume` says what is missing",
            )
        self._put(volume, {**receiving, "resumable": resumable})
        return Receive(self, volume, arrival, receiving["name"])

    def _check(self, volume: Volume, arrival: Arrival, name: str) -> SnapshotRecord | None:
        """What needs no look at the volume's content.  Returns the base."""
        volume.check_not_rolling_back()
        if arrival.size > volume.size:
            raise ConflictError(
                f"volume {volume.name} has {format_size(volume.size)}, and the snapshot {format_size(arrival.size)}",
                hint=f"resize it first: nbdsnap volume resize {volume.name} {arrival.size}",
            )
        if volume.find(name) is not None:
            raise AlreadyExistsError(
                f"snapshot {volume.name}@{name} exists already",
                hint="receive it under another --name, or delete that one",
            )
        if arrival.base is None:
            return None
        for snapshot in volume.snapshots:
            if snapshot.id == arrival.base:
                return snapshot
        raise WrongBaseError(
            f"volume {volume.name} does not have the snapshot that the delta starts from ({arrival.base_name}, "
            f"{arrival.base})",
            hint="send the snapshot whole, or from one that both sides have",
        )

    def _park(self, volume: Volume, *, force: bool) -> None:
        volume.check_not_rolling_back()
        if volume.connections and not (force or volume.record.replica):
            raise InUseError(
                f"volume {volume.name} is open: {volume.connections} connections", hint="disconnect its clients first"
            )
        volume.park()
        try:
            self.preserver.drain([volume])
        except BaseException:
            volume.unpark()
            raise

    def _differs(self, volume: Volume, base: SnapshotRecord) -> bool:
        """Whether the live content is not the base's, as far as the base goes."""
        self.preserver.run(lambda: None)  # what was acknowledged is in the index then
        with self.index.read() as reader:
            blocks = changed_blocks(reader, volume.record.number, base.epoch, END_OF_EPOCHS)
        device = self.open_snapshot(volume, base)
        try:
            for start, size in extents(blocks, volume.size, volume.size):
                for offset in range(start, min(start + size, base.size), COMPARE_BYTES):
                    length = min(COMPARE_BYTES, start + size - offset, base.size - offset)
                    if _content(device, offset, length) != _content(volume, offset, length):
                        return True
        finally:
            device.close()
        return False

    def _stage(self, volume: Volume, arrival: Arrival, name: str, *, resumable: bool) -> None:
        """On the preserver's thread.  From here on there is something to undo."""
        record = volume.record
        stage = None
        if not self.is_blank(volume):
            stage = SnapshotRecord(record.epoch, STAGE_NAME, volume.size, now(), held=True)
            record = replace(record, epoch=record.epoch + 1)
        receiving: JsonObject = {
            "id": arrival.id,
            "base": arrival.base,
            "base_name": arrival.base_name,
            "name": name,
            "size": arrival.size,
            "position": 0,
            "digest": "",
            "resumable": resumable,
        }
        record = replace(record, receiving=receiving)

        def change(txn: IndexWriter) -> None:
            if stage is not None:
                txn.put_snapshot(record.number, stage.epoch, stage.to_json())
            txn.put_volume(record.number, record.to_json())

        volume.sync_in_place()
        self.index.update(change)
        with self.lock:
            volume.record = record
            if stage is not None:
                volume.add_snapshot(stage)
                volume.forget_exclusive()
        volume.view = self._view(volume, stage)
        volume.refuse_parked(_refusal(volume))

    def is_blank(self, volume: Volume) -> bool:
        return not volume.snapshots and all(flags & STATE_ZERO for _, flags in volume.extents(0, volume.size))

    def _put(self, volume: Volume, receiving: JsonObject | None) -> None:
        def change() -> None:
            record = replace(volume.record, receiving=receiving)
            self.index.update(lambda txn: txn.put_volume(record.number, record.to_json()))
            with self.lock:
                volume.record = record

        self.preserver.run(change)

    # Ending

    def undo(self, volume: Volume) -> None:
        """Give the volume back what it held, and let it be used again."""
        receiving = volume.record.receiving
        assert receiving is not None
        stage = find_stage(volume)
        if stage is None:
            self._make_blank(volume)
            return

        def begin() -> None:
            record = replace(volume.record, receiving=None, rollback=stage.epoch)
            self.index.update(lambda txn: txn.put_volume(record.number, record.to_json()))
            with self.lock:
                volume.record = record

        self.preserver.run(begin)
        self.rollbacks.roll_back(volume, stage, self.open_snapshot(volume, stage), force=True, progress=None)
        self._drop_stage(volume)

    def abort(self, volume: Volume) -> None:
        """Undo what was cut, and nothing goes on with now."""
        with self.lock:
            if volume in self.active:
                raise InUseError(f"volume {volume.name} is receiving", hint="end the command that sends to it")
            if volume.record.receiving is None:
                raise ConflictError(f"volume {volume.name} has not begun to receive anything")
            self.active.add(volume)
        try:
            self.undo(volume)
        finally:
            self.active.discard(volume)

    def _make_blank(self, volume: Volume) -> None:
        for start, size in list(_data(volume)):
            for offset in range(start, start + size, TRIM_BYTES):
                self.execute(volume, [Step(OpKind.TRIM, offset, min(TRIM_BYTES, start + size - offset))])
        volume.sync_in_place()
        self._put(volume, None)
        volume.unpark()

    def _drop_stage(self, volume: Volume) -> None:
        stage = find_stage(volume)
        if stage is not None:
            self.preserver.run(lambda: self.deletions.mark(lambda: {volume: [stage]}))
            self.deletions.start(volume.name, [stage])

    def finish(self, volume: Volume, arrival: Arrival, name: str) -> SnapshotRecord:
        """All has come and was verified: it is the volume's content, and a snapshot, from here on."""
        volume.sync_in_place()  # what is parked is not written any more, so this is all
        return self.preserver.run(lambda: self._finish(volume, arrival, name))

    def _finish(self, volume: Volume, arrival: Arrival, name: str) -> SnapshotRecord:
        stage = find_stage(volume)
        record = volume.record
        snapshot = SnapshotRecord(record.epoch, name, arrival.size, arrival.created, id=arrival.id)
        record = replace(record, epoch=record.epoch + 1, receiving=None)

        def change(txn: IndexWriter) -> None:
            txn.put_snapshot(record.number, snapshot.epoch, snapshot.to_json())
            if stage is not None:
                txn.put_snapshot(record.number, stage.epoch, replace(stage, deleting=True).to_json())
            txn.put_volume(record.number, record.to_json())

        self.index.update(change)
        view = volume.view
        with self.lock:
            volume.record = record
            volume.set_snapshots([one for one in volume.snapshots if one is not stage])
            volume.add_snapshot(snapshot)
            if stage is not None:
                stage.deleting = True
                volume.deleting.append(stage)
            volume.forget_exclusive()
        volume.unpark()
        assert view is not None
        view.close()
        if stage is not None:
            self.deletions.start(volume.name, [stage])
        return snapshot

    # In between

    def execute(self, volume: Volume, steps: Sequence[Step]) -> None:
        """Do ``steps`` in place, in one go; raises what the first failure was."""
        self.preserver.run(lambda: self.preserver.execute(volume, [step.op for step in steps]))
        for step in steps:
            step.op.data = None  # a step and its operation know each other: they are not freed at once
            if step.failure is not None:
                raise step.failure


class Step:
    """An operation, and what it failed with."""

    def __init__(self, kind: OpKind, offset: int, length: int, data: Data | None = None) -> None:
        self.failure: BaseException | None = None
        self.op = Op(kind, offset, length, self._done, data)

    def _done(self, failure: BaseException | None) -> None:
        self.failure = failure


class Receive:
    """One receive under way.  Exactly one of :meth:`finish`, :meth:`undo` and :meth:`leave` ends it.

    ``base``: the volume as it was before, to make sense of differences.  Methods are for one thread at a time, but
    ``base``'s for any.
    """

    def __init__(self, receives: Receives, volume: Volume, arrival: Arrival, name: str) -> None:
        assert volume.view is not None
        self._receives = receives
        self.volume = volume
        self.arrival = arrival
        self.name = name
        self.base: Device = volume.view

    def clear_tail(self) -> None:
        """Zeroes where the stream will have no word: behind the base where the volume is to grow, and behind all of a
        snapshot without a base."""
        start = self.arrival.size
        if self.arrival.base is not None:
            (base,) = (one for one in self.volume.snapshots if one.id == self.arrival.base)
            start = min(base.size, start)
        try:
            end = self.volume.size if self.arrival.base is None else self.arrival.size
            for offset in range(start, end, TRIM_BYTES):
                self.apply([Step(OpKind.TRIM, offset, min(TRIM_BYTES, end - offset))])
        except BaseException:
            self.undo()
            raise

    def apply(self, steps: Sequence[Step]) -> None:
        self._receives.execute(self.volume, steps)

    @property
    def resumable(self) -> bool:
        receiving = self.volume.record.receiving
        return receiving is not None and bool(receiving["resumable"])

    def checkpoint(self, position: int, digest: str) -> None:
        """All below ``position`` was applied: a later stream can go on from there."""
        receiving = self.volume.record.receiving
        assert receiving is not None
        self.volume.sync_in_place()
        self._receives._put(self.volume, {**receiving, "position": position, "digest": digest})

    def finish(self) -> SnapshotRecord:
        """InUseError and the like leave it as it is: :meth:`undo` it then."""
        snapshot = self._receives.finish(self.volume, self.arrival, self.name)
        self._receives.active.discard(self.volume)
        log.info("volume %s: received %s", self.volume.name, self.name)
        return snapshot

    def undo(self) -> None:
        try:
            self._receives.undo(self.volume)
        finally:
            self._receives.active.discard(self.volume)

    def leave(self) -> None:
        """Keep what came, for a later stream to go on with."""
        self._receives.active.discard(self.volume)


def find_stage(volume: VolumeState) -> SnapshotRecord | None:
    return volume.find(STAGE_NAME)


def _refusal(volume: Volume) -> NbdsnapError:
    return InUseError(f"volume {volume.name} is receiving a snapshot, and takes no writes until it is there")


def _content(device: Reader, offset: int, length: int) -> bytearray:
    content = bytearray(length)
    device.read(memoryview(content), offset)
    return content


def _data(volume: Volume) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of what is not zero, in place."""
    for start, end in volume.origin.data_extents(0, volume.size):
        yield start, end - start
