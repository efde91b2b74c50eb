"""The preserver: one thread that copies old content out before it is overwritten, and does all that changes the index.

The order of durability, which every crash test checks::

    old content in the store  <  its index record  <  the overwrite in place  <  the intent's retirement  <  the slot's
    reuse

A batch is everything that waits when the thread gets to it, from all volumes and connections:

1. what its operations are about to overwrite is preserved (:mod:`nbdsnap.engine.preservation`): two or three syncs,
   however many operations there are;
2. they are applied in place, and those that wait are answered.

Two kinds of operation come here.  An *intent* was acknowledged when it was appended to the log
(:meth:`Preserver.append`); its owner is gone.  Any other operation waits: bulk writes, zeroing, and whatever finds the
log full, which bounds what is pending.

Checkpoints
-----------
Now and then the origins are synced and the log is told to retire what has arrived (:meth:`Preserver.checkpoint`): when
it is half full, when nothing else is to do, and at least every second.  An operation that wrote in place over a live
intent is answered only after a checkpoint, since a replay would undo it.

Stalls
------
An intent that can't be applied (no space for what it must preserve, a disk that fails) was acknowledged, so it stays
pending, where reads see it.  Its volume is *stalled*: it takes no further intents, later ones queue up behind, and all
are tried again every second, and after each command.  A volume whose sync failed takes nothing more until the next
start, its intents neither.

The log is everyone's, so it must not wait for them: the next checkpoint copies all intents of such a volume that the
log still has into the volume's own file (:mod:`nbdsnap.store.stranded`), durably, and the log goes on.  When a stalled
volume has caught up, and its origin is synced, the file goes; only then may these chunks be written in place, since
until then a start would replay it.

A failed sync of the log is final for that log.  What was in it is durable in place, or in those files, at the next
checkpoint, which begins a new log instead of retiring.

Promises
--------
No intent is taken whose chunks might find the store full: what is acknowledged and not preserved yet is counted against
the space that is certainly free (:class:`~nbdsnap.engine.space.Space`).  Past that, writes wait for the truth.

Everything else that changes the index is a *command*: a function that runs between two batches, hence sees no half-done
operation.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from nbdsnap.engine.device import Op
from nbdsnap.engine.inbox import Inbox
from nbdsnap.engine.pending import IntentGroup, joined
from nbdsnap.engine.preservation import Item, Obstacles, Preservation
from nbdsnap.engine.space import Space, is_full
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import ConflictError, DeviceError, NbdsnapError, NoSpaceError
from nbdsnap.store.batchio import BatchIO
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.index import Index
from nbdsnap.store.intentlog import Intent, IntentLog
from nbdsnap.store.layout import CHUNK, CHUNK_SHIFT, chunk_count
from nbdsnap.store.stranded import StrandedIntents

log = logging.getLogger(__name__)

T = TypeVar("T")

BATCH_OPS = 4096
BATCH_BYTES = 64 << 20
"""A batch takes no more operations, or payload, than this; one longer operation is a batch of its own."""

SLICE_CHUNKS = 4096
"""Chunks preserved with one commit: 16 MiB of old content in memory."""

CHECKPOINT_IDLE_S = 0.05
CHECKPOINT_S = 1.0
"""Seconds without work, or at most between two checkpoints."""

RETRY_S = 1.0
"""Seconds between two tries to apply what is stalled."""

Command = Callable[[], None]


class Preserver:
    """Owns the index's write side, the store's allocation and the log.  ``submit``, ``append`` and ``run`` are for any
    thread."""

    def __init__(
        self,
        index: Index,
        store: ChunkStore,
        intent_log: IntentLog,
        space: Space,
        stranded: StrandedIntents,
        batch: BatchIO | None,
    ) -> None:
        self.index = index
        self.store = store
        self.log = intent_log
        self.batch = batch
        self.preservation = Preservation(index, store, space, batch, SLICE_CHUNKS)
        self._space = space
        self._promised = 0
        """Chunks of all intents that were ever taken; under ``_append_lock``."""
        self._kept = 0
        """Those of them that are accounted for in the store, or stalled."""
        self._stranded = stranded
        self._inbox: Inbox[Item | Command] = Inbox()
        self._append_lock = threading.Lock()
        self._deferred: deque[Command] = deque()
        """Commands that :meth:`drain` found in the inbox: their turn comes after the present one."""
        self._stalled: list[tuple[Volume, IntentGroup]] = []
        self._retried = 0.0
        self._newest: Intent | None = None
        """The newest intent that was applied, or stalled."""
        self._touched: set[Volume] = set()
        """Volumes of the intents that were applied, or stalled, since the last checkpoint."""
        self._checkpointed = time.monotonic()
        self.obstacle: str | None = None
        """Why the last checkpoint failed."""
        self._stop_lock = threading.Lock()
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._loop, name="preserver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, volume: Volume, op: Op) -> None:
        self._inbox.put((volume, op), urgent=True)

    def append(self, volume: Volume, writes: Sequence[tuple[int, memoryview]]) -> list[Intent]:
        """Acknowledge writes ``(offset, data)`` from the log: as many, from the first on, as can be now.

        Under the volume's lock.
        """
        if self.log.failure is not None:
            return []  # not to wait here for a new log
        with self._append_lock:  # the queue has intents in the log's order
            room = self._space.room - self._promised + self._kept
            while writes and _chunks_of(writes) > room:  # room may be less than none: it has shrunk since
                writes = writes[:-1]
            intents = self.log.append(volume.record.number, writes)
            if intents:
                group = IntentGroup(intents)
                self._promised += group.chunks
                self._inbox.put((volume, group), urgent=False, weight=len(intents))
        return intents

    def run(self, command: Callable[[], T], timeout: float | None = None) -> T:
        """Run ``command`` on the preserver's thread, between batches; its result, or its exception, is the caller's.

        Raises TimeoutError after ``timeout`` seconds; the command runs all the same.

        Intents appended before this call are applied before the command runs, unless they are stalled.
        """
        future: Future[T] = Future()

        def execute() -> None:
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        with self._stop_lock:
            if self._stopping:
                raise ConflictError("the pool is being closed")
            self._inbox.put(execute, urgent=True)
        return future.result(timeout)

    def stop(self) -> None:
        """Finish what was submitted, leave the log empty where that is possible, and end the thread.

        From here on :meth:`run` raises ConflictError.
        """
        with self._stop_lock:
            self._stopping = True
            self._inbox.put(self._end, urgent=True)
        self._thread.join()
        if self.batch is not None:
            self.batch.close()

    def _end(self) -> None:
        self._ended = True
        try:
            self.drain([])
        except (OSError, NbdsnapError) as error:
            log.error("acknowledged writes stay in the intent log until the next start: %s", error)

    # The thread

    def _loop(self) -> None:
        while not self._ended:
            batch, command = self._gather()
            if batch:
                self._process(self._inside(batch))
            if command is not None:
                command()
                self._space.refresh()
                self._retried = 0.0  # perhaps it made room
            self._look_after(idle=not batch and command is None)

    def _gather(self) -> tuple[list[Item], Command | None]:
        """The operations up to the next command, and the command; neither where nothing came for a while."""
        if self._deferred:
            return [], self._deferred.popleft()
        batch: list[Item] = []
        if not self._inbox.wait(self._patience()):
            return batch, None
        count = size = 0
        item = self._inbox.take()
        while isinstance(item, tuple):
            batch.append(item)
            what = item[1]
            if isinstance(what, IntentGroup):
                count += len(what.intents)
                size += what.chunks * CHUNK
            else:
                count += 1
                size += what.length
            if count >= BATCH_OPS or size >= BATCH_BYTES:
                self._inbox.hurry()
                return batch, None
            item = self._inbox.take()
        return batch, item

    def _patience(self) -> float | None:
        """Seconds to wait for work before looking after what was left."""
        if self._touched and self.obstacle is None:
            return CHECKPOINT_IDLE_S
        return RETRY_S if self._stalled or self._touched else None

    def _look_after(self, *, idle: bool) -> None:
        moment = time.monotonic()
        if self._stalled and moment - self._retried >= RETRY_S and (idle or not self._inbox):
            self._retry()
        overdue = moment - self._checkpointed > CHECKPOINT_S
        if self._touched and (idle or overdue or (self.log.is_half_full and self.obstacle is None)):
            try:
                self.checkpoint()
            except (OSError, NbdsnapError) as error:
                if self.obstacle != str(error):
                    log.error("a checkpoint failed, and is tried again every second: %s", error)
                self.obstacle = str(error)

    def checkpoint(self) -> None:
        """Make all arrived intents durable in place and retire them, so that their chunks may be written past the
        log."""
        self._checkpointed = time.monotonic()
        if not self._touched:
            return
        stuck = {volume for volume in self._touched if not self._settle(volume)}
        newest = self._newest
        assert newest is not None
        self._retire(newest)
        touched, self._touched = self._touched, set()
        for volume in touched - stuck:
            volume.retired(newest.sequence + 1)
        self.obstacle = None

    def _retire(self, newest: Intent) -> None:
        if self.log.failure is None:
            try:
                if newest.sequence >= self.log.tail_sequence:
                    self.log.retire(newest.end, newest.sequence + 1)
                return
            except (OSError, DeviceError):
                pass  # the log says that it failed
        with self._append_lock:
            if self._promised != self._kept:
                raise DeviceError(self.log.failure)  # intents are still on their way here: the next time
            log.error("%s; beginning a new one", self.log.failure)
            self.log.renew()

    def sync_log(self, sequence: int) -> None:
        """Make durable all intents up to ``sequence``.  Not from the preserver's thread.

        A log whose sync failed may have lost them.  But they are in memory until they are in place: so then they are
        made durable there, and a new log begins.
        """
        try:
            self.log.sync()
        except (OSError, DeviceError) as error:
            log.error("a sync of the intent log failed: %s", error)
            with self._append_lock:
                pass  # no intent is on its way to the queue any more
            self.run(lambda: self.drain([]))
            if self.log.synced_sequence < sequence:
                raise

    def _settle(self, volume: Volume) -> bool:
        """Make the volume's intents durable, in place (True), or in a file of their own."""
        with contextlib.suppress(OSError, NbdsnapError):  # it is the volume's failure then
            volume.sync_in_place()
        if volume.failure is None and volume.stalled is None:
            if volume.stranded:
                self._stranded.remove(volume.record.number)
                volume.stranded = 0
            return True
        last = volume.intents.last_sequence  # it takes no more
        if volume.stranded < last:
            number = volume.record.number
            live = [intent for intent in self.log.live() if intent.volume == number]
            self._stranded.add(number, [intent for intent in live if intent.sequence > volume.stranded])
            volume.stranded = last
        return False

    def execute(self, volume: Volume, ops: Sequence[Op]) -> None:
        """Preserve for, and apply, ``ops`` of that volume at once.  From a command."""
        for start in range(0, len(ops), BATCH_OPS):
            self._process([(volume, op) for op in ops[start : start + BATCH_OPS]])

    def drain(self, volumes: Sequence[Volume]) -> None:
        """Apply all that waits, and retire it.  From a command, with closed gates of ``volumes``.

        Afterwards none of ``volumes`` has a live intent; raises the reason where one still has.
        """
        batch: list[Item] = []
        for _ in range(len(self._inbox)):  # with closed gates, what matters is in there by now
            item = self._inbox.take()
            if isinstance(item, tuple):
                batch.append(item)
            elif item is not None:
                self._deferred.append(item)
            if len(batch) == BATCH_OPS:
                self._process(self._inside(batch))
                batch = []
        if batch:
            self._process(self._inside(batch))
        self._retry()
        self.checkpoint()
        for volume in volumes:
            if volume.intents:
                raise volume.obstacle() or _still_live()

    def _retry(self) -> None:
        self._retried = time.monotonic()
        stalled, self._stalled = self._stalled, []
        if not stalled:
            return
        self._process(list(stalled), again=True)
        left = {volume for volume, _ in self._stalled}
        for volume in {volume for volume, _ in stalled} - left:
            if volume.failure is None:
                volume.stall(None)

    # Batches

    def _process(self, batch: list[Item], *, again: bool = False) -> None:
        """Preserve what the batch's operations need, then apply them.  Each one is answered, or is an intent and
        kept.

        ``again``: they are the stalled ones; else those of stalled volumes have to wait behind them.
        """
        batch = _merged(batch)
        obstacles = self.preservation.make_way(batch)
        stuck = {} if again else {volume: volume.stalled for volume, _ in batch if volume.stalled is not None}
        over_intents: list[tuple[Volume, Op]] = []
        for volume, item in batch:
            if isinstance(item, IntentGroup):
                self._apply_intents(volume, item, obstacles, stuck)
                continue
            try:
                obstacles.check(volume, item)
                if volume in stuck:
                    raise stuck[volume]
                volume.apply(item)
            except Exception as error:
                self._failed(volume, item, error)
                continue
            if volume.intents and volume.is_over_intents(item):
                over_intents.append((volume, item))
            else:
                volume.finish(item, None)
        self._space.refresh()
        if not again:  # after the refresh: what they took is not room any more
            self._kept += sum(item.chunks for _, item in batch if isinstance(item, IntentGroup))
        if over_intents:
            self._finish_after_checkpoint(over_intents)

    def _inside(self, batch: list[Item]) -> list[Item]:
        """Those that do not pass their volume's end; for the others it came too near while they waited."""
        inside: list[Item] = []
        for volume, item in batch:
            if isinstance(item, IntentGroup) or item.offset + item.length <= volume.size:
                inside.append((volume, item))
            else:
                error = NoSpaceError(f"past the end: volume {volume.name} has {volume.size} bytes by now")
                volume.finish(item, error)
        return inside

    def _apply_intents(
        self, volume: Volume, group: IntentGroup, obstacles: Obstacles, stuck: dict[Volume, BaseException]
    ) -> None:
        """What can't be applied stalls the volume, and waits with all that is behind it."""
        self._touched.add(volume)
        intents = group.intents
        if self._newest is None or intents[-1].sequence > self._newest.sequence:
            self._newest = intents[-1]
        reason: BaseException | None = stuck.get(volume)
        applied = 0
        if reason is None:
            free, obstacle = obstacles.first(volume, intents)
            applied, failure = volume.apply_intents(intents[:free] if obstacle else intents)
            reason = failure or obstacle
        if reason is not None:
            stuck.setdefault(volume, reason)  # later ones must not overtake them
            volume.stall(reason)
            if volume.failure is None:  # else they wait for the next start
                self._stalled.append((volume, IntentGroup(intents[applied:])))

    def _failed(self, volume: Volume, op: Op, error: Exception) -> None:
        if is_full(error):
            self._space.refuse(error)
        else:
            log.warning("volume %s: %s at %d, %d bytes: %s", volume.name, op.kind.name, op.offset, op.length, error)
        volume.finish(op, error)

    def _finish_after_checkpoint(self, items: list[tuple[Volume, Op]]) -> None:
        failure: BaseException | None = None
        try:
            self.checkpoint()
        except Exception as error:
            failure = error
        for volume, op in items:  # a live intent that was logged since then is newer than the operation: no harm
            volume.finish(op, failure or volume.obstacle())


def _merged(batch: list[Item]) -> list[Item]:
    """With the groups of intents that follow each other, of one volume, as one."""
    merged: list[Item] = []
    before: tuple[Volume, list[IntentGroup]] | None = None

    def end() -> None:
        if before is not None:
            volume, groups = before
            merged.append((volume, groups[0] if len(groups) == 1 else joined(groups)))

    for volume, item in batch:
        if isinstance(item, IntentGroup):
            if before is not None and before[0] is volume:
                before[1].append(item)
                continue
            end()
            before = volume, [item]
        else:
            end()
            before = None
            merged.append((volume, item))
    end()
    return merged


def _chunks_of(writes: Sequence[tuple[int, memoryview]]) -> int:
    """How many chunks they touch, each counted for itself."""
    return sum(chunk_count(offset + len(data)) - (offset >> CHUNK_SHIFT) for offset, data in writes)


def _still_live() -> NbdsnapError:
    return NbdsnapError("older writes to this range wait in the intent log and can't be applied")
