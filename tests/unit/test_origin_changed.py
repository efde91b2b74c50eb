"""An origin that was changed while nbdsnap did not run: its volume is refused, and can be accepted."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbdsnap.engine.pool import Pool
from nbdsnap.errors import NotFoundError, OriginChangedError
from nbdsnap.store.originuse import is_written_elsewhere
from tests.support.device import flush, read, write
from tests.support.enginepool import make_pool, write_blocks

SIZE = 1 << 20
CHUNK = 4096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed pool with the volumes "vol" and "other", each with a snapshot, and "plain" without."""
    pool = make_pool(tmp_path, ["vol", "other", "plain"], SIZE)
    write_blocks(pool, "vol", [0, CHUNK], b"v" * CHUNK)
    pool.snapshot_create(["vol@one", "other@one"])
    write_blocks(pool, "vol", [0])
    pool.close()
    return tmp_path


def change(path: Path) -> None:
    """As another program does."""
    before = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(CHUNK)
        file.write(b"foreign")
    os.utime(path, ns=(before + 1, before + 1))


def open_and_crash(folder: Path) -> None:
    program = (
        "import os, sys, pathlib, nbdsnap.engine.pool as engine;"
        "pool = engine.Pool.open(pathlib.Path(sys.argv[1]));"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, folder / "pool"], check=False).returncode == 9


def test_changed_origin_is_refused_and_others_are_served(folder: Path) -> None:
    change(folder / "vol.img")
    pool = Pool.open(folder / "pool")
    try:
        with pytest.raises(OriginChangedError, match="was changed while nbdsnap did not run") as caught:
            pool.open_device("vol@one")
        assert "nbdsnap volume accept vol" in caught.value.advice
        pool.open_device("other@one").close()
        assert pool.volume_ensure("vol", folder / "vol.img").error  # configured: no reason not to start
        assert [info.name for info in pool.volume_list() if info.error] == ["vol"]
    finally:
        pool.close()


@pytest.mark.parametrize("restarts", [0, 2])
def test_accepting_marks_the_snapshots_for_good(folder: Path, restarts: int) -> None:
    change(folder / "vol.img")
    for _ in range(restarts):  # refused however often it is tried
        Pool.open(folder / "pool").close()
    pool = Pool.open(folder / "pool")
    assert pool.volume_accept("vol").snapshots[0].problem
    device = pool.open_device("vol")
    assert read(device, CHUNK, 7) == b"foreign"
    write(device, 2 * CHUNK, b"w" * CHUNK)
    flush(device)
    device.close()
    pool.close()
    pool = Pool.open(folder / "pool")
    try:
        (marked,) = pool.snapshot_list("vol")
        (other,) = pool.snapshot_list("other")
        assert marked.problem and not other.problem
        assert not pool.volume_show("vol").error
    finally:
        pool.close()


def test_refusal_survives_a_crash_of_the_server_that_refused(folder: Path) -> None:
    change(folder / "vol.img")
    open_and_crash(folder)
    pool = Pool.open(folder / "pool")
    try:
        with pytest.raises(OriginChangedError):
            pool.open_device("vol")
    finally:
        pool.close()


def test_after_a_crash_nothing_is_said(folder: Path) -> None:
    open_and_crash(folder)
    change(folder / "vol.img")
    pool = Pool.open(folder / "pool")
    try:
        pool.open_device("vol").close()
    finally:
        pool.close()


def test_a_restored_file_is_taken_again(folder: Path) -> None:
    origin = folder / "vol.img"
    before = origin.stat().st_mtime_ns
    change(origin)
    Pool.open(folder / "pool").close()
    with origin.open("r+b") as file:
        file.seek(CHUNK)
        file.write(b"v" * CHUNK)
    os.utime(origin, ns=(before, before))
    pool = Pool.open(folder / "pool")
    try:
        pool.open_device("vol").close()
        assert not pool.snapshot_list("vol")[0].problem
    finally:
        pool.close()


def test_without_snapshots_a_change_is_nobodys_business(folder: Path) -> None:
    change(folder / "plain.img")
    pool = Pool.open(folder / "pool")
    try:
        pool.open_device("plain").close()
        assert pool.volume_accept("other").snapshots[0].problem is None  # nothing to accept
        with pytest.raises(NotFoundError):
            pool.volume_accept("nix")
    finally:
        pool.close()


def test_another_writer_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (folder / "vol.img").open("r+b"), caplog.at_level(logging.WARNING):
        Pool.open(folder / "pool").close()
    assert [record.message for record in caplog.records if "open for writing" in record.message] == [
        f"volume vol: another program has {folder / 'vol.img'} open for writing: "
        "what it writes changes the snapshots, too"
    ]


def test_readers_are_no_writers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("rb"):
        assert not is_written_elsewhere(path)
    with path.open("r+b"):
        assert is_written_elsewhere(path)
    assert not is_written_elsewhere(tmp_path / "missing")
    assert signal.getsignal(signal.SIGURG) in (signal.SIG_DFL, None)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK  # none is left behind
    finally:
        os.close(fd)
