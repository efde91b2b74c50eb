"""The benchmark's own client: which request comes when, without a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pipeline import FLUSH, PipelineError, Schedule, offsets_of


def drive(schedule: Schedule, depth: int, steps: int, answer_at_once: int) -> list[int]:
    """What is sent where ``depth`` may be in flight and up to ``answer_at_once`` answers arrive together, in order."""
    sent: list[int] = []
    in_flight: list[int] = []
    while len(sent) < steps:
        while len(in_flight) < depth and (offset := schedule.next(len(in_flight))) is not None:
            sent.append(offset)
            in_flight.append(offset)
        if not in_flight:
            break
        for offset in in_flight[:answer_at_once]:
            if offset != FLUSH:
                schedule.answered()
        del in_flight[:answer_at_once]
    return sent


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_one_flush_for_so_many_answered_writes(depth: int, flush_every: int, at_once: int) -> None:
    offsets = [number * 4096 for number in range(400)]
    schedule = Schedule(offsets, once=True, flush_every=flush_every)
    sent = drive(schedule, depth, 10_000, at_once)
    assert [offset for offset in sent if offset != FLUSH] == offsets
    assert schedule.flushes == sent.count(FLUSH) == 400 // flush_every
    for index, offset in enumerate(sent):
        if offset == FLUSH:
            before = sent[:index]
            writes, flushes = index - before.count(FLUSH), before.count(FLUSH) + 1
            assert writes >= flushes * flush_every, "a FLUSH went out before its writes"


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_waiting_at_a_flush_keeps_writes_and_flush_apart(depth: int, flush_every: int, at_once: int) -> None:
    schedule = Schedule([0], once=False, flush_every=flush_every, wait_at_flush=True)
    sent = drive(schedule, depth, 200, at_once)
    period = [0] * flush_every + [FLUSH]
    assert sent == (period * (len(sent) // len(period) + 1))[: len(sent)]


def test_waiting_sends_nothing_beside_a_flush() -> None:
    schedule = Schedule([0], once=False, flush_every=1, wait_at_flush=True)
    assert schedule.next(0) == 0
    assert schedule.next(1) is None
    schedule.answered()
    assert schedule.next(0) == FLUSH
    assert schedule.next(1) is None
    assert schedule.next(0) == 0


def test_without_flushes_the_offsets_go_round() -> None:
    assert drive(Schedule([5, 6], once=False), depth=2, steps=5, answer_at_once=1)[:5] == [5, 6, 5, 6, 5]


@pytest.mark.parametrize("rw", ["randwrite", "write"])
def test_once_touches_each_block_once(rw: str) -> None:
    offsets = offsets_of(rw, 4096, 1 << 20, seed=3, once=True)
    assert sorted(offsets) == list(range(0, 1 << 20, 4096))
    assert (offsets == sorted(offsets)) is (rw == "write")


def test_random_offsets_come_from_the_seed() -> None:
    first = offsets_of("randread", 4096, 1 << 24, seed=3, once=False)
    assert first == offsets_of("randread", 4096, 1 << 24, seed=3, once=False)
    assert first != offsets_of("randread", 4096, 1 << 24, seed=4, once=False)
    assert all(0 <= offset <= (1 << 24) - 4096 and offset % 4096 == 0 for offset in first)


def test_a_region_without_a_block_is_refused() -> None:
    with pytest.raises(PipelineError, match="holds no block"):
        offsets_of("randread", 4096, 4095, seed=1, once=False)
