"""A live volume: what its clients read and write now.

Where a write goes
------------------
A chunk is *exclusive* when no live snapshot needs its present content any more: there is none, or it is preserved.  A
write to exclusive chunks goes in place at once, on the caller's thread (:meth:`Volume.write_now`) or, if it might
wait, on a worker.  Any other goes to the :class:`~nbdsnap.engine.preserver.Preserver`, which copies the old content out
first: by way of the intent log where the write is short and there is room, and then it is acknowledged at once; else it
waits.  What a client sent together is logged together, with one call of the log (``writes_now``).

Which is which is asked of a bitmap that only remembers (:mod:`nbdsnap.store.chunkbits`); the index knows.

The barrier
-----------
``lock`` is held from the question to the end of the write it allowed (``write_now``), or the writer is counted
(``_writers``).  :meth:`close_gate` makes every later question answer no and waits for the writers: after it, no byte
of the volume changes but by the preserver's thread.  That is how a snapshot gets one instant.  Reads never wait for it.

Flushes
-------
``_written`` counts writes, each after it is done and before it is acknowledged; ``_synced`` is what it was when the
last good sync began.  Where they are equal there is nothing to flush.  One sync runs at a time: the kernel tells an
error of writing back only once, so a second sync beside the failed one would seem to have succeeded.

A rollback
----------
From its first moment to its last, reads see ``view``, the snapshot that is put in place meanwhile, and writes wait:
they are *parked* (:meth:`Volume.park`).  Nothing gets into the preserver's queue past the parking, since both happen
under ``lock``.  See :mod:`nbdsnap.engine.rollback`.

``generation`` counts the preserver's commits.  It is raised after a commit and before the first overwrite that the
commit allows, so a reader who finds it unchanged after reading live data knows that the data was not overwritten
meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nbdsnap.engine.device import STATE_HOLE, STATE_ZERO, Device, Op, OpKind
from nbdsnap.engine.pending import IntentSet, lay_over, uncovered
from nbdsnap.engine.records import SnapshotRecord, VolumeRecord, VolumeState
from nbdsnap.engine.sync import SyncGroup
from nbdsnap.errors import CorruptionError, DeviceError, InUseError, NbdsnapError
from nbdsnap.store.chunkbits import ChunkBits
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.intentlog import Intent
from nbdsnap.store.layout import CHUNK, CHUNK_SHIFT, chunk_count

if TYPE_CHECKING:
    from nbdsnap.engine.preserver import Preserver

log = logging.getLogger(__name__)

ARRIVE_INTENTS = 128
RETIRE_CHUNKS = 512
"""Chunks that are marked under the lock at a time: some tens of microseconds."""

CLOSED = -1
"""As the place where writes have to end: no write does."""

NOW_LIMIT = 256 << 10
"""Bytes: a longer write is copied on a worker thread, so that the caller's does not stand still for long."""


class Backing(Protocol):
    """What holds a volume's live data: an :class:`~nbdsnap.store.origin.Origin`, or
    :class:`~nbdsnap.engine.livechunks.LiveChunks`.  Offsets are the volume's."""

    fd: int
    path: Path

    def read_into(self, buffer: memoryview, offset: int) -> None: ...
    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None: ...
    def sync(self) -> None: ...
    def punch_hole(self, offset: int, length: int, *, fast: bool = False) -> None: ...
    def zero_range(self, offset: int, length: int) -> None: ...
    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]: ...
    def will_need(self, offset: int, length: int) -> None: ...
    def is_sparse(self) -> bool: ...
    def drop_cached(self, offset: int, length: int) -> None: ...
    def close(self) -> None: ...


