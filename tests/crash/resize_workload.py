"""The traced program: a volume that gets larger and smaller between its snapshots, with marks of what is so.

It ends in the middle of things.  Marks: ``writing`` (the content is not known until the next one), ``settled`` (the
content is ``image``, and flushed), ``resize`` (it becomes ``image``) and ``resized``; ``taken`` names a snapshot.
Images and snapshots are attached.
"""

from __future__ import annotations

import os
import random
import sys

from nbdsnap.engine import resize
from nbdsnap.engine.device import Device, OpKind
from tests.crash.marks import Marks
from tests.crash.pool_workload import SIZES, adapt_engine, name_syncs, open_pool
from tests.support.device import flush, read, submit, write

VOLUME = "old"
SIZE = SIZES[VOLUME]
CHUNK = 4096
NEW_SIZES = (SIZE + 5 * CHUNK + 100, SIZE - 9 * CHUNK - 300, SIZE + 2 * CHUNK, SIZE // 2, SIZE // 2 + 50)


def adapt(marks: Marks | None = None) -> None:
    """Resizes in small steps, too."""
    adapt_engine(marks)
    resize.STEP_BYTES = 6 * CHUNK


def scribble(device: Device, rng: random.Random) -> None:
    for _ in range(6):
        offset = rng.randrange(device.size - 3 * CHUNK) // CHUNK * CHUNK
        if rng.random() < 0.3:
            submit(device, OpKind.TRIM, offset, 2 * CHUNK).wait()
        else:
            write(device, offset + rng.choice((0, 700)), rng.randbytes(2 * CHUNK))
    write(device, device.size - 10, rng.randbytes(10))
    flush(device)


def main(seed: str) -> None:
    rng = random.Random(int(seed))
    marks = Marks()
    adapt(marks)
    name_syncs(marks)
    pool = open_pool()
    device = pool.open_device(VOLUME)
    for number, size in enumerate(NEW_SIZES):
        marks.mark(event="writing")
        scribble(device, rng)
        before = read(device, 0, device.size)
        marks.attach(f"before-{number}", before)
        marks.mark(event="settled", image=f"before-{number}")
        if number % 3 != 2:
            pool.snapshot_create([f"{VOLUME}@s{number}"])
            marks.attach(f"s{number}", before)
            marks.mark(event="taken", image=f"s{number}")
        marks.attach(f"after-{number}", before[:size].ljust(size, b"\0"))
        marks.mark(event="resize", image=f"after-{number}")
        pool.volume_resize(VOLUME, size, shrink=True)
        marks.mark(event="resized", image=f"after-{number}")
    marks.mark(event="writing")
    scribble(device, rng)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
