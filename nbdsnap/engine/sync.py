"""Syncs, shared: all flushes that wait at one moment are answered by one fdatasync.

A flush covers what was written before it was asked for.  So one that arrives while a sync is running waits for the
next one, together with all others that arrive meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor

from nbdsnap.engine.device import Done


class SyncGroup:
    """``sync`` makes everything durable that was written before it was called; it runs on ``executor``, one at a
    time."""

    def __init__(self, sync: Callable[[], None], executor: Executor) -> None:
        self._sync = sync
        self._executor = executor
        self._lock = threading.Lock()
        self._waiting: list[Done] = []
        self._running = False

    def request(self, done: Done) -> None:
        """Call ``done`` when a sync that began after this call has ended."""
        with self._lock:
            self._waiting.append(done)
            if self._running:
                return
            self._running = True
        self._executor.submit(self._run)

    def _run(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._running = False
                    return
            failure: BaseException | None = None
            try:
                self._sync()
            except Exception as error:
                failure = error
            for done in batch:
                done(failure)
