"""The arithmetic of the comparison: pure functions, no clock, no I/O.

Servers are compared round by round: one round runs every contender once, shortly after one another, so that a
machine that slows down for a while slows them all.  A ratio is therefore built within a round, and only then
summarised over the rounds.  Medians, because one stolen second must not decide; the range beside them, because
a median alone hides how far to trust it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """What several rounds gave: the median, the lowest, the highest, and how many rounds there were."""

    median: float
    low: float
    high: float
    rounds: int


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of ``values``; None where there are none."""
    if not values:
        return None
    return Spread(median(values), min(values), max(values), len(values))


def ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """``ours`` over ``theirs`` in every round that both finished, in the order of the rounds.

    Both map a round's number to a speed (more is better).  A round in which the other one stood still is left out.
    """
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys()) if theirs[number] > 0]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of an ascending, non-empty sequence."""
    if not ordered:
        raise ValueError("no values")
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def rotated(count: int, by: int) -> list[int]:
    """The numbers 0 … count-1, starting at another one in each round: nobody is always the first."""
    return [(number + by) % count for number in range(count)]
