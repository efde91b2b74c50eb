"""Whether a client in transmission still moves: looked at now and again, since to note it costs more than to look.

*Stalled*: something is the client's to do (take replies that wait for it, send the rest of a request), and between two
looks that are ``stalled_s`` apart it has done nothing of it; or ``TURN_STALLED_S``, where others wait for the memory
that it holds.  *Idle*: nothing is to do, and no request has come for ``idle_s``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdsnap.server.context import Limits
from nbdsnap.server.turns import TURN_STALLED_S

if TYPE_CHECKING:
    from nbdsnap.server.datapath import DataPath

MOST_LOOKS_S = 5.0
LEAST_LOOKS_S = 0.05


def looks_s(limits: Limits) -> float:
    """Seconds between two looks."""
    limited = [seconds for seconds in (limits.idle_s, limits.stalled_s, TURN_STALLED_S) if seconds]
    return min(MOST_LOOKS_S, max(LEAST_LOOKS_S, min(limited) / 4))


class Watch:
    def __init__(self, limits: Limits) -> None:
        self._idle_s = limits.idle_s
        self._stalled_s = limits.stalled_s
        self._active_at: float | None = None
        self._state: object = None
        self._since = 0.0

    def active(self, now: float) -> None:
        """A request, or a part of one, has come."""
        self._active_at = now

    def look(self, now: float, path: DataPath) -> str:
        """Why the client should go; "": it may stay."""
        state = path.owed()
        if state != self._state:
            self._state, self._since = state, now
        elif state is not None and self._stalled_s and now - self._since >= self._stalled_s:
            return f"the client has stalled for {self._stalled_s:g} s"
        elif state is not None and path.has_turn and path.context.turns.waiting and now - self._since >= TURN_STALLED_S:
            return f"the client has stalled for {TURN_STALLED_S:g} s, and others wait for the memory"
        if self._active_at is None:
            self._active_at = now
        if not self._idle_s or state is not None or path.pending or path.waits_for_turn:
            return ""
        return f"the client was idle for {self._idle_s:g} s" if now - self._active_at >= self._idle_s else ""
