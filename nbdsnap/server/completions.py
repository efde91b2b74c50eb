"""Results on their way from other threads to the event loop, with one wake-up for a burst of them.

Any thread posts; the loop's thread drains.  What is posted between two drains costs one wake-up in all, because
waking the loop is a system call, and a burst of a hundred operations is one commit's worth.

Invariants: everything posted is drained, in the order of posting; ``drain`` runs on the loop's thread only.  ``_awake``
is cleared before the queue is emptied, so that a result posted meanwhile is either seen by this drain or causes
another.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Gatherer(Protocol):
    """Someone who collects what results produce, to send it once the burst is over."""

    def end_of_burst(self) -> None: ...


class Completions:
    """One per loop.  ``waiting``: whether there is something to drain; any thread may look."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._awake = False
        self._touched: dict[Gatherer, None] = {}

    def post(self, finish: Callable[[Any], None], result: Any) -> None:
        """Have ``finish(result)`` called on the loop's thread.  From any thread."""
        self._queue.append((finish, result))
        if not self._awake:
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self.drain)
            except RuntimeError:  # the loop is closed: nobody is left whom the result concerns
                log.debug("a result came after the end: %r", result)

    @property
    def waiting(self) -> bool:
        return bool(self._queue)

    def touch(self, gatherer: Gatherer) -> None:
        """Call its ``end_of_burst`` when the present drain, or else the next one, is over."""
        self._touched[gatherer] = None

    def drain(self) -> None:
        """Finish what is waiting now; what comes meanwhile has its own turn, so that the loop stays fair."""
        self._awake = False
        queue = self._queue
        for _ in range(len(queue)):
            finish, result = queue.popleft()
            try:
                finish(result)
            except Exception:
                log.exception("a result could not be delivered")
        touched, self._touched = self._touched, {}
        for gatherer in touched:
            try:
                gatherer.end_of_burst()
            except Exception:
                log.exception("replies could not be sent")
        if queue and not self._awake:
            self._awake = True
            self._loop.call_soon(self.drain)
