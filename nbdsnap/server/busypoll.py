"""A short adaptive busy-poll after each batch: of all connections, and of reads that the disk is about to answer.

A client that waits for a reply sends its next request some ten microseconds after it got it, and an SSD answers within
a hundred.  Going back to the event loop and to sleep, and being woken, costs as much again; asking once more costs
nothing else.

* It asks all connections with one ``epoll_wait``, so none is preferred, and a full one is served between two others.
* It lasts SPIN_S after the last thing that happened, and TURN_S in all, then the event loop has its turn.
* It must pay: each time in vain doubles the number of batches after which it is left out.  An idle server
  polls nothing and uses no CPU.
* It gives way where results are expected from other threads: they need the interpreter's lock, and the processor.
"""

from __future__ import annotations

import asyncio
import logging
import select
import time
from collections.abc import Callable
from typing import Final, Protocol

from nbdsnap.server.completions import Completions

log = logging.getLogger(__name__)

READABLE: Final = select.EPOLLIN
WRITABLE: Final = select.EPOLLOUT

SPIN_S = 50e-6
"""Twice what a local client takes from a reply to its next request; about what sleeping and waking costs."""

TURN_S = 1e-3
"""What others (new connections, timers, the management API) may have to wait for."""

MOST_SKIPPED = 64
"""Batches without a busy-poll after it was in vain again and again: it then costs under 1 us per batch."""

EVENTS = 16
"""Connections that are asked for at once; the others come next."""


class Expected(Protocol):
    """Something that will be there in a moment."""

    def look(self) -> bool:
        """Take what is there; whether there is more to come."""

    def give_up(self) -> None:
        """Get it in another way: there is no busy-poll now."""


class BusyPoll:
    """``outstanding`` counts operations that other threads are busy with; whoever starts and ends them counts."""

    def __init__(self, loop: asyncio.AbstractEventLoop, completions: Completions) -> None:
        self.outstanding = 0
        self._loop = loop
        self._completions = completions
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._expected: list[Expected] = []
        self._scheduled = False
        self._in_vain = 0
        self._skip = 0

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call ``handler(events)`` when ``fd`` is ready for some of ``events``; 0: no more."""
        if not events:
            if self._handlers.pop(fd, None) is not None:
                self._epoll.unregister(fd)
        elif fd in self._handlers:
            self._handlers[fd] = handler
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
            self._handlers[fd] = handler

    def expect(self, expected: Expected) -> None:
        """Look for it until it is there, or give up; from within a callback of the loop."""
        self._expected.append(expected)
        self._schedule()

    def close(self) -> None:
        self._epoll.close()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._on_schedule)

    def _on_schedule(self) -> None:
        self._scheduled = False
        if self._expected:
            self.spin()

    def spin(self) -> None:
        """What comes within SPIN_S is served at once."""
        if self._skip and not self._expected:
            self._skip -= 1
            return
        poll = self._epoll.poll
        clock = time.monotonic
        completions = self._completions
        handlers = self._handlers
        now = clock()
        end = now + TURN_S
        deadline = now + SPIN_S
        paid = False
        while not self.outstanding:
            events = poll(0, EVENTS)
            busy = bool(events or self._expected)
            if events:
                paid = True
                for fd, mask in events:
                    handler = handlers.get(fd)
                    if handler is not None:
                        handler(mask)
            if completions.waiting:
                completions.drain()
            if self._expected:
                self._look()
            if busy:
                now = clock()
                if now > end:
                    break
                deadline = now + SPIN_S
            elif clock() > deadline:
                break
        self._after_spin(paid)

    def _look(self) -> None:
        for expected in self._expected[:]:
            try:
                more = expected.look()
            except Exception:
                log.exception("a busy-poll failed")
                more = False
            if not more:
                self._expected.remove(expected)

    def _after_spin(self, paid: bool) -> None:
        if self._expected:
            if self.outstanding:
                expected, self._expected = self._expected, []
                for one in expected:
                    one.give_up()
            else:
                self._schedule()
        elif paid:
            self._in_vain = 0
        else:
            self._in_vain = min(2 * self._in_vain + 1, MOST_SKIPPED)
            self._skip = self._in_vain
