"""Sending: a snapshot of a pool, whole or as what differs from an older one, as a delta stream.

Two threads read and encode, ahead of the one that frames, sums and writes; in the volume's order all the same.  What is
read ahead is bounded.  The snapshots are open meanwhile: they can't be deleted.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import local

from nbdsnap.delta.choice import PIECE, Chooser, Compression, Stored
from nbdsnap.delta.encoder import Encoder, Output
from nbdsnap.delta.format import NO_DIGEST, Encoding, Header, Point
from nbdsnap.engine.device import STATE_ZERO, Device
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import NbdsnapError, NotFoundError, UsageError, from_exception
from nbdsnap.models import SendReport, SnapshotInfo
from nbdsnap.transfer.pace import Progress, RateLimit
from nbdsnap.transfer.streams import ByteSink
from nbdsnap.transfer.token import Token

JOB_BYTES = 1 << 20
"""Content that one thread reads and encodes at a time."""

JOB_RANGES = 256
READERS = 2
JOBS_AHEAD = 6
"""Each holds up to twice its bytes, with the base's."""

MAP_BYTES = 1 << 30
"""How much of a volume is asked for its holes at a time."""

CHECKPOINT_BYTES = 64 << 20
"""Bytes of the volume between two checkpoints: what has to be sent again after a cut, at most."""


@dataclass(frozen=True)
class Range:
    """``zero``: it is known to hold nothing else."""

    offset: int
    length: int
    zero: bool = False


@dataclass(frozen=True)
class Selection:
    """What is to be sent: names as ``VOLUME@NAME``, and where to go on."""

    to: str
    base: str | None = None
    start: int = 0
    digest: bytes = NO_DIGEST


def select(pool: Pool, to: str | None, base: str | None, resume: str | None) -> Selection:
    """What a user means: a snapshot and its base, or a token."""
    if resume is None:
        if to is None:
            raise UsageError("there is nothing to send", hint="name a snapshot, as VOLUME@NAME")
        if base is not None and "@" not in base:
            base = f"{to.partition('@')[0]}@{base.removeprefix('@')}"
        return Selection(to, base)
    token = Token.decode(resume)
    volumes = [name.partition("@")[0] for name in pool.find_snapshots(token.to)]
    for volume in volumes if to is None else [to.partition("@")[0]]:
        found = _on(pool, token.to, volume)
        found_base = None if token.base is None else _on(pool, token.base, volume)
        if found is not None and (token.base is None or found_base is not None):
            return Selection(found, found_base, token.position, bytes.fromhex(token.digest) or NO_DIGEST)
    raise NotFoundError(
        "the snapshots that the token is of are not here any more",
        hint="undo what was received (nbdsnap receive VOLUME --abort), and send another snapshot",
    )


def _on(pool: Pool, identifier: str, volume: str) -> str | None:
    return next((name for name in pool.find_snapshots(identifier) if name.startswith(f"{volume}@")), None)


