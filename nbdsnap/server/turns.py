"""Turns for requests that are longer than their connection's share of the memory.

Each connection may hold its share (:meth:`nbdsnap.server.context.Context.share`), whatever the others do: so a client
that does not take its replies, or stops in the middle of a payload, holds nobody up.  But one request alone may be
longer than a share, a WRITE of up to 64 MiB, and 256 clients may send one at the same moment.  Such a request is not
received before its turn has come: all that have theirs hold no more than ``total`` bytes together, but one may always
go on.  Turns are given in the order of asking.

Who has a turn and does nothing, while others wait, loses its connection after ``TURN_STALLED_S``
(:mod:`nbdsnap.server.watch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

TURN_STALLED_S = 10.0
"""A client that has sent nothing for so long is not slow."""


class Asking(Protocol):
    """Who waits is told when it may ask again."""

    def on_turn(self) -> None: ...


class Turns:
    """For the loop's thread.  ``total``: bytes.  ``soon`` calls a function from the loop."""

    def __init__(self, total: int, soon: Callable[[Callable[[], None]], object]) -> None:
        self.total = total
        self.used = 0
        self._soon = soon
        self._held: dict[int, tuple[memoryview, int]] = {}
        self._waiting: dict[Asking, None] = {}

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def ask(self, who: Asking, size: int) -> bool:
        """Whether ``who`` may take a buffer for a request of that size now: then :meth:`hold` is to follow."""
        first = next(iter(self._waiting), who)
        if first is who and (not self.used or self.used + size <= self.total):
            self._waiting.pop(who, None)
            return True
        self._waiting[who] = None
        return False

    def hold(self, buffer: memoryview, size: int) -> None:
        """The request's buffer, until it is given back to the pool."""
        self._held[id(buffer)] = buffer, size
        self.used += size
        self._wake()

    def is_held(self, buffer: memoryview) -> bool:
        return id(buffer) in self._held

    def given(self, buffer: memoryview) -> None:
        """A buffer went back to the pool, whosever it was."""
        held = self._held.pop(id(buffer), None)
        if held is not None:
            self.used -= held[1]
            self._wake()

    def is_waiting(self, who: Asking) -> bool:
        return who in self._waiting

    def leave(self, who: Asking) -> None:
        """It asks no more."""
        if who in self._waiting:
            del self._waiting[who]
            self._wake()

    def _wake(self) -> None:
        first = next(iter(self._waiting), None)
        if first is not None:
            self._soon(first.on_turn)
