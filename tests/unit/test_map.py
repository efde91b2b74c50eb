"""The picture of a volume: what was changed where, and how many share it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine import map as volume_map
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import NotFoundError, UsageError
from tests.support.enginepool import make_pool, write_blocks
from tests.unit.conftest import Cli

MIB = 1 << 20
SIZE = 64 * MIB
CHUNK = 4096


def chunks(start: int, end: int) -> range:
    """Offsets of the chunks in [start, end) MiB."""
    return range(start * MIB, end * MIB, CHUNK)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """Volume ``vol``: snapshots ``a`` and ``b``; after ``a`` MiB 0 to 3 were changed, after ``b`` 2 to 4 and 20."""
    pool = make_pool(tmp_path, ["vol"], SIZE)
    for start, end in ((0, 4), (20, 21)):
        write_blocks(pool, "vol", chunks(start, end))
    pool.snapshot_create(["vol@a"])
    write_blocks(pool, "vol", chunks(0, 3), b"a" * CHUNK)
    pool.snapshot_create(["vol@b"])
    write_blocks(pool, "vol", [*chunks(2, 4), 20 * MIB], b"b" * CHUNK)
    yield pool
    pool.close()


def test_changes_and_sharers(pool: Pool) -> None:
    shown = pool.volume_map("vol", 64, 20)
    assert (shown.volume, shown.size, shown.cell_bytes) == ("vol", SIZE, MIB)
    after_a, after_b = shown.rows
    assert (after_a.since, after_b.since) == ("a", "b")
    assert after_a.changed_bytes == [MIB] * 3 + [0] * 61
    assert after_b.changed_bytes == [0, 0, MIB, MIB] + [0] * 16 + [CHUNK] + [0] * 43
    assert shown.sharers[:5] == [1.0, 1.0, 1.0, 2.0, 0.0]
    assert shown.sharers[20] == 2.0
    assert sum(shown.sharers) == 7.0


def test_changes_are_those_of_the_diff(pool: Pool) -> None:
    for cells in (1, 3, 5, 64, 1000):
        shown = pool.volume_map("vol", cells, 20)
        assert len(shown.sharers) <= cells
        assert len(shown.sharers) * shown.cell_bytes >= SIZE
        for row, newer in zip(shown.rows, ("vol@b", None), strict=True):
            assert sum(row.changed_bytes) == sum(one.length for one in pool.diff(f"vol@{row.since}", newer))


def test_the_newest_rows(pool: Pool) -> None:
    assert [row.since for row in pool.volume_map("vol", 8, 1).rows] == ["b"]


def test_only_some_of_many_are_looked_at(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_map, "RECORDS", 2)
    assert pool.volume_map("vol", 64, 20).sharers[:4] == [1.0, 1.0, 1.0, 2.0]


def test_what_is_refused(pool: Pool) -> None:
    for cells, rows in ((0, 1), (1025, 1), (1, 0), (1, 1001)):
        with pytest.raises(UsageError):
            pool.volume_map("vol", cells, rows)
    with pytest.raises(NotFoundError):
        pool.volume_map("nix", 1, 1)


def test_small_and_without_snapshots(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, ["tiny"], 5000)
    assert pool.volume_map("tiny", 64, 20).sharers == [0.0, 0.0]
    pool.snapshot_create(["tiny@a"])
    write_blocks(pool, "tiny", [0], b"x" * 5000)
    assert pool.volume_map("tiny", 64, 20).rows[0].changed_bytes == [CHUNK, CHUNK]
    pool.close()


def test_command(cli: Cli) -> None:
    assert cli("status", "--map").lines == []
    cli("snapshot", "create", "vol@a")
    cli.write("vol", [0, *range(16 * MIB, 32 * MIB, CHUNK), *range(48 * MIB, 56 * MIB, CHUNK)])
    cli("snapshot", "create", "vol@a-name-that-is-longer-than-it-may-be")
    cli.write("vol", range(16 * MIB, 17 * MIB, CHUNK))
    assert cli("status", "--map").lines == [
        "vol: 1GiB, 16MiB in a character",
        f"{'a':>24} |·█ ▓{' ' * 60}|",
        f"a-name-that-is-longer-t… | ░{' ' * 62}|",
        f"{'shared by':>24} | 1{' ' * 62}|",
    ]
    (shown,) = cli("status", "--map", "--json").json
    assert shown["cell_bytes"] == 16 * MIB
    assert shown["rows"][1]["changed_bytes"][:3] == [0, MIB, 0]
