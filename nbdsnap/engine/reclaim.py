"""Giving back what a deleted snapshot was the last to need.

A record ``(chunk, epoch)`` serves the snapshots in ``(previous, epoch]``.  When snapshot ``s`` is deleted, only
records with
``previous < s <= epoch`` can lose their last one; and if another snapshot ``n`` follows, those at or after ``n`` still
serve it.  So only the chunks in ``changed`` for epochs in [s, n) are looked at: the cost is what changed between ``s``
and ``n``.

A removed record's chunk still counts as changed since any older snapshot ``p``: the record was useless, hence its
previous one is of an epoch at or after ``p``, and stays in ``changed``.

A rollback to the newest snapshot makes its records useless in another way: the live data holds the same again
(:func:`forget_slice`).

The work is done in slices of one transaction each.  A slice asks which snapshots live *now*, so it is right whatever
was taken or deleted since the work began, and may be done twice: after a crash the whole deletion is simply begun
again.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace

from nbdsnap.store import chunkset
from nbdsnap.store.index import Index, IndexWriter, Record
from nbdsnap.store.layout import BLOCK, BLOCK_SHIFT

SLICE_CHUNKS = 1024
"""Chunks looked at in one transaction, a block at least: some milliseconds in which writes wait."""


END_OF_EPOCHS = 1 << 32

Position = tuple[int, int]
"""``(epoch, block)`` in ``changed``."""


@dataclass(frozen=True)
class Part:
    """What is left to look at for one deleted snapshot: ``changed`` from (epoch, block) to before the epoch ``end``."""

    snapshot: int
    epoch: int
    block: int
    end: int


@dataclass
class Slice:
    """What one transaction removes."""

    slots: list[int] = field(default_factory=list)
    gone: dict[Position, int] = field(default_factory=dict)
    """(epoch, block) -> the set of chunks whose records went."""
    usage: dict[tuple[int, int], int] = field(default_factory=dict)
    """(previous, epoch) -> change of the count of slots."""

    def add_usage(self, previous: int, epoch: int, count: int) -> None:
        self.usage[previous, epoch] = self.usage.get((previous, epoch), 0) + count


def parts(doomed: list[int], epochs: list[int]) -> list[Part]:
    """What to look at for the deletion of the snapshots ``doomed``, of which ``epochs`` survive; both ascending.

    Each one's part ends where the next snapshot begins that lives or is doomed too: no part is looked at twice.
    """
    ends = sorted({*doomed, *epochs, END_OF_EPOCHS})
    return [Part(epoch, epoch, 0, ends[bisect_right(ends, epoch)]) for epoch in doomed]


def reclaim_slice(index: Index, volume: int, epochs: list[int], todo: list[Part]) -> tuple[list[int], list[Part]]:
    """Do some of ``todo`` in one transaction: remove useless records, and the snapshots that are done.

    ``epochs``: of the live snapshots, ascending.  Returns the freed slots, once their removal is durable, and what is
    left to do.
    """

    def change(txn: IndexWriter) -> tuple[list[int], list[Part]]:
        work = Slice()
        left = list(todo)
        steps = 0
        while left and steps < SLICE_CHUNKS:
            part = left.pop(0)
            looked_at, rest = _reclaim_part(txn, volume, work, epochs, part, SLICE_CHUNKS - steps)
            steps += looked_at + 1
            if rest is not None:
                left.insert(0, rest)
            else:
                txn.delete_snapshot(volume, part.snapshot)
        _enter(txn, volume, work)
        return work.slots, left

    return index.update(change)


def _enter(txn: IndexWriter, volume: int, work: Slice) -> None:
    """Into the tables that follow from ``preserved``."""
    for (epoch, block), gone in work.gone.items():
        txn.put_changed(volume, epoch, block, txn.changed_block(volume, epoch, block) & ~gone)
    txn.change_slots(freed=work.slots)
    txn.add_usage(volume, work.usage)


def forget_slice(index: Index, volume: int, first_epoch: int) -> tuple[list[int], bool]:
    """Remove, in one transaction, some records of epochs from ``first_epoch`` on, the newest snapshot's: the live data
    holds the same, durably.

    Returns the freed slots, and whether there may be more to remove.  A record with a later one of its chunk stays: it
    is the later that the deletion of a snapshot has left for its own reclaiming.
    """

    def change(txn: IndexWriter) -> tuple[list[int], bool]:
        work = Slice()
        steps = 0
        cursor = txn.cursor(volume)
        for epoch, block, members in txn.changed(volume, first_epoch, END_OF_EPOCHS):
            if steps >= SLICE_CHUNKS:
                break
            for number in chunkset.iterate(members):
                previous, record, following = cursor.around((block << BLOCK_SHIFT) + number, epoch)
                if record is not None and following is None:
                    _remove(txn, volume, work, previous.epoch if previous else 0, record, None)
                    steps += 1
        _enter(txn, volume, work)
        return work.slots, steps > 0

    return index.update(change)


def _reclaim_part(
    txn: IndexWriter, volume: int, work: Slice, epochs: list[int], part: Part, limit: int
) -> tuple[int, Part | None]:
    """Go on with ``part`` until about ``limit`` chunks were looked at; returns how many were, and what is left of
    it."""
    looked_at = 0
    cursor = txn.cursor(volume)
    for epoch, block, members in txn.changed(volume, part.epoch, part.end, part.block):
        if looked_at >= limit:
            return looked_at, replace(part, epoch=epoch, block=block)
        looked_at += members.bit_count()
        for number in chunkset.iterate(members):
            _remove_if_useless(txn, volume, work, cursor.around((block << BLOCK_SHIFT) + number, epoch), epochs)
    return looked_at, None


def _remove_if_useless(
    txn: IndexWriter,
    volume: int,
    work: Slice,
    around: tuple[Record | None, Record | None, Record | None],
    epochs: list[int],
) -> None:
    previous, record, following = around
    if record is None:
        return
    before = previous.epoch if previous else 0
    if bisect_right(epochs, record.epoch) == bisect_right(epochs, before):
        _remove(txn, volume, work, before, record, following)


def _remove(txn: IndexWriter, volume: int, work: Slice, before: int, record: Record, following: Record | None) -> None:
    """``before``: the epoch of the chunk's previous record, or 0."""
    txn.delete_preserved(volume, record)
    where = record.epoch, record.chunk >> BLOCK_SHIFT
    work.gone[where] = work.gone.get(where, 0) | 1 << (record.chunk & (BLOCK - 1))
    if record.has_slot:
        work.slots.append(record.slot)
        work.add_usage(before, record.epoch, -1)
    if following is not None and following.has_slot:
        work.add_usage(record.epoch, following.epoch, -1)
        work.add_usage(before, following.epoch, +1)
