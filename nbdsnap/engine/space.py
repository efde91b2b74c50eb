"""How much the exception store may still take, and who is told before it is full.

The store's *capacity* is what it holds now, and what it can still take: up to its limit, and no more than its file
system has free.  Fullness is percent of that, so that both ends, whichever is nearer, warn in time.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence

from nbdsnap.errors import NoSpaceError
from nbdsnap.sizes import format_size
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.layout import CHUNK

log = logging.getLogger(__name__)

MARGIN = 16 << 20
"""Bytes of the file system that acknowledged writes leave free for those that wait for their preservation."""

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: BaseException) -> bool:
    """Whether an operation failed because there was no space."""
    return isinstance(error, NoSpaceError) or (isinstance(error, OSError) and error.errno in FULL_ERRNOS)


class Space:
    """``warn_at``: percentages.  ``reserve``: bytes of the file system that may be needed at once for something else.

    ``refresh`` is for the preserver's thread, the rest for any.
    """

    def __init__(self, store: ChunkStore, warn_at: Sequence[int], reserve: int) -> None:
        self._store = store
        self._warn_at = sorted(warn_at)
        self._margin = MARGIN + reserve
        self._level = 0
        self._refusing = False
        self.room = 0
        """Slots that are certainly free: as many chunks may be promised to be preserved."""
        self.refresh()

    def free_bytes(self) -> int:
        """What the store can still take."""
        free = self._store.free_disk_bytes
        limit = self._store.limit
        return free if limit is None else max(0, min(limit - self._store.used_bytes, free))

    def refresh(self) -> None:
        """Look again: chunks were preserved, or freed, or a moment passed."""
        limit = self._store.limit
        room = (self._store.free_disk_bytes - self._margin) // CHUNK
        if limit is not None:
            room = min(room, limit // CHUNK - self._store.used_slots)
        self.room = max(0, room)
        if room > 0:
            self._refusing = False
        self._warn()

    def refuse(self, error: BaseException) -> None:
        """A write was refused for want of space: once in a while, the log says so."""
        if not self._refusing:
            log.warning("writes that would have to preserve data are refused: %s", error)
        self._refusing = True

    @property
    def percent(self) -> int:
        used = self._store.used_bytes
        free = self.free_bytes()
        return 100 * used // (used + free) if free >= CHUNK else 100

    def warning(self) -> str | None:
        """What there is to say about the store's fullness."""
        percent = self.percent
        if not any(level <= percent for level in self._warn_at):
            return None
        return f"the exception store is {percent} % full: {format_size(self.free_bytes())} left"

    def _warn(self) -> None:
        """Into the log, once for each level that is passed."""
        percent = self.percent
        level = max((level for level in self._warn_at if level <= percent), default=0)
        if level > self._level:
            log.warning("%s", self.warning())
        elif level < self._level:
            log.info("the exception store is %d %% full again", percent)
        self._level = level
