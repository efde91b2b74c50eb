"""Receiving a delta stream into a volume of a pool.

One thread reads the stream, checks and unpacks it; another puts in place what came, in batches.  The snapshot appears
when the end has come and was verified (:mod:`nbdsnap.engine.receiving`); whatever happens before that is undone, or,
for a resumable receive whose stream was only cut, kept as far as its last checkpoint.
"""

from __future__ import annotations

import logging
import threading
from queue import Full, Queue

from nbdsnap.delta.decoder import Checkpoint, End, Extent, Extents
from nbdsnap.delta.format import NO_DIGEST, Encoding, Header
from nbdsnap.engine.device import OpKind
from nbdsnap.engine.pool import Pool
from nbdsnap.engine.receiving import TRIM_BYTES, Arrival, Receive, Step
from nbdsnap.errors import DeltaCutError, NbdsnapError, NotFoundError
from nbdsnap.models import ReceiveReport
from nbdsnap.transfer.pace import Progress
from nbdsnap.transfer.streams import TICK_S, ByteSource, Source, read_events
from nbdsnap.transfer.token import Token

log = logging.getLogger(__name__)

BATCH_BYTES = 8 << 20
BATCH_STEPS = 2048
"""What is put in place at a time: it takes a few syncs, whatever it is."""

BATCHES_AHEAD = 2


class Writer:
    """A thread of its own for what waits for disks.  What it failed with is raised by the next call."""

    def __init__(self, receive: Receive, progress: Progress) -> None:
        self._receive = receive
        self._progress = progress
        self._queue: Queue[list[Step] | Checkpoint | None] = Queue(BATCHES_AHEAD)
        self._batch: list[Step] = []
        self._bytes = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="receive")
        self._thread.start()

    def add(self, step: Step) -> None:
        self._batch.append(step)
        self._bytes += 0 if step.op.data is None else step.op.length
        if self._bytes >= BATCH_BYTES or len(self._batch) >= BATCH_STEPS:
            self._flush()

    def checkpoint(self, event: Checkpoint) -> None:
        self._flush()
        self._put(event)

    def close(self) -> None:
        """All that was added is in place, or this raises why not."""
        self._flush()
        self._put(None)
        while self._thread.is_alive():
            self._thread.join(TICK_S)
            self._progress.tick()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Drop what is not in place yet; afterwards, nothing is under way."""
        self._failure = self._failure or DeltaCutError("given up")
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=TICK_S)
            except Full:
                continue
            self._thread.join(TICK_S)

    def _flush(self) -> None:
        if self._batch:
            batch, self._batch, self._bytes = self._batch, [], 0
            self._put(batch)

    def _put(self, item: list[Step] | Checkpoint | None) -> None:
        while True:
            if self._failure is not None:
                raise self._failure
            try:
                self._queue.put(item, timeout=TICK_S)
                return
            except Full:
                self._progress.tick()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is not None:
                continue
            try:
                if isinstance(item, Checkpoint):
                    self._receive.checkpoint(item.position, item.digest.hex())
                else:
                    self._receive.apply(item)
            except BaseException as error:
                self._failure = error


def receive(
    pool: Pool,
    volume: str,
    source: ByteSource,
    progress: Progress,
    *,
    name: str | None = None,
    create: bool = False,
    force: bool = False,
    resumable: bool = False,
) -> ReceiveReport:
    """Receive one snapshot.  Where this raises, nothing has changed, or the error's hint says how to go on."""
    under_way: Receive | None = None
    writer: Writer | None = None
    covered = 0
    created = False
    try:
        for event in read_events(source):
            match event:
                case Header():
                    created = create and _create(pool, volume, event)
                    under_way = pool.receive_begin(volume, arrival(event), name=name, force=force, resumable=resumable)
                    writer = Writer(under_way, progress)
                    progress.total = event.estimate
                case Extents():
                    assert under_way is not None and writer is not None
                    for extent in event.extents:
                        _add(writer, under_way, extent)
                        covered += 0 if extent.encoding is Encoding.ZERO else extent.length
                    progress.advance(covered)
                case Checkpoint():
                    assert writer is not None and under_way is not None
                    if under_way.resumable:
                        writer.checkpoint(event)
                case End():
                    assert writer is not None and under_way is not None
                    writer.close()
                    snapshot = under_way.finish()
                    return ReceiveReport(
                        snapshot=f"{volume}@{snapshot.name}",
                        size=snapshot.size,
                        stream_bytes=source.received,
                        bytes=event.covered,
                        digest=event.digest.hex(),
                        done=True,
                    )
        raise AssertionError("a stream that ends has an end")
    except BaseException as error:
        if under_way is None:
            if created:
                pool.volume_delete(volume)
            raise
        if writer is not None:
            writer.abandon()
        if under_way.resumable and _says_nothing_against_the_data(error):
            under_way.leave()
            raise _to_be_resumed(pool, volume, error) from None
        _undo(under_way)
        if created:
            pool.volume_delete(volume)
        raise


