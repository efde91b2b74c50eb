"""The live volume, opened: the :class:`~nbdsnap.engine.device.Device` of a connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

from nbdsnap.engine.device import Extent
from nbdsnap.engine.diff import ChangeMap
from nbdsnap.engine.volume import Volume


class LiveDevice:
    """The volume's own methods, bound here so that the data path pays for no second call.  ``closed`` is called
    once."""

    def __init__(self, volume: Volume, bases: Mapping[str, ChangeMap], closed: Callable[[], None]) -> None:
        self.name = volume.name
        self.read_only = volume.record.replica
        self._volume = volume
        self._bases = bases
        self._closed: Callable[[], None] | None = closed
        self._close_lock = threading.Lock()
        self.read_now = volume.read_now
        self.read = volume.read
        self.write_now = volume.write_now
        self.writes_now = volume.writes_now
        self.flush_now = volume.flush_now
        self.submit = volume.submit
        self.extents = volume.extents
        self.depths = volume.depths
        self.is_sparse = volume.is_sparse
        self.cache = volume.cache

    @property
    def size(self) -> int:
        return self._volume.size

    def changes(self, base: str, offset: int, length: int) -> Iterator[Extent]:
        return self._bases[base].extents(offset, length)

    def close(self) -> None:
        with self._close_lock:
            closed, self._closed = self._closed, None
        if closed is not None:
            closed()
