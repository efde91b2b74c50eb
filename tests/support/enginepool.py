"""A pool in this process: opened, and written to without a server."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from nbdsnap.engine.device import Op, OpKind
from nbdsnap.engine.pool import Pool, PoolOptions

WRITE_TIMEOUT_S = 60.0
LOG_SIZE = 1 << 20


def make_pool(folder: Path, volumes: Iterable[str] = (), size: int = 1 << 30) -> Pool:
    """A new pool below ``folder`` with sparse volumes over ``folder/NAME.img``.  The caller closes it."""
    pool = Pool.open(folder / "pool", PoolOptions(log_size=LOG_SIZE), create=True)
    for name in volumes:
        pool.volume_create(name, folder / f"{name}.img", size)
    return pool


def write_blocks(pool: Pool, export: str, offsets: Iterable[int], block: bytes = b"x" * 4096) -> None:
    """Write ``block`` at each offset; all are done when this returns."""
    device = pool.open_device(export)
    failures: list[BaseException] = []
    try:
        listed = list(offsets)
        left = threading.Semaphore(0)

        def done(error: BaseException | None) -> None:
            if error is not None:
                failures.append(error)
            left.release()

        for offset in listed:
            device.submit(Op(OpKind.WRITE, offset, len(block), done, block))
        for _ in listed:
            assert left.acquire(timeout=WRITE_TIMEOUT_S), "a write was never done"
    finally:
        device.close()
    assert not failures, failures
