"""The index's pages are what they were when the pool was closed, or the pool is not opened."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nbdsnap.engine.pool import Pool
from nbdsnap.errors import CorruptionError
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.pagesums import damaged_blocks
from tests.support.enginepool import make_pool

PAGE = 4096


@pytest.fixture
def pool_path(tmp_path: Path) -> Path:
    make_pool(tmp_path, ["vol"], 1 << 20).close()
    return tmp_path / "pool"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_changed_page_is_noticed_and_named(pool_path: Path) -> None:
    flip(pool_path / "index.mdb", 2 * PAGE + 100)
    assert damaged_blocks(FileIO(), pool_path / "index.mdb") == [2]
    for _ in range(2):  # to try does not make it forgotten
        with pytest.raises(CorruptionError, match="1 of its pages changed while no server ran"):
            Pool.open(pool_path)


@pytest.mark.parametrize("change", [-PAGE, -1, 1, PAGE])
def test_another_length_is_damage(pool_path: Path, change: int) -> None:
    index = pool_path / "index.mdb"
    content = index.read_bytes()
    index.write_bytes(content[:change] if change < 0 else content + bytes(change))
    assert damaged_blocks(FileIO(), index) == [(len(content) + min(change, 0)) // PAGE]


def test_damaged_sums_say_nothing(pool_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(pool_path / "index.sums", 30)
    with caplog.at_level(logging.WARNING):
        Pool.open(pool_path).close()
    assert "index.sums is damaged itself" in caplog.text
    assert damaged_blocks(FileIO(), pool_path / "index.mdb") == []


def test_an_open_pool_has_no_sums(pool_path: Path) -> None:
    pool = Pool.open(pool_path)
    assert damaged_blocks(FileIO(), pool_path / "index.mdb") is None
    pool.close()
    assert damaged_blocks(FileIO(), pool_path / "index.mdb") == []
