"""A block device as an origin, and other sizes for its volume.  Needs a loop device, hence root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine.pool import Pool
from nbdsnap.errors import OriginError
from tests.support.blocks import stamped, write_stamped
from tests.support.device import flush, read, write

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """4 MiB of stamped blocks; its file is ``disk.img`` beside the pool."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root")
    disk = write_stamped(tmp_path / "disk.img", SIZE, seed=1)
    made = subprocess.run(["losetup", "--find", "--show", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def content(pool: Pool, name: str) -> bytes:
    opened = pool.open_device(name)
    try:
        return read(opened, 0, opened.size)
    finally:
        opened.close()


def test_resizing(device: Path, tmp_path: Path) -> None:
    pool = Pool.open(tmp_path / "pool", create=True)
    try:
        pool.volume_create("vol", device)
        pool.snapshot_create(["vol@a"])
        with pytest.raises(OriginError, match="less than"):
            pool.volume_resize("vol", SIZE + 1)
        pool.volume_resize("vol", MIB, shrink=True)
        live = pool.open_device("vol")
        write(live, 0, b"new" * 1000)
        flush(live)
        pool.settle()
        with device.open("r+b") as other:  # what is behind the end is the user's again
            other.seek(2 * MIB)
            other.write(b"theirs" * 1000)
        assert content(pool, "vol@a") == stamped(1, 0, SIZE)
        os.truncate(tmp_path / "disk.img", 2 * SIZE)
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        pool.volume_resize("vol", 2 * SIZE)
        assert live.size == 2 * SIZE
        assert read(live, 2 * MIB, 6) == b"theirs", "what the device has there"
        assert content(pool, "vol@a") == stamped(1, 0, SIZE)
        changed = [(one.offset, one.length) for one in pool.diff("vol@a")]
        assert changed == [(0, 4096), (MIB, 2 * SIZE - MIB)]
        live.close()
    finally:
        pool.close()


def test_a_device_that_was_enlarged_while_nothing_ran(device: Path, tmp_path: Path) -> None:
    """As with lvextend: that is no change of what snapshots need."""
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.volume_create("vol", device)
    pool.snapshot_create(["vol@a"])
    pool.close()
    os.truncate(tmp_path / "disk.img", 2 * SIZE)
    subprocess.run(["losetup", "--set-capacity", device], check=True)
    pool = Pool.open(tmp_path / "pool")
    try:
        assert pool.volume_list()[0].error is None
        pool.volume_resize("vol", 2 * SIZE)
        assert content(pool, "vol@a") == stamped(1, 0, SIZE)
        assert content(pool, "vol") == stamped(1, 0, SIZE) + bytes(SIZE)
    finally:
        pool.close()
    pool = Pool.open(tmp_path / "pool")
    assert pool.volume_list()[0].error is None
    pool.close()
