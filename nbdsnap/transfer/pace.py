"""How fast a stream may be written, and telling how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

from nbdsnap.transfer.streams import TICK_S, Tick

Clock = Callable[[], float]
Report = Callable[[int, int], None]
"""Gets bytes done and in all; may raise, to end the transfer."""

BURST_S = 0.1
"""Seconds of the rate that may be sent at once."""


class RateLimit:
    """``rate``: bytes per second; None: as fast as it goes."""

    def __init__(
        self,
        rate: int | None,
        tick: Tick,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = rate
        self._tick = tick
        self._clock = clock
        self._sleep = sleep
        self._due = clock()

    def spend(self, count: int) -> None:
        """Wait until ``count`` more bytes may be sent."""
        if self._rate is None:
            return
        moment = self._clock()
        self._due = max(self._due, moment - BURST_S) + count / self._rate
        while (wait := self._due - self._clock()) > 0:
            self._sleep(min(wait, TICK_S))
            self._tick()


class Progress:
    """Reports now and then, and at least whenever a peer is waited for.  ``done`` and ``total`` are bytes."""

    def __init__(self, report: Report, clock: Clock = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._reported = clock()
        self.done = 0
        self.total = 0

    def tick(self) -> None:
        self._reported = self._clock()
        self._report(self.done, self.total)

    def advance(self, done: int) -> None:
        self.done = done
        if self._clock() - self._reported >= TICK_S:
            self.tick()