class Sender:
    """One stream.  Use it as a context manager: it has the snapshots open."""

    def __init__(self, pool: Pool, selection: Selection, compression: Compression = Compression.AUTO) -> None:
        self._pool = pool
        self.selection = selection
        self._compression = compression
        self._local = local()
        with ExitStack() as opened:
            self._device = _open(pool, selection.to)
            opened.callback(self._device.close)
            self._base: Device | None = None
            if selection.base is not None:
                self._base = _open(pool, selection.base)
                opened.callback(self._base.close)
            self.header = self._make_header()
            self._opened = opened.pop_all()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _make_header(self) -> Header:
        selection = self.selection
        info = self._pool.snapshot_info(selection.to)
        base = None if selection.base is None else self._pool.snapshot_info(selection.base)
        estimate = sum(one.length for one in self._ranges() if not one.zero)
        return Header(
            volume_id=uuid.UUID(self._pool.volume_id(info.volume)),
            volume=info.volume,
            to=_point(info),
            created=info.created,
            base=None if base is None else _point(base),
            start=selection.start,
            resumed=selection.digest,
            estimate=estimate,
        )

    def report(self, *, stream_bytes: int = 0, digest: bytes = b"", extents: int = 0, done: bool = False) -> SendReport:
        return SendReport(
            snapshot=self.selection.to,
            base=self.selection.base,
            size=self.header.to.size,
            bytes=self.header.estimate,
            extents=extents or sum(1 for _ in self._ranges()),
            stream_bytes=stream_bytes,
            digest=digest.hex(),
            done=done,
        )

    def send(self, sink: ByteSink, progress: Progress, limit: RateLimit) -> SendReport:
        """Write all of it.  Where that fails, the stream says so, as far as it can."""
        encoder = Encoder(self.header)
        progress.total = self.header.estimate
        extents = 0

        def write(output: Output) -> None:
            limit.spend(sum(map(len, output)))
            sink.write(output)

        try:
            write(encoder.start())
            confirmed = self.selection.start
            for position, stored in self._encoded():
                extents += len(stored)
                for one in stored:
                    if output := encoder.add(one):
                        write(output)
                if position - confirmed >= CHECKPOINT_BYTES and (output := encoder.checkpoint(position)):
                    write(output)
                    confirmed = position
                progress.advance(self._looked_at)
            write(encoder.end())
        except BrokenPipeError:
            raise NbdsnapError("whoever read the stream has closed it", hint="see what the receiver says") from None
        except Exception as error:
            self._abort(sink, encoder, error)
            raise
        return self.report(stream_bytes=encoder.written, digest=encoder.digest, extents=extents, done=True)

    def _abort(self, sink: ByteSink, encoder: Encoder, error: Exception) -> None:
        known = from_exception(error)
        try:
            sink.write(encoder.abort(str(known or type(error).__name__)))
        except Exception:  # it is already failing, and the receiver notices the cut, too
            return

    # What to send, in the volume's order

    def _ranges(self) -> Iterator[Range]:
        start = self.selection.start
        if self.selection.base is None:
            yield from self._whole(start)
            return
        for extent in self._pool.diff(self.selection.base, self.selection.to):
            end = extent.offset + extent.length
            if end > start:
                offset = max(extent.offset, start)
                yield Range(offset, end - offset)

    def _whole(self, start: int) -> Iterator[Range]:
        size = self._device.size
        for offset in range(start, size, MAP_BYTES):
            position = offset
            for length, flags in self._device.extents(offset, min(MAP_BYTES, size - offset)):
                yield Range(position, length, bool(flags & STATE_ZERO))
                position += length

    def _jobs(self) -> Iterator[list[Range]]:
        """Of at most JOB_BYTES of content each, and all of one piece after the other."""
        job: list[Range] = []
        size = 0
        for one in self._ranges():
            if one.zero:
                job.append(one)
            offset, end = one.offset, one.offset + one.length
            while not one.zero and offset < end:
                length = min(end - offset, JOB_BYTES - size)
                job.append(Range(offset, length))
                offset += length
                size += length
                if size == JOB_BYTES:
                    yield job
                    job, size = [], 0
            if len(job) >= JOB_RANGES:
                yield job
                job, size = [], 0
        if job:
            yield job

    def _encoded(self) -> Iterator[tuple[int, list[Stored]]]:
        """Extents, with the position in the volume below which that is all."""
        self._looked_at = 0
        ahead: deque[tuple[list[Range], Future[list[Stored]]]] = deque()
        with ThreadPoolExecutor(READERS, "send") as readers:
            try:
                for job in self._jobs():
                    ahead.append((job, readers.submit(self._encode, job)))
                    if len(ahead) == JOBS_AHEAD:
                        yield self._take(*ahead.popleft())
                while ahead:
                    yield self._take(*ahead.popleft())
            finally:
                for _, future in ahead:
                    future.cancel()

    def _take(self, job: list[Range], future: Future[list[Stored]]) -> tuple[int, list[Stored]]:
        stored = future.result()
        self._looked_at += sum(one.length for one in job if not one.zero)
        return job[-1].offset + job[-1].length, stored

    # On the readers' threads

    def _encode(self, job: list[Range]) -> list[Stored]:
        chooser = self._chooser()
        found: list[Stored] = []
        for one in job:
            if one.zero:
                found.append(Stored(one.offset, one.length, Encoding.ZERO, b""))
                continue
            content = _read(self._device, one.offset, one.length)
            base = None if self._base is None else _read(self._base, one.offset, one.length)
            for start in range(0, one.length, PIECE):
                part = slice(start, start + PIECE)
                stored = chooser.store(one.offset + start, content[part], None if base is None else base[part])
                if stored is not None:
                    found.append(stored)
        return found

    def _chooser(self) -> Chooser:
        chooser: Chooser | None = getattr(self._local, "chooser", None)
        if chooser is None:
            chooser = self._local.chooser = Chooser(self._compression, time.thread_time_ns)
        return chooser


def _open(pool: Pool, name: str) -> Device:
    if "@" not in name:
        raise UsageError(f"{name!r} is no snapshot", hint="a snapshot is written VOLUME@NAME")
    return pool.open_device(name)


def _point(info: SnapshotInfo) -> Point:
    return Point(uuid.UUID(info.id), info.name, info.size)


def _read(device: Device, offset: int, length: int) -> bytearray:
    """Beyond its end, a device has zeroes."""
    content = bytearray(length)
    inside = max(0, min(length, device.size - offset))
    if inside:
        device.read(memoryview(content)[:inside], offset)
    return content
