"""What changed between two points of a volume's time: as a list, or as a map of a part of the volume.

A chunk changed after snapshot A and before snapshot B (or the present) exactly where it has a record of an epoch in
[A, B): the first write after a snapshot leaves one.  So a diff is the union of the sets in ``changed`` for these
epochs.  Its cost is that of the change, whatever the size of the volume or the number of snapshots; a chunk written
with the same bytes as before counts as changed.

Where B is larger, what lies behind A's end counts as changed, from the beginning of the chunk that A ends in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from nbdsnap.engine.device import CHANGED, Extent
from nbdsnap.store import chunkset
from nbdsnap.store.index import Index, IndexReader
from nbdsnap.store.layout import BLOCK_SHIFT, CHUNK, CHUNK_SHIFT, chunk_count

WINDOW_BLOCKS = 16
"""Blocks that a map asks the index for at first: 256 MiB."""

WINDOW_MOST = 4096
"""Likewise, at most: a few megabytes of sets."""


def changed_blocks(reader: IndexReader, volume: int, first_epoch: int, end_epoch: int) -> list[tuple[int, int]]:
    """``(block, set)`` of all chunks with a record of an epoch in [first_epoch, end_epoch), ascending.

    Takes about 600 bytes of memory per 16 MiB of volume in which anything changed.
    """
    blocks: dict[int, int] = {}
    for _, block, members in reader.changed(volume, first_epoch, end_epoch):
        blocks[block] = blocks.get(block, 0) | members
    return sorted(blocks.items())


def extents(blocks: list[tuple[int, int]], size: int, grown_from: int) -> Iterator[tuple[int, int]]:
    """``(offset, length)``: ascending, disjoint, not adjacent, cut at ``size``, which is B's; ``grown_from`` is A's."""
    start = end = 0
    for low, high in _ranges(blocks, size, grown_from):
        if low != end:
            if start < end:
                yield start, end - start
            start = low
        end = high
    if start < end:
        yield start, end - start


def _ranges(blocks: list[tuple[int, int]], size: int, grown_from: int) -> Iterator[tuple[int, int]]:
    """Ascending, disjoint, not empty half-open ranges of bytes."""
    limit = size if size <= grown_from else grown_from & -CHUNK
    for block, members in blocks:
        base = block << BLOCK_SHIFT
        for first, end in chunkset.runs(members):
            low, high = (base + first) << CHUNK_SHIFT, (base + end) << CHUNK_SHIFT
            if low < limit:
                yield low, min(high, limit)
    if limit < size:
        yield limit, size


class ChangeMap:
    """The same as consecutive extents of any range, for whoever asks piece by piece.

    ``first_epoch``: of the older point.  ``end_epoch``: of the newer one, or after all of them for the live volume.
    ``size``: of the newer point.  ``pending``: the chunks of a range of the live volume, in any order, that have been
    written and are on their way into the index.
    """

    def __init__(
        self,
        index: Index,
        volume: int,
        first_epoch: Callable[[], int],
        end_epoch: int,
        grown_from: int,
        size: Callable[[], int],
        pending: Callable[[int, int], Iterable[int]],
    ) -> None:
        self._index = index
        self._volume = volume
        self._first_epoch = first_epoch
        self._end_epoch = end_epoch
        self._grown_from = grown_from
        self._size = size
        self._pending = pending

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See :meth:`nbdsnap.engine.device.Device.changes`.

        The index is asked for more at a time the less it has to say, so that a map costs what changed, not what did
        not; and never for so much that a transaction is long.
        """
        end = offset + length
        size = max(self._size(), end)
        window = WINDOW_BLOCKS
        position = offset
        while position < end:
            first = position >> CHUNK_SHIFT >> BLOCK_SHIFT
            stop = min((first + window) << BLOCK_SHIFT << CHUNK_SHIFT, end)
            blocks = self._blocks(position, stop)
            window = min(2 * window, WINDOW_MOST) if len(blocks) <= WINDOW_BLOCKS else WINDOW_BLOCKS
            for low, high in _ranges(blocks, size, self._grown_from):
                low, high = max(low, position), min(high, stop)
                if low < high:
                    if position < low:
                        yield low - position, 0
                    yield high - low, CHANGED
                    position = high
            if position < stop:
                yield stop - position, 0
                position = stop

    def _blocks(self, offset: int, end: int) -> list[tuple[int, int]]:
        """The changed blocks that touch the range, ascending."""
        pending = list(self._pending(offset >> CHUNK_SHIFT, chunk_count(end)))  # first: from there it goes to the index
        blocks: dict[int, int] = {}
        epochs = self._first_epoch(), self._end_epoch
        first_block, end_block = offset >> CHUNK_SHIFT >> BLOCK_SHIFT, ((chunk_count(end) - 1) >> BLOCK_SHIFT) + 1
        with self._index.read() as reader:
            for block, members in reader.changed_within(self._volume, *epochs, first_block, end_block):
                blocks[block] = blocks.get(block, 0) | members
        for chunk in pending:
            block = chunk >> BLOCK_SHIFT
            blocks[block] = blocks.get(block, 0) | 1 << (chunk & ((1 << BLOCK_SHIFT) - 1))
        return sorted(blocks.items())