def _says_nothing_against_the_data(error: BaseException) -> bool:
    """A cut, a full disk, or that nobody waits for the receive any more."""
    return isinstance(error, DeltaCutError) or not isinstance(error, NbdsnapError)


def _create(pool: Pool, volume: str, header: Header) -> bool:
    """A thin volume to receive into, where there is none of that name; whether one was made."""
    if any(one.name == volume for one in pool.volume_list()):
        return False
    if header.base is not None:
        raise NotFoundError(
            f"there is no volume {volume}, and the stream is only a difference from {header.base.name}",
            hint="send the snapshot whole",
        )
    pool.volume_create(volume, size=header.to.size, thin=True)
    return True


def _undo(under_way: Receive) -> None:
    try:
        under_way.undo()
    except BaseException as error:  # the next start does it
        log.error("volume %s: what was received is not undone yet: %s", under_way.volume.name, error)


def _add(writer: Writer, under_way: Receive, extent: Extent) -> None:
    base = None
    if extent.encoding is Encoding.DIFF:
        base = bytearray(extent.length)
        under_way.base.read(memoryview(base), extent.offset)
    content = extent.content(base)
    if content is not None:
        writer.add(Step(OpKind.WRITE, extent.offset, extent.length, content))
        return
    end = extent.offset + extent.length
    for offset in range(extent.offset, end, TRIM_BYTES):
        writer.add(Step(OpKind.TRIM, offset, min(TRIM_BYTES, end - offset)))


def arrival(header: Header) -> Arrival:
    return Arrival(
        id=str(header.to.id),
        name=header.to.name,
        size=header.to.size,
        created=header.created,
        base=None if header.base is None else str(header.base.id),
        base_name="" if header.base is None else f"{header.volume}@{header.base.name}",
        start=header.start,
        digest="" if header.resumed == NO_DIGEST else header.resumed.hex(),
    )


def _to_be_resumed(pool: Pool, volume: str, error: BaseException) -> BaseException:
    token = resume_token(pool, volume)
    assert token is not None
    hint = f"go on with: nbdsnap send --resume {token} | nbdsnap receive {volume} --resume"
    return DeltaCutError(str(error), hint=hint) if isinstance(error, NbdsnapError | OSError) else error


def nothing_came(pool: Pool, volume: str, source: Source) -> ReceiveReport | None:
    """What there is to go on with, where the stream is empty; None where it is not."""
    if not source.at_end():
        return None
    state, token = pool.receive_state(volume), resume_token(pool, volume)
    if state is None or token is None:
        raise DeltaCutError(
            f"there is no delta stream, and volume {volume} has nothing of an earlier one",
            hint="send it from its beginning",
        )
    return ReceiveReport(
        snapshot=f"{volume}@{state['name']}",
        size=state["size"],
        stream_bytes=0,
        bytes=state["position"],
        digest=state["digest"],
        done=False,
        token=token,
    )


def resume_token(pool: Pool, volume: str) -> str | None:
    """What the rest of a stream that was cut is to be asked for with; None where nothing was begun."""
    state = pool.receive_state(volume)
    if state is None:
        return None
    return Token(state["id"], state["base"], state["position"], state["digest"]).encode()
