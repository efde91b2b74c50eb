"""Maps of what changed: exact, cheap where nothing did, and of snapshots that stay as long as somebody asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine.device import Device
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import InUseError, NotFoundError
from nbdsnap.store.index import IndexReader
from tests.support.device import write
from tests.support.enginepool import make_pool

CHUNK = 4096
GIB = 1 << 30
SIZE = 1024 * GIB


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    opened = make_pool(tmp_path, ["vol"], SIZE)
    yield opened
    opened.close()


def merged(device: Device, base: str, offset: int, length: int) -> list[tuple[int, int]]:
    """``(offset, length)`` of what changed; neighbours that are alike are one."""
    found: list[tuple[int, int]] = []
    position = offset
    for size, flags in device.changes(base, offset, length):
        assert size > 0
        if flags and found and sum(found[-1]) == position:
            found[-1] = found[-1][0], found[-1][1] + size
        elif flags:
            found.append((position, size))
        position += size
    assert position == offset + length
    return found


def test_the_cost_of_a_map_is_that_of_the_change(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a TiB with three changes: a few looks into the index, and no more blocks read than there are."""
    pool.snapshot_create(["vol@a"])
    live = pool.open_device("vol", ["a"])
    places = [5 * GIB, 5 * GIB + (16 << 20) - CHUNK, 900 * GIB]
    for place in places:
        write(live, place, b"x" * 2 * CHUNK)
    pool.snapshot_create(["vol@b"])
    looks: list[int] = []
    original = IndexReader.changed_within

    def counted(self: IndexReader, *arguments: int) -> Iterator[tuple[int, int]]:
        found = list(original(self, *arguments))
        looks.append(len(found))
        return iter(found)

    monkeypatch.setattr(IndexReader, "changed_within", counted)
    later = pool.open_device("vol@b", ["a"])
    for device in (live, later):
        looks.clear()
        assert merged(device, "a", 0, SIZE) == [(place, 2 * CHUNK) for place in places]
        assert len(looks) <= 40
        assert sum(looks) == 3, "the second change reaches into another block"
        looks.clear()
        assert merged(device, "a", 5 * GIB + CHUNK, GIB) == [(5 * GIB + CHUNK, CHUNK), (places[1], 2 * CHUNK)]
        device.close()


def test_many_snapshots_in_between(pool: Pool) -> None:
    live = pool.open_device("vol")
    for number in range(30):
        pool.snapshot_create([f"vol@s{number}"])
        write(live, number * GIB, b"x" * CHUNK)
    live.close()
    for older, newer in ((0, 29), (10, 20), (28, 29)):
        device = pool.open_device(f"vol@s{newer}", [f"s{older}"])
        expected = [(number * GIB, CHUNK) for number in range(older, newer)]
        assert merged(device, f"s{older}", 0, SIZE) == expected
        assert [(one.offset, one.length) for one in pool.diff(f"vol@s{older}", f"vol@s{newer}")] == expected
        device.close()


def test_what_is_acknowledged_is_in_the_map_at_once(pool: Pool) -> None:
    pool.snapshot_create(["vol@a"])
    live = pool.open_device("vol", ["a"])
    for number in range(200):
        write(live, number * 5 * CHUNK, b"y" * CHUNK)
        assert merged(live, "a", number * 5 * CHUNK, CHUNK) == [(number * 5 * CHUNK, CHUNK)]
    assert len(merged(live, "a", 0, SIZE)) == 200
    live.close()


def test_a_base_is_in_use(pool: Pool) -> None:
    pool.snapshot_create(["vol@a"])
    pool.snapshot_create(["vol@b"])
    device = pool.open_device("vol@b", ["a"])
    with pytest.raises(InUseError):
        pool.snapshot_delete(["vol@a"])
    device.close()
    device.close()
    pool.snapshot_delete(["vol@a"])
    assert pool.snapshot_list()[0].connections == 0


def test_only_older_snapshots_are_bases(pool: Pool) -> None:
    pool.snapshot_create(["vol@a"])
    pool.snapshot_create(["vol@b"])
    assert (pool.bases("vol"), pool.bases("vol@b"), pool.bases("vol@a")) == (["a", "b"], ["a"], [])
    assert pool.bases("nothing") == []
    for name, base in (("vol@a", "b"), ("vol@a", "a"), ("vol", "nothing"), ("vol@b", "vol")):
        with pytest.raises(NotFoundError):
            pool.open_device(name, [base])
    assert all(info.connections == 0 for info in pool.snapshot_list())
    assert pool.volume_list()[0].connections == 0
