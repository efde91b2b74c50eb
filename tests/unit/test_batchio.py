"""Batches of reads and writes: all of what is asked for, or the caller is told what is left to do."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.store.batchio import BATCH, BatchIO, address_of
from tests.support.blocks import stamped

PAGE = 4096


@pytest.fixture
def batch() -> Iterator[BatchIO]:
    try:
        opened = BatchIO()
    except OSError as error:
        pytest.skip(f"the system has none: {error}")
    yield opened
    opened.close()


@pytest.mark.parametrize("count", [1, 2, BATCH, BATCH + 1, 3 * BATCH - 1])
def test_reads_and_writes_what_single_calls_do(batch: BatchIO, tmp_path: Path, count: int) -> None:
    rng = random.Random(count)
    memory = memoryview(mmap.mmap(-1, count * PAGE))
    memory[:] = rng.randbytes(len(memory))
    base = address_of(memory)
    pieces = []
    expected = bytearray(PAGE * 4 * count)
    for index in range(count):
        length, offset = rng.randint(1, PAGE), rng.randrange(PAGE * (4 * count - 1))
        pieces.append((base + index * PAGE, length, offset))
        expected[offset : offset + length] = memory[index * PAGE : index * PAGE + length]  # in order: they may overlap
    path = tmp_path / "file"
    path.write_bytes(bytes(len(expected)))
    fd = os.open(path, os.O_RDWR)
    assert batch.write(fd, pieces) == []
    assert path.read_bytes() == expected
    memory[:] = bytes(len(memory))
    assert batch.read(fd, pieces) == []
    for index, (_, length, offset) in enumerate(pieces):
        assert memory[index * PAGE : index * PAGE + length] == expected[offset : offset + length]
    os.close(fd)


def test_what_was_not_done_wholly_is_told(batch: BatchIO, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(stamped(1, 0, PAGE + 100))
    memory = memoryview(mmap.mmap(-1, 4 * PAGE))
    base = address_of(memory)
    fd = os.open(path, os.O_RDONLY)
    past_the_end, nowhere = (base + PAGE, PAGE, PAGE), (0, PAGE, 0)
    assert batch.read(fd, [(base, PAGE, 0), past_the_end, nowhere, (base + PAGE, 100, PAGE)]) == [1, 2]
    assert memory[: PAGE + 100] == path.read_bytes()
    assert batch.write(fd, [(base, PAGE, 0)] * 3) == [0, 1, 2]
    os.close(fd)
    assert batch.read(fd, [(base, PAGE, 0)]) == [0]


def test_closing_twice_does_no_harm(batch: BatchIO) -> None:
    batch.close()
    batch.close()
    assert batch.read(0, [(0, 1, 0)]) == [0]
