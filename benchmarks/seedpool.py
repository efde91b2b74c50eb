"""Makes a pool with a volume that has snapshots already: ``python -m benchmarks.seedpool POOL ORIGIN --snapshots N``.

After each snapshot some chunks are overwritten, so that it has something of its own to keep, as in life.  Done through
the engine, without a server, and in a process of its own: a thousand snapshots take seconds.

``sparse`` is for volumes far larger than the disk: most of the overwritten chunks are holes, and every so often the
origin is emptied again, whose content no snapshot needs any more by then.  Every DATA_SHARE-th chunk has content before
it is overwritten, so the store is filled, too.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import VOLUME
from nbdsnap.engine.device import Device, Op, OpKind
from nbdsnap.engine.pool import Pool
from nbdsnap.sizes import parse_size

CHUNK = 4096
CHUNKS_BETWEEN = 8
"""Overwritten after a snapshot, unless told otherwise."""

DATA_SHARE = 20
IN_FLIGHT = 4096
"""Operations submitted together: what the engine may take as one batch."""

EMPTY_EVERY_CHUNKS = 200_000
"""At most so much of a sparse origin is allocated at a time: 800 MiB."""

SEED = 7
OPERATION_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Plan:
    """``chunks`` are overwritten after each of the ``snapshots``: random ones of the first ``span`` bytes, or,
    ``sequential``, the next ones in order."""

    snapshots: int
    chunks: int = CHUNKS_BETWEEN
    span: int | None = None
    sequential: bool = False
    sparse: bool = False


def snapshot_name(number: int) -> str:
    return f"s{number}"


def seed(path: Path, origin: Path, plan: Plan, progress: Callable[[int], None] = lambda _: None) -> None:
    """Make the pool at ``path``; ``progress`` is told the number of each snapshot that is done."""
    pool = Pool.open(path, create=True)
    descriptor = os.open(origin, os.O_RDWR)
    try:
        pool.volume_create(VOLUME, origin)
        size = os.fstat(descriptor).st_size
        choice = _chunks(plan, min(plan.span or size, size) // CHUNK)
        allocated = 0
        for number in range(plan.snapshots):
            pool.snapshot_create([f"{VOLUME}@{snapshot_name(number)}"])
            chunks = next(choice)
            if plan.sparse:
                _give_content(descriptor, chunks[::DATA_SHARE])
            _overwrite(pool, chunks)
            allocated += len(chunks)
            if plan.sparse and allocated >= EMPTY_EVERY_CHUNKS:
                empty(descriptor, size)
                allocated = 0
            progress(number)
        if plan.sparse:
            empty(descriptor, size)
    finally:
        os.close(descriptor)
        pool.close()


def _chunks(plan: Plan, total: int) -> Iterator[list[int]]:
    """Without end: the chunks to overwrite after each snapshot."""
    rng = random.Random(SEED)
    start = 0
    while True:
        if plan.sequential:
            yield [(start + number) % total for number in range(min(plan.chunks, total))]
            start += plan.chunks
        else:
            yield rng.sample(range(total), min(plan.chunks, total))


def _give_content(descriptor: int, chunks: list[int]) -> None:
    for chunk in chunks:
        os.pwrite(descriptor, os.urandom(CHUNK), chunk * CHUNK)


def _overwrite(pool: Pool, chunks: list[int]) -> None:
    device = pool.open_device(VOLUME)
    try:
        for start in range(0, len(chunks), IN_FLIGHT):
            write_chunks(device, chunks[start : start + IN_FLIGHT])
    finally:
        device.close()


def write_chunks(device: Device, chunks: list[int]) -> None:
    """Overwrite whole chunks with new random data, all in flight at once; returns when all are done."""
    data = os.urandom(CHUNK)
    lock, finished = threading.Lock(), threading.Event()
    missing, errors = len(chunks), list[BaseException]()

    def done(error: BaseException | None) -> None:
        nonlocal missing
        with lock:
            if error is not None:
                errors.append(error)
            missing -= 1
            if missing == 0:
                finished.set()

    for chunk in chunks:
        device.submit(Op(OpKind.WRITE, chunk * CHUNK, CHUNK, done, data))
    if chunks and not finished.wait(OPERATION_TIMEOUT_S):
        raise TimeoutError(f"{missing} of {len(chunks)} writes were not done in {OPERATION_TIMEOUT_S:g} s")
    if errors:
        raise errors[0]


def empty(descriptor: int, size: int) -> None:
    """Make a file of ``size`` bytes one hole.  Cutting it off drops dirty pages; punching would write them first."""
    os.ftruncate(descriptor, 0)
    os.ftruncate(descriptor, size)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seedpool", description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path, help="made here, must not exist")
    parser.add_argument("origin", type=Path, help="an image; it is OVERWRITTEN")
    parser.add_argument("--snapshots", type=int, default=1)
    parser.add_argument(
        "--chunks", type=int, default=CHUNKS_BETWEEN, help="overwritten after each (default: %(default)s)"
    )
    parser.add_argument("--span", type=parse_size, help="of the volume that they lie in (default: all of it)")
    parser.add_argument("--sequential", action="store_true", help="one after the other, not at random")
    parser.add_argument("--sparse", action="store_true", help="keep the origin sparse: its content is LOST")
    options = parser.parse_args(arguments)
    plan = Plan(options.snapshots, options.chunks, options.span, options.sequential, options.sparse)

    def progress(number: int) -> None:
        if sys.stderr.isatty() and number % 10 == 0:
            sys.stderr.write(f"\r\x1b[Ksnapshot {number} of {plan.snapshots}")
            sys.stderr.flush()

    seed(options.pool, options.origin, plan, progress)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
