"""Waiting without sleeping blindly: poll until a condition holds, or fail at a deadline.

No test waits a fixed time for something to have happened; and none waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_INTERVAL_S = 0.02
"""Short beside what is waited for (a process, a connection), long beside what a poll costs."""


class Deadline:
    """A point in time that several waits share."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def remaining(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def expired(self) -> bool:
        return time.monotonic() >= self._end


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = 10.0) -> T:
    """The first true result of ``condition``; AssertionError, naming ``what``, where there is none in time."""
    deadline = Deadline(timeout_s)
    while True:
        result = condition()
        if result:
            return result
        if deadline.expired():
            raise AssertionError(f"after {timeout_s:g} s still waiting for {what} (last result: {result!r})")
        time.sleep(POLL_INTERVAL_S)
