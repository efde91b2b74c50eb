"""Where on a volume its changes lie, and how much is shared there: a picture's worth of numbers.

The volume is divided into equal cells.  A *row* says how much of each was changed between one snapshot and the next, or
since the newest: from the sets in ``changed``, so it costs what was changed.  *Sharers* says how many snapshots share
what is preserved in a cell, on average; that would take a walk through all records, so of a cell with many only some
are looked at, from several places in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice

from nbdsnap.models import MapRow, VolumeMap
from nbdsnap.store import chunkset
from nbdsnap.store.index import IndexReader
from nbdsnap.store.layout import BLOCK, BLOCK_SHIFT, CHUNK, CHUNK_SHIFT, chunk_count

MAX_CELLS = 1024
MAX_ROWS = 1000

PLACES = 8
RECORDS = 128
"""In a cell: places to look at, and records to look at from each on."""

END_OF_EPOCHS = 1 << 32

Epochs = list[tuple[int, str]]
"""Of the live snapshots, with their names, ascending."""


def volume_map(
    reader: IndexReader, number: int, name: str, size: int, epochs: Epochs, cells: int, rows: int
) -> VolumeMap:
    """Of the volume ``number``: at most ``cells`` cells, and the newest ``rows`` rows, oldest first."""
    chunks = chunk_count(size)
    per_cell = -(-chunks // min(cells, chunks))
    count = -(-chunks // per_cell)
    found: list[MapRow] = []
    ends = [epoch for epoch, _ in epochs[1:]] + [END_OF_EPOCHS]
    for (first, since), end in list(zip(epochs, ends, strict=False))[-rows:]:
        counts = _changed(reader, number, first, end, per_cell, count)
        found.append(MapRow(since=since, changed_bytes=[one * CHUNK for one in counts]))
    live = [epoch for epoch, _ in epochs]
    sharers = [
        _sharers(reader, number, live, cell * per_cell, min(chunks, (cell + 1) * per_cell)) for cell in range(count)
    ]
    return VolumeMap(volume=name, size=size, cell_bytes=per_cell << CHUNK_SHIFT, rows=found, sharers=sharers)


def _changed(reader: IndexReader, number: int, first: int, end: int, per_cell: int, count: int) -> list[int]:
    """Chunks by cell; one that was changed in several epochs counts once."""
    blocks: dict[int, int] = {}
    for _, block, members in reader.changed(number, first, end):
        blocks[block] = blocks.get(block, 0) | members
    counts = [0] * count
    for block, members in blocks.items():
        for cell, part in _parts(block << BLOCK_SHIFT, members, per_cell):
            if cell < count:
                counts[cell] += part.bit_count()
    return counts


def _parts(base: int, members: int, per_cell: int) -> Iterator[tuple[int, int]]:
    """A block's set, which begins at chunk ``base``, by cell."""
    cell = base // per_cell
    if base + BLOCK <= (cell + 1) * per_cell:
        yield cell, members
        return
    start = base
    while start < base + BLOCK:
        stop = min((start // per_cell + 1) * per_cell, base + BLOCK)
        yield start // per_cell, members & chunkset.span(start - base, stop - base)
        start = stop


def _sharers(reader: IndexReader, number: int, epochs: list[int], first: int, end: int) -> float:
    """How many snapshots share a record of the chunks [first, end), on average; 0 where there is none."""
    cursor = reader.cursor(number)
    looked_at = shared = 0
    step = max(1, (end - first) // PLACES)
    for start in range(first, end, step):
        stop = min(end, start + step)
        chunk, previous = -1, 0
        for record in islice(cursor.all(start), RECORDS):
            if record.chunk >= stop:
                break
            previous = previous if record.chunk == chunk else 0
            if record.has_slot:
                looked_at += 1
                shared += bisect_right(epochs, record.epoch) - bisect_right(epochs, previous)
            chunk, previous = record.chunk, record.epoch
    return round(shared / looked_at, 2) if looked_at else 0.0
