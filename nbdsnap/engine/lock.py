"""One process owns a pool at a time: it holds flock(2) on the pool's lock file, which tells its pid to others."""

from __future__ import annotations

import os
from pathlib import Path

from nbdsnap.errors import PoolLockedError
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.layout import LOCK_FILE


class PoolLock:
    """Held from construction to :meth:`release`, or to the end of the process, however it ends."""

    def __init__(self, io: FileIO, pool: Path) -> None:
        self._io = io
        self._fd = io.open(pool / LOCK_FILE, os.O_RDWR | os.O_CREAT)
        if not io.lock_exclusive(self._fd):
            owner = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            io.close(self._fd)
            raise PoolLockedError(
                f"the pool {pool} is in use by process {owner or 'unknown'}",
                hint="management commands reach a running server through its control socket: name its configuration",
            )
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        self._io.close(self._fd)
