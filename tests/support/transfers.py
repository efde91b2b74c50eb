"""Sending and receiving between pools of this process, with the stream in memory."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from nbdsnap.delta.choice import Compression
from nbdsnap.engine.device import OpKind
from nbdsnap.engine.pool import Pool
from nbdsnap.models import ReceiveReport
from nbdsnap.transfer.pace import Progress, RateLimit
from nbdsnap.transfer.receive import receive
from nbdsnap.transfer.send import Sender, select
from nbdsnap.transfer.streams import Sink, Source, no_tick
from tests.support.device import flush, read, submit, write

CHUNK = 4096


def ignore(done: int, total: int) -> None:
    pass


def sent(
    pool: Pool,
    to: str | None,
    base: str | None = None,
    *,
    resume: str | None = None,
    compression: Compression = Compression.AUTO,
) -> bytes:
    """The stream."""
    with tempfile.TemporaryFile() as file, Sender(pool, select(pool, to, base, resume), compression) as sender:
        sink = Sink(file.fileno())
        sender.send(sink, Progress(ignore), RateLimit(None, no_tick))
        sink.close()
        file.seek(0)
        return file.read()


def received(
    pool: Pool,
    volume: str,
    stream: bytes,
    *,
    report: Callable[[int, int], None] = ignore,
    name: str | None = None,
    create: bool = False,
    force: bool = False,
    resumable: bool = False,
) -> ReceiveReport:
    with tempfile.TemporaryFile() as file:
        file.write(stream)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        progress = Progress(report)
        source = Source(file.fileno(), progress.tick)
        return receive(pool, volume, source, progress, name=name, create=create, force=force, resumable=resumable)


def content(pool: Pool, export: str) -> bytes:
    device = pool.open_device(export)
    try:
        return read(device, 0, device.size)
    finally:
        device.close()


def scribble(pool: Pool, volume: str, seed: int, writes: int = 20) -> None:
    """Random writes of all kinds, some of them unaligned, some of zeroes, some trims."""
    rng = random.Random(seed)
    device = pool.open_device(volume)
    try:
        for _ in range(writes):
            length = rng.choice([CHUNK, CHUNK, 3 * CHUNK, 700, 64 << 10])
            offset = rng.randrange(0, device.size - length)
            if length % CHUNK == 0:
                offset -= offset % CHUNK
            match rng.randrange(5):
                case 0:
                    write(device, offset, bytes(length))
                case 1:
                    submit(device, OpKind.TRIM, offset, length).wait()
                case 2:
                    write(device, offset, (b"%8d" % seed * length)[:length])
                case _:
                    write(device, offset, rng.randbytes(length))
        flush(device)
    finally:
        device.close()


class State:
    """What must be as it was after a receive that failed."""

    def __init__(self, pool: Pool, volume: str, image: Path) -> None:
        self.snapshots = [(one.name, one.id, one.held, one.priority) for one in pool.snapshot_list(volume)]
        self.contents = {name: content(pool, f"{volume}@{name}") for name, *_ in self.snapshots}
        self.live = content(pool, volume)
        pool.settle()
        self.image = image.read_bytes()
        self.exports = [export.name for export in pool.exports()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]
