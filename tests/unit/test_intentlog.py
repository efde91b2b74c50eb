"""The intent log's ring: what was appended and not retired is what a replay finds, wherever it lies."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsnap.store.fileio import FileIO
from nbdsnap.store.intentlog import MAX_PAYLOAD, MIN_SIZE, PAGE, RECORD_BYTES, STAGE, Intent, IntentLog

Content = tuple[int, int, bytes]

KIB = 1 << 10


def content(intent: Intent) -> Content:
    return intent.sequence, intent.offset, bytes(intent.data)


def opened(path: Path, size: int) -> IntentLog:
    log = IntentLog(FileIO(), path, size)
    list(log.replay())
    log.begin_life()
    log.wake()
    return log


def replayed(path: Path, size: int) -> list[Content]:
    """What a start after a kill finds."""
    log = IntentLog(FileIO(), path, size)
    try:
        return [content(intent) for intent in log.replay()]
    finally:
        FileIO().close(log.fd)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    size=st.sampled_from([MIN_SIZE, 256 * KIB, 1 << 20]),
    longest=st.sampled_from([1, 100, 4096, 5000, 64 * KIB, MAX_PAYLOAD]),
    pages=st.booleans(),
)
def test_what_is_appended_and_not_retired_is_replayed(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, longest: int, pages: bool
) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("log") / "intent.log"
    log = opened(path, size)
    live: deque[tuple[Intent, Content]] = deque()
    for _ in range(12):
        writes = [
            (rng.randrange(1 << 40), memoryview(rng.randbytes(rng.randint(1, longest))))
            for _ in range(rng.randint(1, 70))
        ]
        taken = log.append(7, writes)
        for intent, (offset, data) in zip(taken, writes, strict=False):
            assert (intent.offset, bytes(intent.data)) == (offset, bytes(data))
            live.append((intent, content(intent)))
        if len(taken) < len(writes):  # full: retire some
            for _ in range(rng.randint(len(live) // 2, len(live))):
                intent, _ = live.popleft()
                log.retire(intent.end, intent.sequence + 1)
        assert all(content(intent) == was for intent, was in live), "memory was used again too early"
    assert replayed(path, size) == [was for _, was in live]
    assert [content(intent) for intent in log.live()] == [was for _, was in live]
    log.close()


def test_memory_is_used_again_when_nobody_looks_at_it(tmp_path: Path) -> None:
    log = opened(tmp_path / "intent.log", 64 << 20)
    seen = set()
    for number in range(200):
        intents = log.append(1, [(number, memoryview(bytes([number]))), (0, memoryview(bytes(64 * KIB)))])
        assert len(intents) == 2
        seen.add(id(intents[0].data.obj))
        log.retire(intents[-1].end, intents[-1].sequence + 1)
        del intents
    assert len(seen) <= 3, f"{len(seen)} pieces of {STAGE} bytes"
    log.close()


def test_one_call_writes_all_records_of_an_append(tmp_path: Path) -> None:
    log = opened(tmp_path / "intent.log", 1 << 20)
    calls = []

    class Counting(FileIO):
        def __init__(self) -> None:
            self.pwrite = self._pwrite  # type: ignore[misc, assignment]

        def _pwrite(self, fd: int, data: memoryview, offset: int) -> int:
            calls.append((len(data), offset))
            return FileIO.pwrite(fd, data, offset)

    log._io = Counting()
    assert len(log.append(1, [(chunk << 12, memoryview(bytes(4096))) for chunk in range(64)])) == 64
    assert len(calls) == 1
    length, offset = calls[0]
    assert (length % 4096, offset % 4096) == (0, 0)
    log.close()


def test_records_that_end_where_the_ring_does(tmp_path: Path) -> None:
    """The next one is at the ring's beginning, also within one append."""
    path = tmp_path / "intent.log"
    log = opened(path, MIN_SIZE)
    writes = [(chunk << 12, memoryview(bytes([chunk]) * (PAGE - RECORD_BYTES))) for chunk in range(10)]
    for number in range(6):
        kept = log.append(7, writes)
        assert len(kept) == 10
        assert [content(intent) for intent in log.live()] == replayed(path, MIN_SIZE) == [content(one) for one in kept]
        if number < 5:
            log.retire(kept[-1].end, kept[-1].sequence + 1)
    assert path.stat().st_size == PAGE + MIN_SIZE
    log.close()


def test_a_torn_record_behind_the_end_says_nothing(tmp_path: Path) -> None:
    """Of two records that were never synced, a power cut has taken the first, and torn the header of the other: what
    stands in it where the last durable record should is of another time."""
    path = tmp_path / "intent.log"
    log = opened(path, MIN_SIZE)
    kept, lost, torn = (log.append(1, [(n * 4096, memoryview(b"x" * 100))])[0] for n in range(3))
    FileIO().close(log.fd)
    stored = bytearray(path.read_bytes())
    places = [PAGE + (one.end - RECORD_BYTES - 104) % MIN_SIZE for one in (lost, torn)]
    stored[places[0] : places[0] + 24] = bytes(24)
    stored[places[1] + 24 : places[1] + 32] = b"\xff" * 8  # ``synced``
    path.write_bytes(stored)
    assert [sequence for sequence, _, _ in replayed(path, MIN_SIZE)] == [kept.sequence]
