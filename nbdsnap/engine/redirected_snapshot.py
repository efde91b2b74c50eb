"""A snapshot of a thin volume or clone, opened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import merge

from nbdsnap.engine.base import Base
from nbdsnap.engine.chain import SnapshotChunks
from nbdsnap.engine.device import Extent, Op
from nbdsnap.engine.diff import ChangeMap
from nbdsnap.engine.livechunks import PIECE, Range, layers
from nbdsnap.engine.volume import extents_of
from nbdsnap.errors import ConflictError
from nbdsnap.store.layout import CHUNK_SHIFT, chunk_count


class RedirectedSnapshotDevice:
    """Its :class:`~nbdsnap.engine.device.Device`.  ``closed`` is called once."""

    read_only = True

    def __init__(
        self,
        chunks: SnapshotChunks,
        base: Callable[[], Base],
        size: int,
        maps: Mapping[str, ChangeMap],
        closed: Callable[[], None],
    ) -> None:
        self.name = chunks.name
        self.size = size
        self._chunks = chunks
        self._base = base
        self._maps = maps
        self._closed: Callable[[], None] | None = closed
        self._close_lock = threading.Lock()

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        return self._read(buffer, offset, now=True)

    def read(self, buffer: memoryview, offset: int) -> None:
        for start in range(0, len(buffer), PIECE):
            self._read(buffer[start : start + PIECE], offset + start, now=False)

    def _read(self, buffer: memoryview, offset: int, *, now: bool) -> bool:
        base = self._base()
        return self._chunks.read(buffer, offset, lambda part, start: base.read(part, start, now=now), now=now)

    def write_now(self, offset: int, data: memoryview) -> bool:
        raise ConflictError(f"{self.name} is a snapshot: it never changes")

    def writes_now(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool]:
        return [False] * len(writes)

    def flush_now(self) -> bool:
        return True

    def submit(self, op: Op) -> None:
        op.done(ConflictError(f"{self.name} is a snapshot: it never changes") if op.length else None)

    def extents(self, offset: int, length: int) -> list[Extent]:
        own, below = self._data(offset, length)
        return extents_of(merge(own, below), offset, offset + length)

    def depths(self, offset: int, length: int) -> list[Extent]:
        return layers(*self._data(offset, length), offset, offset + length)

    def _data(self, offset: int, length: int) -> tuple[list[Range], list[Range]]:
        """Where its own data is, and the base's; ascending."""
        base = self._base()
        end = offset + length
        own: list[Range] = []
        below: list[Range] = []
        position = offset
        for first, stop, is_data in self._chunks.data_runs(offset >> CHUNK_SHIFT, chunk_count(end)):
            low, high = max(first << CHUNK_SHIFT, offset), min(stop << CHUNK_SHIFT, end)
            if low > position:
                below.extend(base.data_extents(position, low - position))
            if is_data:
                own.append((low, high))
            position = high
        if position < end:
            below.extend(base.data_extents(position, end - position))
        return own, below

    def changes(self, base: str, offset: int, length: int) -> Iterator[Extent]:
        return self._maps[base].extents(offset, length)

    def is_sparse(self) -> bool:
        return True

    def cache(self, offset: int, length: int) -> None:
        self._chunks.will_need(offset >> CHUNK_SHIFT, chunk_count(offset + length))
        self._base().will_need(offset, length)

    def close(self) -> None:
        with self._close_lock:
            closed, self._closed = self._closed, None
        if closed is not None:
            closed()
