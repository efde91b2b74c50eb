"""The traced program: a volume that is rolled back, to an older and to its newest snapshot, with marks of what is so.

It ends in the middle of things.  Marks: ``writing`` (the content is not known until the next one), ``settled`` (the
content is ``image``, and flushed), ``rollback`` (it becomes ``image``) and ``rolled``; ``taken`` names a snapshot.
Images and snapshots are attached.
"""

from __future__ import annotations

import os
import random
import sys

from nbdsnap.engine import rollback
from nbdsnap.engine.device import Device, OpKind
from tests.crash.marks import Marks
from tests.crash.pool_workload import SIZES, adapt_engine, name_syncs, open_pool
from tests.support.device import flush, read, submit, write

VOLUME = "old"
SIZE = SIZES[VOLUME]
CHUNK = 4096
STEP_BYTES = 6 * CHUNK


def adapt(marks: Marks | None = None) -> None:
    """Rollbacks in small steps, too."""
    adapt_engine(marks)
    rollback.STEP_BYTES = STEP_BYTES


def _scribble(device: Device, rng: random.Random) -> None:
    for _ in range(8):
        offset = rng.randrange(SIZE - 3 * CHUNK) // CHUNK * CHUNK
        if rng.random() < 0.3:
            submit(device, OpKind.TRIM, offset, 2 * CHUNK).wait()
        else:
            write(device, offset + rng.choice((0, 700)), rng.randbytes(2 * CHUNK))
    flush(device)


def main(seed: str) -> None:
    rng = random.Random(int(seed))
    marks = Marks()
    adapt(marks)
    name_syncs(marks)
    pool = open_pool()
    device = pool.open_device(VOLUME)

    def settle(name: str) -> None:
        marks.attach(name, read(device, 0, SIZE))
        marks.mark(event="settled", image=name)

    for number in range(3):
        marks.mark(event="writing")
        _scribble(device, rng)
        settle(f"live-{number}")
        pool.snapshot_create([f"{VOLUME}@s{number}"])
        marks.attach(f"s{number}", read(device, 0, SIZE))
        marks.mark(event="taken", image=f"s{number}")
    for number, target in enumerate(("s1", "s2", "s0", "s2")):
        marks.mark(event="writing")
        _scribble(device, rng)
        settle(f"before-{number}")
        marks.mark(event="rollback", image=target)
        pool.rollback(f"{VOLUME}@{target}", force=True)
        marks.mark(event="rolled", image=target)
    marks.mark(event="writing")
    _scribble(device, rng)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
