"""A bounded pool of threads for what may wait for a disk: cold reads, extents, readahead.

Smaller than ThreadPoolExecutor: no future per job, since a job reports its own result through
:mod:`nbdsnap.server.completions`.  A job therefore catches its errors; one that does not is logged, and its thread goes
on.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

WORKERS = 8
"""Threads: enough for a few clients' disk reads at once; the kernel's readahead does the rest (see ReadJob)."""

JOIN_TIMEOUT_S = 5.0
"""A thread that a disk does not let go is left behind at the end; it is a daemon."""


class Workers:
    def __init__(self, count: int = WORKERS) -> None:
        self.count = count
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._loop, name=f"worker-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Do what was submitted, then end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT_S)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job failed")
            del job  # not while waiting for the next one: it may hold a buffer
