"""Space accounting, from the table ``usage`` alone.

``usage`` counts slots by interval ``(previous, epoch]``: such a slot serves exactly the live snapshots whose epoch
lies inside. So who shares what, and what a deletion would free, follows from the counts; no record is looked at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from nbdsnap.store.layout import CHUNK

Usage = Iterable[tuple[int, int, int]]
"""``(previous, epoch, slots)``."""


class _Ranks(dict[int, int]):
    """Epoch -> how many of ``epochs`` (ascending) are not after it.  There may be a million intervals, of far fewer
    different epochs."""

    def __init__(self, epochs: list[int]) -> None:
        super().__init__()
        self._epochs = epochs

    def __missing__(self, epoch: int) -> int:
        rank = self[epoch] = bisect_right(self._epochs, epoch)
        return rank


@dataclass
class Shares:
    """Bytes by snapshot, in the order of the epochs asked about, and by how many snapshots share them.

    ``unneeded``: those that no snapshot needs, which deletions under way are about to give back.
    """

    exclusive: list[int]
    shared: list[int]
    histogram: dict[int, int]
    unneeded: int


def shares(usage: Usage, epochs: list[int]) -> Shares:
    """``epochs``: of the live snapshots, ascending.  Costs one step per interval, and one per snapshot."""
    exclusive = [0] * len(epochs)
    steps = [0] * (len(epochs) + 1)
    histogram: dict[int, int] = {}
    ranks = _Ranks(epochs)
    for previous, epoch, slots in usage:
        low, high = ranks[previous], ranks[epoch]
        sharers, size = high - low, slots * CHUNK
        histogram[sharers] = histogram.get(sharers, 0) + size
        if sharers == 1:
            exclusive[low] += size
        elif sharers:
            steps[low] += size
            steps[high] -= size
    shared: list[int] = []
    running = 0
    for step in steps[:-1]:
        running += step
        shared.append(running)
    unneeded = histogram.pop(0, 0)
    return Shares(exclusive, shared, histogram, unneeded)


def freed_by_deleting(usage: Usage, epochs: list[int], doomed: set[int]) -> int:
    """Bytes that only the snapshots ``doomed`` need, of the live ones ``epochs`` (ascending)."""
    survivors = [epoch for epoch in epochs if epoch not in doomed]
    ranks, kept = _Ranks(epochs), _Ranks(survivors)
    freed = 0
    for previous, epoch, slots in usage:
        if kept[previous] == kept[epoch] and ranks[previous] != ranks[epoch]:
            freed += slots
    return freed * CHUNK
