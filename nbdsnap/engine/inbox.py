"""The preserver's inbox: what other threads leave for it, in order.

Acknowledged writes are in no hurry: nobody waits for them.  Waking a thread for each would cost more than the work
itself, on both sides, since the two share one interpreter.  So they are left to gather for a moment; anything that
somebody waits for ends the wait.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

LINGER_S = 0.005
LINGER_WEIGHT = 1024
"""How long, and up to what weight in all, items that are not urgent may gather."""


class Inbox(Generic[T]):
    """Many threads :meth:`put`; one thread waits and takes."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._weight = 0
        """Of what came since the last :meth:`wait`, about: nothing depends on it but when that one ends."""
        self._work = threading.Event()
        self._urgent = threading.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T, *, urgent: bool, weight: int = 1) -> None:
        self._items.append(item)  # before the flags: who clears one looks here afterwards
        self._weight += weight
        if (urgent or self._weight >= LINGER_WEIGHT) and not self._urgent.is_set():
            self._urgent.set()
        if not self._work.is_set():
            self._work.set()

    def wait(self, timeout: float | None) -> bool:
        """Wait until there is something to take, and no reason to wait for more; False after ``timeout`` seconds."""
        if not self._items:
            self._work.clear()
            if not self._items and not self._work.wait(timeout):
                return False
        if not self._urgent.is_set():
            self._urgent.wait(LINGER_S)
        self._urgent.clear()
        self._weight = 0
        return True

    def take(self) -> T | None:
        """The oldest item; None where there is none."""
        try:
            return self._items.popleft()
        except IndexError:
            return None

    def hurry(self) -> None:
        """The next :meth:`wait` is not to linger."""
        self._urgent.set()
