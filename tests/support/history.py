"""What a volume may hold, given what its clients were told: the promises of writing, flushing and snapshots, as a
check.

A :class:`History` knows each modifying operation of one volume by when it was begun (just before it was submitted)
and ended (just after its acknowledgement was received), on any clock.  Two operations on the same byte must not have
been under way at the same time; all others may.

A byte may hold what an operation left that *may* have happened, unless one that *surely* happened came after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

SECTOR = 512
"""Bytes that a disk writes whole, and less than the kernel copies whole: inside a sector there is no tear."""

UNFINISHED = 1 << 62
"""``end`` of an operation that was never acknowledged."""


def content(seed: int, number: int, length: int) -> bytes:
    """The payload of operation ``number``: no two are alike, nor two places of one."""
    return random.Random(seed << 32 | number).randbytes(length)


class HistoryError(AssertionError):
    """A promise was broken."""


@dataclass(eq=False)
class Change:
    """A write, or (``data`` all zeroes) a trim or zeroing."""

    number: int
    offset: int
    data: bytes
    begin: int
    end: int = UNFINISHED
    fua: bool = False

    @property
    def stop(self) -> int:
        return self.offset + len(self.data)

    def part(self, low: int, high: int) -> bytes:
        return self.data[low - self.offset : high - self.offset]


@dataclass
class Instant:
    """Of the operations that were under way when a snapshot was taken: those that are in it, and those that are not, or
    not whole."""

    seen: list[Change] = field(default_factory=list)
    missing: list[Change] = field(default_factory=list)

    def include(self, other: Instant) -> None:
        self.seen += other.seen
        self.missing += other.missing

    def check(self) -> None:
        """No operation is missing that was acknowledged before one was begun that is there."""
        latest = max(self.seen, key=lambda change: change.begin, default=None)
        for change in self.missing:
            if latest is not None and change.end < latest.begin:
                raise HistoryError(
                    f"operation {latest.number} is in the snapshot, and {change.number} is not, "
                    "which was acknowledged before the other was begun"
                )


Predicate = Callable[[Change], bool]


@dataclass
class History:
    """One volume's: ``initial`` is its content before all changes, durable."""

    initial: bytes
    changes: list[Change] = field(default_factory=list)
    """Ascending by ``begin``."""
    flushes: list[tuple[int, int]] = field(default_factory=list)
    """``(begin, end)`` of the acknowledged ones."""
    _floor_key: tuple[int, ...] = (-1,)
    _floor: bytes = b""

    # --- what is promised ---

    def check_after_power_cut(self, image: bytes, time: int) -> None:
        """``image`` is what the volume holds after a cut at ``time``: what was flushed before is there."""
        flushed = max((begin for begin, end in self.flushes if end < time), default=-UNFINISHED)
        self.check(
            image,
            surely=lambda change: change.end < flushed or (change.fua and change.end < time),
            maybe=lambda change: change.begin < time,
        )

    def check_after_kill(self, image: bytes, time: int) -> None:
        """``image`` is what the volume holds after its server was killed at ``time``: all that was acknowledged."""
        self.check(image, surely=lambda change: change.end < time, maybe=lambda change: change.begin < time)

    def check_snapshot(self, image: bytes, begin: int, end: int) -> Instant:
        """``image`` is a snapshot that was taken between ``begin`` and ``end``: the volume as it was at one instant.

        Several that were taken together are at one if all of their :class:`Instant` s together are.
        """
        self.check(image, surely=lambda change: change.end < begin, maybe=lambda change: change.begin < end)
        under_way = [change for change in self.changes if change.begin < end and change.end >= begin]
        instant = self._instant(image, under_way)
        instant.check()
        return instant

    # --- how it is checked ---

    def check(self, image: bytes, surely: Predicate, maybe: Predicate) -> None:
        if len(image) != len(self.initial):
            raise HistoryError(f"{len(image)} bytes, where there should be {len(self.initial)}")
        sure = [change for change in self.changes if surely(change)]
        floor = self._floor_of(sure)
        if image == floor:
            return
        possible = [change for change in self.changes if maybe(change) and not surely(change)]
        for start in range(0, len(image), SECTOR):
            end = min(start + SECTOR, len(image))
            if image[start:end] != floor[start:end]:
                self._check_sector(image, floor, start, end, sure, possible)

    def _floor_of(self, sure: list[Change]) -> bytes:
        """The content if nothing happened but what surely did."""
        key = tuple(change.number for change in sure)
        if key != self._floor_key:
            floor = bytearray(self.initial)
            for change in sure:
                floor[change.offset : change.stop] = change.data
            self._floor_key, self._floor = key, bytes(floor)
        return self._floor

    def _check_sector(
        self, image: bytes, floor: bytes, start: int, end: int, sure: list[Change], possible: list[Change]
    ) -> None:
        here = [change for change in possible if change.offset < end and change.stop > start]
        later = [change for change in sure if change.offset < end and change.stop > start]
        borders = {start, end}
        for change in (*here, *later):
            borders.update(border for border in (change.offset, change.stop) if start < border < end)
        cuts = sorted(borders)
        for low, high in pairwise(cuts):
            found = image[low:high]
            if found == floor[low:high]:
                continue
            last_sure = max((c.begin for c in later if c.offset <= low and c.stop >= high), default=-UNFINISHED)
            allowed = [c for c in here if c.offset <= low and c.stop >= high and c.begin > last_sure]
            if all(found != change.part(low, high) for change in allowed):
                numbers = [change.number for change in allowed]
                raise HistoryError(
                    f"bytes {low} to {high}: neither what was there for sure ({self._writer_of(sure, low)}) "
                    f"nor what any of the operations {numbers} wrote; {self._origin_of(found, low)}"
                )

    def _writer_of(self, sure: list[Change], position: int) -> str:
        writers = [change.number for change in sure if change.offset <= position < change.stop]
        return f"operation {writers[-1]}" if writers else "the first content"

    def _origin_of(self, found: bytes, position: int) -> str:
        """Where bytes that should not be there come from: for the person who has to find out why."""
        if found == self.initial[position : position + len(found)]:
            return "they are the first content"
        for change in self.changes:
            if change.offset <= position < change.stop and change.part(position, position + len(found)) == found:
                return f"they are of operation {change.number}, begun {change.begin}, ended {change.end}"
        return "they are zeroes" if not any(found) else "they are of no operation here"

    def _instant(self, image: bytes, under_way: list[Change]) -> Instant:
        instant = Instant()
        for change in under_way:
            for low, high in _alone(change, under_way):
                before = self._floor[low:high]
                if change.part(low, high) == before:
                    continue
                if image[low:high] != before:
                    instant.seen.append(change)
                if image[low:high] != change.part(low, high):
                    instant.missing.append(change)
        return instant


def _alone(change: Change, others: Iterable[Change]) -> list[tuple[int, int]]:
    """The parts of a change's range that no other change has."""
    parts = [(change.offset, change.stop)]
    for other in others:
        if other is not change:
            parts = [piece for part in parts for piece in _without(part, other.offset, other.stop)]
    return parts


def _without(part: tuple[int, int], low: int, high: int) -> list[tuple[int, int]]:
    start, end = part
    pieces = [(start, min(end, low)), (max(start, high), end)]
    return [(first, last) for first, last in pieces if first < last]
