"""Pools of each format version open, and read exactly, in this version."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from nbdsnap.engine.offline import OfflinePool
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import OriginChangedError
from nbdsnap.store.layout import FORMAT_VERSION
from tests.golden.make import CHUNK, SIZE, VARIANTS, expected, open_pool, written
from tests.support.device import read

FOLDER = Path(__file__).parent
ARCHIVES = sorted(path.name for path in FOLDER.glob("*.tar.xz"))


@pytest.fixture(params=[f"{archive} {variant}" for archive in ARCHIVES for variant in VARIANTS])
def variant(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its pool and its volume's file are in the working folder."""
    archive, variant = str(request.param).split()
    with tarfile.open(FOLDER / archive) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / variant)
    return variant


def test_there_is_one_of_this_version() -> None:
    assert f"v{FORMAT_VERSION}.tar.xz" in ARCHIVES


def test_it_is_sound_before_it_is_opened(variant: str) -> None:
    with OfflinePool(Path("pool")) as pool:
        assert pool.check(data=True).problems == []


def test_it_opens_and_reads_exactly(variant: str) -> None:
    pool = opened(variant)
    try:
        assert {export.name for export in pool.exports()} == set(expected(variant))
        for name, content in expected(variant).items():
            device = pool.open_device(name)
            assert read(device, 0, SIZE) == content, name
            device.close()
        assert pool.check(data=True).ok
    finally:
        pool.close()
    assert Path("vol.img").read_bytes() == expected(variant)["vol"]


def test_its_diffs_are_right(variant: str) -> None:
    pool = opened(variant)
    try:
        for older, newer, generation in (("first", "second", 1), ("second", "third", 2)):
            changed = set()
            for extent in pool.diff(f"vol@{older}", f"vol@{newer}"):
                changed.update(range(extent.offset // CHUNK, (extent.offset + extent.length + CHUNK - 1) // CHUNK))
            assert changed == set(written(generation))
    finally:
        pool.close()


def test_it_can_be_used_up(variant: str) -> None:
    pool = opened(variant)
    try:
        pool.snapshot_create(["vol@now"])
        pool.snapshot_delete([info for info in expected(variant) if "@" in info])
        assert pool.check(data=True).ok
        pool.volume_delete("vol", snapshots=True)
        assert pool.status().store.used_bytes == 0
    finally:
        pool.close()


def opened(variant: str) -> Pool:
    """The archive can't bring the file's inode along: so the clean one, which knows it, has to be told."""
    pool = open_pool()
    if variant == "clean":
        with pytest.raises(OriginChangedError):
            pool.open_device("vol")
        pool.volume_accept("vol")
    return pool