class Volume(VolumeState):
    """A volume whose data can be reached: here an origin; others in :mod:`nbdsnap.engine.redirected`."""

    def __init__(
        self,
        record: VolumeRecord,
        snapshots: list[SnapshotRecord],
        origin: Backing,
        io: FileIO,
        preserver: Preserver,
        workers: Executor,
    ) -> None:
        super().__init__(record, snapshots)
        self.origin = origin
        self.generation = 0
        self.lock = threading.Lock()
        self.syncs = SyncGroup(self.sync, workers)
        self.failure: str | None = None
        """Why the volume takes no more writes: a sync failed, so what was written since the last good one may be
        lost."""
        self._fd = origin.fd
        self._pwrite = io.pwrite
        self._preadv = io.preadv
        self._preserver = preserver
        self._workers = workers
        self._limit = record.size
        """Where writes that need nothing of the preserver have to end: the volume's end, or before its beginning while
        the gate is closed."""
        self._exclusive: ChunkBits | None = None
        self.intents = IntentSet(chunk_count(record.size))
        self.stalled: BaseException | None = None
        """Why acknowledged writes can't be applied now: they wait in the log, and no more are taken into it."""
        self.stranded = 0
        """Sequence of the newest intent in the volume's own file; 0 where there is no file."""
        self.view: Device | None = None
        """What reads see while a rollback or a receive is under way."""
        self._parked: list[Op] | None = None
        """Operations that wait for the end of a rollback; None where none is under way."""
        self._refusal: BaseException | None = None
        """Why it can't go on: they need not wait for it."""
        self.forget_exclusive()
        self._writers = 0
        self._idle = threading.Condition(self.lock)
        self._sync_lock = threading.Lock()
        self._written = 1  # what an earlier process wrote may not be durable yet
        self._synced = 0

    @property
    def error(self) -> str | None:
        if self.record.receiving is not None:
            return None  # that is no error
        if self._refusal is not None:
            return f"a rollback is not finished: {self._refusal}"
        return self.failure or (f"writes are stalled: {self.stalled}" if self.stalled else None)

    # What callers on any thread do

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        view = self.view
        if view is not None:
            return view.read_now(buffer, offset)
        if self.intents.pending:
            return self._read_patched(buffer, offset, self.read_in_place_now)
        return self.read_in_place_now(buffer, offset)

    def read_in_place_now(self, buffer: memoryview, offset: int) -> bool:
        """What lies in the origin, without the pending writes; False where the disk would be waited for."""
        try:
            return self._preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return False
            raise

    def read(self, buffer: memoryview, offset: int) -> None:
        view = self.view
        if view is not None:
            try:
                view.read(buffer, offset)
                return
            except NbdsnapError:
                if self.view is view:
                    raise  # else what it showed is gone, and the volume itself is to be read
        try:
            self._read_patched(buffer, offset, self._read_in_place)
        except (OSError, CorruptionError):
            if not self.intents.pending:
                raise
            self._read_around(buffer, offset)

    def _read_in_place(self, buffer: memoryview, offset: int) -> bool:
        self.origin.read_into(buffer, offset)
        return True

    def _read_around(self, buffer: memoryview, offset: int) -> None:
        """Read only what no pending write is laid over: a bad sector may be about to be overwritten."""
        with self.lock:
            patches = self.intents.patches(offset, offset + len(buffer))
        for start, end in uncovered(offset, offset + len(buffer), patches):
            self.origin.read_into(buffer[start - offset : end - offset], start)
        lay_over(buffer, offset, patches)

    def _read_patched(self, buffer: memoryview, offset: int, read: Callable[[memoryview, int], bool]) -> bool:
        """Read, and lay the pending writes over it.

        They are looked up first: one that arrives in place meanwhile is then only laid over itself.
        """
        with self.lock:
            patches = self.intents.patches(offset, offset + len(buffer))
        if not read(buffer, offset):
            return False
        if patches:
            lay_over(buffer, offset, patches)
        return True

    def write_now(self, offset: int, data: memoryview) -> bool:
        return self.writes_now(((offset, data),))[0]

    def writes_now(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool]:
        done = [False] * len(writes)
        later: list[int] = []
        """Positions of those that go to the log."""
        with self.lock:
            limit = self._limit
            if limit < 0:
                return done
            exclusive = self._exclusive
            bits = None if exclusive is None else exclusive.bits
            for position, (offset, data) in enumerate(writes):
                length = len(data)
                if length > NOW_LIMIT or offset + length > limit:
                    continue
                if (offset | length) & (CHUNK - 1) and not self._edges_cached(offset, offset + length):
                    continue
                if bits is not None:
                    chunk = offset >> CHUNK_SHIFT
                    if length <= CHUNK and not offset & (CHUNK - 1):
                        if not bits[chunk >> 3] >> (chunk & 7) & 1:
                            later.append(position)
                            continue
                    else:
                        assert exclusive is not None
                        if not exclusive.covers(chunk, end := chunk_count(offset + length)):
                            exclusive.remove(range(chunk, end))  # some may have been, and now have an intent
                            later.append(position)
                            continue
                try:
                    written = self._pwrite(self._fd, data, offset)
                    if written != length:
                        self.origin.write(data[written:], offset + written)
                except OSError:
                    continue  # the other way will have the same error, and somebody to tell
                self._written += 1
                done[position] = True
            if later:
                for position in later[: self._write_intents([writes[position] for position in later])]:
                    done[position] = True
        return done

    def _write_intents(self, writes: Sequence[tuple[int, memoryview]]) -> int:
        """Under ``lock``: acknowledge from the log as many, from the first on, as that is possible for.

        None of their chunks is exclusive.
        """
        if self.stalled is not None:
            return 0
        intents = self._preserver.append(self, writes)
        if intents:
            self.intents.add(intents)
        return len(intents)

    def _log(self, op: Op) -> bool:
        assert op.data is not None
        if self._exclusive is not None:
            self._exclusive.remove(range(op.offset >> CHUNK_SHIFT, chunk_count(op.offset + op.length)))
        return self._write_intents(((op.offset, memoryview(op.data)),)) == 1

    def flush_now(self) -> bool:
        if self.failure is not None or self._synced != self._written:
            return False
        synced: int = self._preserver.log.synced_sequence
        return self.intents.last_sequence <= synced

    def submit(self, op: Op) -> None:
        if op.kind == OpKind.FLUSH:
            self.syncs.request(op.done)
            return
        self._submit(op, edges_read=False)

    def _submit(self, op: Op, *, edges_read: bool) -> None:
        with self.lock:
            refusal = self._refusal
            may_go = op.offset + op.length <= self._limit
            in_place = may_go and self._is_exclusive(op)
            if in_place:
                self._writers += 1
            may_log = may_go and not in_place and op.kind == OpKind.WRITE
            cold = may_log and not edges_read and not self._edges_cached(op.offset, op.offset + op.length)
            logged = may_log and not cold and self._log(op)
            if not (in_place or cold or logged) and refusal is None:
                if self._parked is None:
                    self._preserver.submit(self, op)
                else:
                    self._parked.append(op)
        if cold:
            self._workers.submit(self._read_edges, op)
            return
        if in_place:
            self._workers.submit(self._write_counted, op)
        elif logged:
            self.finish(op, None)
        elif refusal is not None:
            self.finish(op, refusal)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        view = self.view
        if view is not None:
            return view.extents(offset, length)
        with self.lock:
            patches = self.intents.patches(offset, offset + length)
        data = list(self.origin.data_extents(offset, length))
        data += [(intent.offset, intent.offset + len(intent.data)) for intent in patches]
        return extents_of(sorted(data), offset, offset + length)

    def depths(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(size, 0 if flags & STATE_HOLE else 1) for size, flags in self.extents(offset, length)]

    def is_sparse(self) -> bool:
        return self.origin.is_sparse()

    def pending_chunks(self, first: int, end: int) -> Sequence[int]:
        """Those of the chunks [first, end) with acknowledged writes that are not in place yet, nor, perhaps, in the
        index.  While a rollback is under way that may be any."""
        with self.lock:
            return range(first, end) if self.is_rolling_back else list(self.intents.pending_chunks(first, end))

    def cache(self, offset: int, length: int) -> None:
        view = self.view
        if view is not None:
            view.cache(offset, length)
        else:
            self.cache_in_place(offset, length)

    def cache_in_place(self, offset: int, length: int) -> None:
        self.origin.will_need(offset, length)

    # What the bitmap says

    def _is_exclusive(self, op: Op) -> bool:
        """Under ``lock``."""
        if self._exclusive is None:
            return True
        return self._exclusive.covers(op.offset >> CHUNK_SHIFT, chunk_count(op.offset + op.length))

    def missing(self, chunks: Iterable[int]) -> list[int]:
        """Those of ``chunks`` that are not known to be exclusive.  On the preserver's thread."""
        return [] if self._exclusive is None else self._exclusive.missing(chunks)

    def mark_exclusive(self, chunks: list[int]) -> None:
        """The chunks are preserved for every live snapshot.  Those with a live intent stay out until it is retired."""
        with self.lock:
            if self._exclusive is not None:
                live = self.intents.live
                self._exclusive.add([chunk for chunk in chunks if chunk not in live])

    def mark_block_exclusive(self, block: int, members: int) -> None:
        """The same for a whole block's set."""
        with self.lock:
            if self._exclusive is not None:
                self._exclusive.add_block(block, members & ~self.intents.live_in_block(block))

    def retired(self, sequence: int) -> None:
        """The log has retired all intents before ``sequence``, so their chunks may be written in place."""
        more = True
        while more:
            with self.lock:  # a part at a time: readers and writers wait for it
                free, more = self.intents.retired(sequence, RETIRE_CHUNKS)
                if self._exclusive is not None:
                    self._exclusive.add(free)
        with self.lock:
            if not self.snapshots and not self.intents:
                self._exclusive = None

    def _edges_cached(self, offset: int, end: int) -> bool:
        """Whether the pages that an unaligned write only half covers can be had without waiting for the disk."""
        probe = memoryview(bytearray(1))
        if offset & (CHUNK - 1) and not self.read_in_place_now(probe, offset):
            return False
        return not end & (CHUNK - 1) or self.read_in_place_now(probe, end - 1)

    def _read_edges(self, op: Op) -> None:
        """Read what an unaligned write only half covers, before it is acknowledged: on a bad sector it can't be
        applied."""
        probe = memoryview(bytearray(1))
        try:
            for place in (op.offset, op.offset + op.length - 1):
                self.read(probe, place)  # pending writes count
        except (OSError, NbdsnapError) as error:
            self.finish(op, error)
            return
        self._submit(op, edges_read=True)

    def is_over_intents(self, op: Op) -> bool:
        """Whether a live intent lies in ``op``'s range: a replay would undo it there."""
        with self.lock:
            return self.intents.any_live(op.offset >> CHUNK_SHIFT, chunk_count(op.offset + op.length))

    def stall(self, reason: BaseException | None) -> None:
        """Acknowledged writes can't be applied, or (None) may be tried again."""
        if reason is not None and self.stalled is None:
            log.error("volume %s: acknowledged writes wait in the intent log: %s", self.name, reason)
        with self.lock:
            self.stalled = reason

    def obstacle(self) -> BaseException | None:
        """What keeps acknowledged writes from being applied."""
        return DeviceError(self.failure) if self.failure is not None else self.stalled

    def check_not_stalled(self) -> None:
        """Raise where the index does not know of every difference between the live volume and its snapshots."""
        self.check_not_rolling_back()
        obstacle = self.obstacle()
        if obstacle is not None and self.intents:
            raise obstacle

    # The barrier

    def close_gate(self) -> None:
        """From the return of this on, only the preserver's thread changes the volume."""
        with self.lock:
            self._limit = CLOSED
            self._idle.wait_for(lambda: self._writers == 0)

    def open_gate(self) -> None:
        with self.lock:
            self._limit = self.size if self.failure is None else CLOSED

    def resized(self) -> None:
        """The record has another size.  With a closed gate, and no intents."""
        assert not self.intents
        intents = IntentSet(chunk_count(self.size))
        intents.last_sequence = self.intents.last_sequence
        with self.lock:
            self.intents = intents
        self.forget_exclusive()

    def park(self) -> None:
        """Close the gate, and let all operations wait that come from now on, until :meth:`unpark`."""
        with self.lock:
            self._parked = []
            self._refusal = None
        self.close_gate()

    def unpark(self) -> None:
        """Read and write the volume itself again, beginning with what waits."""
        with self.lock:
            parked, self._parked = self._parked or [], None
            self._refusal = None
            self.view = None
        self.open_gate()
        for op in parked:
            self.submit(op)

    def refuse_parked(self, refusal: BaseException) -> None:
        """What waits for the end of the rollback, or would, fails: it can't go on now."""
        with self.lock:
            parked, self._parked = self._parked or [], []
            self._refusal = refusal
        for op in parked:
            self.finish(op, refusal)

    @property
    def is_rolling_back(self) -> bool:
        return self._parked is not None

    def check_not_rolling_back(self) -> None:
        if self.record.receiving is not None:
            raise InUseError(
                f"volume {self.name} is receiving a snapshot",
                hint=f"try again when that is done; or undo it: nbdsnap receive {self.name} --abort",
            )
        if self.is_rolling_back:
            raise InUseError(f"volume {self.name} is being rolled back", hint="try again when that is done")

    def forget_exclusive(self) -> None:
        """The newest snapshot is another one than before: ask the index again, or nobody where there is none."""
        with self.lock:
            self._exclusive = ChunkBits(chunk_count(self.size)) if self.snapshots or self.intents else None

    # Doing it

    def _write_counted(self, op: Op) -> None:
        failure: BaseException | None = None
        try:
            self.apply(op)
        except Exception as error:
            failure = error
        with self.lock:
            self._writers -= 1
            if not self._writers:
                self._idle.notify_all()
        self.finish(op, failure)

    def apply_intents(self, intents: list[Intent]) -> tuple[int, Exception | None]:
        """Write what the oldest pending intents hold in place, up to the first where that fails.

        Returns how many arrived, and that failure.  The log keeps all of them until :meth:`sync_in_place`.
        """
        if self.failure is not None:
            return 0, DeviceError(self.failure)
        failure: Exception | None = None
        done = 0
        first = 0
        batch = self._preserver.batch
        if batch is not None and len(intents) > 1:
            undone = batch.write(self._fd, [(one.address or 0, len(one.data), one.offset) for one in intents])
            first = undone[0] if undone else len(intents)
        try:
            for done in range(first, len(intents)):  # all from there on: a later one may lie over it
                self.origin.write(intents[done].data, intents[done].offset)
            done = len(intents)
        except Exception as error:
            failure = error
        self._arrived(intents[:done] if failure else intents)
        return done, failure

    def _arrived(self, intents: list[Intent]) -> None:
        for start in range(0, len(intents), ARRIVE_INTENTS):
            with self.lock:  # a part at a time: readers and writers wait for it
                self.intents.arrived(intents[start : start + ARRIVE_INTENTS])

    def apply(self, op: Op) -> None:
        """Do a WRITE, TRIM or ZERO in place.  Everything in its range is exclusive, or is not changed by it."""
        if self.failure is not None:
            raise DeviceError(self.failure)
        if op.kind == OpKind.WRITE:
            assert op.data is not None
            self.origin.write(op.data, op.offset)
        elif op.kind == OpKind.ZERO and op.no_hole:
            self.origin.zero_range(op.offset, op.length)
        else:
            self.origin.punch_hole(op.offset, op.length, fast=op.fast)
        with self.lock:
            self._written += 1

    def finish(self, op: Op, failure: BaseException | None) -> None:
        """Tell ``op``'s owner how it went, after a sync where it asked for one."""
        if failure is None and op.fua:
            self.syncs.request(op.done)
        else:
            op.done(failure)

    def changed_chunks(self, op: Op) -> Iterator[tuple[int, int]]:
        """Half-open ranges of the chunks whose content ``op`` may change: for zeroing, those that hold data."""
        if op.kind == OpKind.WRITE:
            yield op.offset >> CHUNK_SHIFT, chunk_count(op.offset + op.length)
            return
        done = 0
        for start, end in self.origin.data_extents(op.offset, op.length):
            first = max(start >> CHUNK_SHIFT, done)
            done = chunk_count(end)
            if first < done:
                yield first, done

    def sync(self) -> None:
        """Make durable all that was acknowledged before this call: in place, or in the log."""
        if self._written != self._synced or self.failure is not None:
            self.sync_in_place()
        last = self.intents.last_sequence
        if last > self._preserver.log.synced_sequence:
            self._preserver.sync_log(last)

    def sync_in_place(self) -> None:
        """Make durable all that was written in place before this call.

        A failed sync is final: the kernel may have dropped the pages that it could not write, so that a second one
        would succeed without them.  The volume takes no more writes; reads go on.
        """
        with self._sync_lock:
            if self.failure is not None:
                raise DeviceError(self.failure)
            written = self._written
            try:
                self.origin.sync()
            except OSError as error:
                self.fail(f"a sync of {self.origin.path} failed ({error.strerror}): its latest writes may be lost")
                raise
            self._synced = written

    def sync_latest(self) -> None:
        """Likewise, where anything was written since the last good sync.  With a closed gate, and no intent: what the
        preserver writes for those is not counted."""
        if self._written != self._synced or self.failure is not None:
            self.sync_in_place()

    def fail(self, why: str) -> None:
        log.error("volume %s takes no more writes: %s", self.name, why)
        with self.lock:
            self.failure = why
            self._limit = CLOSED

    def close(self) -> None:
        self.origin.close()


def data_and_holes(origin: Backing, offset: int, length: int) -> list[tuple[int, int]]:
    """``(length, flags)`` extents of a range of an origin: see :meth:`nbdsnap.engine.device.Device.extents`."""
    return extents_of(origin.data_extents(offset, length), offset, offset + length)


def extents_of(data: Iterable[tuple[int, int]], offset: int, end: int) -> list[tuple[int, int]]:
    """``data``: ascending ranges, which may touch or overlap; what is between them is holes."""
    found: list[tuple[int, int]] = []

    def add(length: int, flags: int) -> None:
        if found and found[-1][1] == flags:
            found[-1] = found[-1][0] + length, flags
        elif length:
            found.append((length, flags))

    position = offset
    for low, high in data:
        low, high = max(low, position), min(high, end)
        if low < high:
            add(low - position, STATE_HOLE | STATE_ZERO)
            add(high - low, 0)
            position = high
    add(end - position, STATE_HOLE | STATE_ZERO)
    return found
