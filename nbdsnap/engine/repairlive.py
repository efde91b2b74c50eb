"""Repair of the table ``current``: where the live data of thin volumes and clones lies.

An entry has a checksum, and is believed where that is right and its slots are nobody else's.  Live chunks have none of
their own, so what is in a slot is not looked at.  Where entries are lost, it can't be told which chunks they named: all
chunks there are marked as lost, so that reading one is an error, and not zeroes, or the base's content.  Overwriting
such a chunk mends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nbdsnap.engine.records import VolumeRecord
from nbdsnap.models import RepairStep
from nbdsnap.store.layout import BLOCK, BLOCK_SHIFT, CHUNK_SHIFT, LOST_SLOT, MAX_SLOTS, chunk_count
from nbdsnap.store.salvage import Salvage


class Taken:
    """Slots that something points at."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}

    def add(self, slot: int) -> bool:
        """Whether it was not in yet."""
        block, bit = slot >> BLOCK_SHIFT, 1 << (slot & (BLOCK - 1))
        present = self._blocks.get(block, 0)
        self._blocks[block] = present | bit
        return not present & bit


@dataclass
class LivePlan:
    """``lost``: ascending half-open ranges of chunks to mark.  ``bogus``: chunks whose slot is another one's."""

    limit: int
    lost: list[tuple[int, int]] = field(default_factory=list)
    bogus: set[int] = field(default_factory=set)


def plan_live(salvage: Salvage, volume: VolumeRecord, taken: Taken) -> LivePlan:
    """``taken``: the slots of preserved chunks, and of other volumes' live ones; this one's are added."""
    plan = LivePlan(chunk_count(volume.largest) if volume.origin is None else 0)
    for chunk, slot in salvage.current_items(volume.number):
        if chunk < plan.limit and slot < MAX_SLOTS and not taken.add(slot):
            plan.bogus.add(chunk)
    ranges = sorted(
        (one.first, plan.limit if one.end is None else min(one.end, plan.limit))
        for one in salvage.damage
        if one.table == "current" and one.volume in (None, volume.number)
    )
    for first, end in ranges:
        if plan.lost and first <= plan.lost[-1][1]:
            plan.lost[-1] = plan.lost[-1][0], max(end, plan.lost[-1][1])
        elif first < end:
            plan.lost.append((first, end))
    return plan


def live_steps(volume: VolumeRecord, plan: LivePlan) -> Iterator[RepairStep]:
    for first, end in [*plan.lost, *((chunk, chunk + 1) for chunk in sorted(plan.bogus))]:
        offset = first << CHUNK_SHIFT
        length = min(end << CHUNK_SHIFT, volume.largest) - offset
        yield RepairStep(
            kind="lost",
            detail=f"{volume.name}, within bytes {offset} to {offset + length - 1}: live data is lost; mark what is "
            "not known, so that reads fail",
            volume=volume.name,
            offset=offset,
            length=length,
        )


def live_items(salvage: Salvage, volume: VolumeRecord, plan: LivePlan) -> Iterator[tuple[int, int]]:
    """What ``current`` will hold of the volume: what is believed, and marks for what is lost.  Ascending."""
    lost = iter((chunk, LOST_SLOT) for first, end in plan.lost for chunk in range(first, end))
    mark = next(lost, None)
    for chunk, slot in salvage.current_items(volume.number):
        if chunk >= plan.limit:
            continue
        while mark is not None and mark[0] <= chunk:
            if mark[0] < chunk:
                yield mark
            mark = next(lost, None)
        yield chunk, LOST_SLOT if chunk in plan.bogus else slot
    while mark is not None:
        yield mark
        mark = next(lost, None)
