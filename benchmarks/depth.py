"""What a read costs in a clone of a clone of a clone …: ``python -m benchmarks.depth``.

Engine only, in this process: random reads of 4 KiB from the page cache, by the processor time that each takes, so that
a busy machine changes little.  Each clone in the chain has overwritten a part of the volume.  Making one is timed, too:
once each, with its commit to the disk.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from nbdsnap.engine.device import Device, Op, OpKind
from nbdsnap.engine.pool import Pool, PoolOptions

CHUNK = 4096
MIB = 1 << 20
DEPTHS = (1, 2, 8, 64)
ROUNDS = 5


class Bench:
    def __init__(self, pool: Pool, size: int, reads: int) -> None:
        self._pool = pool
        self._size = size
        self._random = random.Random(1)
        self._offsets = [self._random.randrange(size // CHUNK) * CHUNK for _ in range(reads)]

    def fill(self, name: str) -> None:
        block = self._random.randbytes(MIB)
        self._write_all(name, range(0, self._size, MIB), block)

    def overwrite(self, name: str, share: float) -> None:
        """Some chunks here and there."""
        count = int(self._size // CHUNK * share)
        chunks = [self._random.randrange(self._size // CHUNK) for _ in range(count)]
        block = self._random.randbytes(CHUNK)
        self._write_all(name, [chunk * CHUNK for chunk in chunks], block)

    def _write_all(self, name: str, offsets: Iterable[int], block: bytes) -> None:
        device = self._pool.open_device(name)
        try:
            for offset in offsets:
                _write(device, offset, block)
        finally:
            device.close()
        self._pool.settle()

    def read_us(self, name: str) -> float:
        """Microseconds of processor time for a read, the best of some rounds, with a warm page cache."""
        device = self._pool.open_device(name)
        whole, buffer = memoryview(bytearray(MIB)), memoryview(bytearray(CHUNK))
        try:
            for offset in range(0, self._size, MIB):
                device.read(whole, offset)
            return min(self._round(device, buffer) for _ in range(ROUNDS))
        finally:
            device.close()

    def _round(self, device: Device, buffer: memoryview) -> float:
        begin = time.thread_time()
        for offset in self._offsets:
            if not device.read_now(buffer, offset):
                device.read(buffer, offset)
        return (time.thread_time() - begin) / len(self._offsets) * 1e6


def _write(device: Device, offset: int, data: bytes) -> None:
    if not device.write_now(offset, memoryview(data)):
        device.submit(Op(OpKind.WRITE, offset, len(data), lambda _: None, data))


def run(folder: Path, size: int, share: float, reads: int, depths: Sequence[int]) -> None:
    pool = Pool.open(folder / "pool", PoolOptions(), create=True)
    try:
        bench = Bench(pool, size, reads)
        pool.volume_create("origin", folder / "origin.img", size)
        pool.volume_create("thin", None, size, thin=True)
        for root in ("origin", "thin"):
            bench.fill(root)
            pool.snapshot_create([f"{root}@s"])
            print(f"{root}: read {bench.read_us(root):.1f} us, of its snapshot {bench.read_us(f'{root}@s'):.1f} us")
            base = root
            for depth in range(1, max(depths) + 1):
                name = f"{root}{depth}"
                begin = time.perf_counter()
                pool.clone(f"{base}@s", name)
                made = (time.perf_counter() - begin) * 1e3
                bench.overwrite(name, share)
                if depth in depths:
                    print(f"  depth {depth:2}: made in {made:.1f} ms, read {bench.read_us(name):.1f} us")
                pool.snapshot_create([f"{name}@s"])
                base = name
    finally:
        pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the pool is made (default: the temporary folder)")
    parser.add_argument("--size", type=int, default=256, help="MiB of each volume")
    parser.add_argument("--share", type=float, default=0.01, help="of it that each clone overwrites")
    parser.add_argument("--reads", type=int, default=20000, help="of a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nbdsnap-depth-", dir=options.folder) as folder:
        run(Path(folder), options.size * MIB, options.share, options.reads, DEPTHS)


if __name__ == "__main__":
    main()
