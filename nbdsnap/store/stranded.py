"""Intents that can't be applied now, each volume's in a file of its own, so that the log can go on without them.

The file is replaced as a whole, and durably: a crash leaves the old one or the new one.  At a start, a file's intents
come before those of the log.  Where both have an intent, because a crash came between the file and the log's
retirement, it is applied twice, the last time in the log's order; so no older data lands over newer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nbdsnap.store.fileio import FileIO
from nbdsnap.store.intentlog import Intent, load_intents, save_intents
from nbdsnap.store.layout import STRANDED_FILE


class StrandedIntents:
    """The files in the folder ``pool``, by the volumes' numbers."""

    def __init__(self, io: FileIO, pool: Path) -> None:
        self._io = io
        self._pool = pool

    def path(self, number: int) -> Path:
        return self._pool / STRANDED_FILE.format(number)

    def load(self, number: int) -> list[Intent]:
        """In order; CorruptionError where the file is damaged."""
        path = self.path(number)
        return load_intents(self._io, path) if path.exists() else []

    def add(self, number: int, intents: Iterable[Intent]) -> None:
        """Behind those that are there.  Durable on return."""
        save_intents(self._io, self.path(number), [*self.load(number), *intents])

    def remove(self, *numbers: int) -> None:
        """Forget them, durably: all are durable in place."""
        for number in numbers:
            self._io.unlink(self.path(number))
        if numbers:
            self._io.fsync_directory(self._pool)
