"""The same trouble, a thousand times a second: said once, and then now and again."""

from __future__ import annotations

import time

COMPLAIN_S = 10.0
"""Between two lines in the log about the same trouble."""


class Throttle:
    """``held``: how many did not pass since the last that did."""

    def __init__(self, interval_s: float) -> None:
        self.held = 0
        self._interval_s = interval_s
        self._next = 0.0

    def passes(self) -> bool:
        """Whether to say it now."""
        now = time.monotonic()
        if now < self._next:
            self.held += 1
            return False
        self._next = now + self._interval_s
        return True

    def taken(self) -> int:
        """``held``, counted anew from now on."""
        held, self.held = self.held, 0
        return held
