"""The traced program: a volume that receives snapshots, whole and as differences, and one that is damaged at its end.

It ends in the middle of things.  Marks: ``writing`` (the content is not known until the next one), ``settled`` (the
content is ``image``, and flushed), ``receive`` (it may become ``image``, and then the snapshot of that name is there),
``received`` and ``undone``; ``taken`` names a snapshot.  Images and snapshots are attached.
"""

from __future__ import annotations

import os
import random
import sys
import uuid
from dataclasses import replace

from nbdsnap.delta.format import Point
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import NbdsnapError
from nbdsnap.transfer import receive as receiving
from tests.crash import rollback_workload
from tests.crash.marks import Marks
from tests.crash.pool_workload import name_syncs, open_pool
from tests.crash.rollback_workload import SIZE, VOLUME
from tests.support.deltas import encode, header, seal
from tests.support.device import flush, read, write
from tests.support.transfers import received

CHUNK = 4096
BATCH_BYTES = 5 * CHUNK


def adapt(marks: Marks | None = None) -> None:
    """In small batches, undone in small steps."""
    rollback_workload.adapt(marks)
    receiving.BATCH_BYTES = BATCH_BYTES


def changed(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(6):
        offset = rng.randrange(SIZE // CHUNK) * CHUNK
        found[offset : offset + CHUNK] = bytes(CHUNK) if rng.random() < 0.3 else rng.randbytes(CHUNK)
    return bytes(found)


def main(seed: str) -> None:
    rng = random.Random(int(seed))
    marks = Marks()
    adapt(marks)
    name_syncs(marks)
    pool = open_pool()

    def settle(name: str) -> None:
        device = pool.open_device(VOLUME)
        for _ in range(4):
            write(device, rng.randrange(SIZE - CHUNK), rng.randbytes(CHUNK))
        flush(device)
        marks.attach(name, read(device, 0, SIZE))
        marks.mark(event="settled", image=name)
        device.close()

    marks.mark(event="writing")
    settle("live")
    pool.snapshot_create([f"{VOLUME}@mine"])
    marks.attach("mine", live_content(pool))
    marks.mark(event="taken", image="mine")
    first = changed(bytes(SIZE), rng)
    second = changed(first, rng)
    monday = replace(header(SIZE), to=Point(uuid.UUID(int=2), "monday", SIZE))
    streams = {"monday": seal(encode(first), {0: monday.pack()}), "tuesday": b"".join(encode(second, first))}
    marks.attach("monday", first)
    marks.attach("tuesday", second)
    for name, stream in streams.items():
        marks.mark(event="receive", image="")
        try:
            received(pool, VOLUME, stream[:-1] + bytes([stream[-1] ^ 1]))
        except NbdsnapError:
            marks.mark(event="undone")
        marks.mark(event="receive", image=name)
        received(pool, VOLUME, stream)
        marks.mark(event="received", image=name)
    marks.mark(event="writing")
    settle("later")
    marks.mark(event="receive", image="")
    receiving.Writer.close = lambda self: os._exit(0)  # type: ignore[method-assign]
    received(pool, VOLUME, streams["monday"], name="never")


def live_content(pool: Pool) -> bytes:
    device = pool.open_device(VOLUME)
    try:
        return read(device, 0, SIZE)
    finally:
        device.close()


if __name__ == "__main__":
    main(sys.argv[1])
