"""Where an origin's data is: exact, and not asked for again and again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.store.fileio import FileIO
from nbdsnap.store.origin import Origin

CHUNK = 4096


class Counting(FileIO):
    asked = 0

    def data_extents(self, fd: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
        self.asked += 1
        return super().data_extents(fd, offset, length)


@pytest.fixture
def io() -> Counting:
    return Counting()


@pytest.fixture
def origin(tmp_path: Path, io: Counting) -> Iterator[Origin]:
    """100 chunks: 10 of hole, 50 of data, 10 of hole, 20 of data, 10 of hole."""
    path = tmp_path / "vol.img"
    with path.open("wb") as file:
        file.truncate(100 * CHUNK)
        for first, count in ((10, 50), (70, 20)):
            file.seek(first * CHUNK)
            file.write(b"x" * count * CHUNK)
    opened = Origin(io, path)
    yield opened
    opened.close()


def chunks(origin: Origin, first: int, end: int) -> list[tuple[int, int]]:
    found = origin.data_extents(first * CHUNK, (end - first) * CHUNK)
    return [(low // CHUNK, high // CHUNK) for low, high in found]


def test_any_range(origin: Origin) -> None:
    data = {*range(10, 60), *range(70, 90)}
    for first in range(0, 100, 3):
        for end in range(first + 1, 101, 7):
            found = chunks(origin, first, end)
            assert all(first <= low < high <= end for low, high in found)
            assert {chunk for low, high in found for chunk in range(low, high)} == data & set(range(first, end))


def test_data_is_looked_for_once(origin: Origin, io: Counting) -> None:
    for first in range(10, 60, 2):
        assert chunks(origin, first, first + 2) == [(first, first + 2)]
    assert io.asked == 1
    assert chunks(origin, 55, 75) == [(55, 60), (70, 75)]
    assert chunks(origin, 80, 85) == [(80, 85)]
    assert io.asked == 2


@pytest.mark.parametrize("change", ["punch_hole", "zero_range", "truncate"])
def test_a_new_hole_is_seen(origin: Origin, change: str) -> None:
    assert chunks(origin, 20, 30) == [(20, 30)]
    if change == "truncate":
        origin.truncate(25 * CHUNK)
        origin.truncate(100 * CHUNK)
        assert chunks(origin, 20, 100) == [(20, 25)]
        return
    getattr(origin, change)(25 * CHUNK, CHUNK)
    found = chunks(origin, 20, 30)
    if change == "punch_hole" or found != [(20, 30)]:  # zeroes that are allocated count as a hole, or do not
        assert found == [(20, 25), (26, 30)]
    origin.write(b"y" * CHUNK, 25 * CHUNK)
    assert chunks(origin, 20, 30) == [(20, 30)]
    assert os.pread(origin.fd, 1, 25 * CHUNK) == b"y"
