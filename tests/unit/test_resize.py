"""Another size for a live volume: what its clients see, what its snapshots keep, what a diff says."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine import preserver, resize
from nbdsnap.engine.device import OpKind
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import ConflictError, NoSpaceError, OriginError, UsageError
from nbdsnap.store.fileio import FileIO
from tests.support.blocks import stamped
from tests.support.device import flush, read, submit, write
from tests.support.enginepool import make_pool

CHUNK = 4096
SIZE = 100 * CHUNK + 700
"""It ends inside a chunk."""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """``vol``: 40 chunks of data, and holes behind them but for the last chunk; one snapshot, ``first``."""
    monkeypatch.setattr(preserver, "SLICE_CHUNKS", 3)
    monkeypatch.setattr(resize, "STEP_BYTES", 5 * CHUNK + 100)
    opened = make_pool(tmp_path, ["vol"], SIZE)
    device = opened.open_device("vol")
    write(device, 0, stamped(1, 0, 40 * CHUNK))
    write(device, SIZE - 500, stamped(1, SIZE - 500, 500))
    device.close()
    opened.snapshot_create(["vol@first"])
    yield opened
    report = opened.check(data=True)
    assert report.ok, report.problems
    opened.close()


def image(pool: Pool, name: str) -> bytes:
    device = pool.open_device(name)
    try:
        return read(device, 0, device.size)
    finally:
        device.close()


FIRST = stamped(1, 0, 40 * CHUNK) + bytes(SIZE - 500 - 40 * CHUNK) + stamped(1, SIZE - 500, 500)


def changed(pool: Pool, older: str, newer: str | None = None) -> set[int]:
    """Chunks, by the diff and by the map, which must agree."""
    extents = [(one.offset, one.offset + one.length) for one in pool.diff(older, newer)]
    device = pool.open_device(newer or older.partition("@")[0], [older.partition("@")[2]])
    offset, mapped = 0, []
    for length, flags in device.changes(older.partition("@")[2], 0, device.size):
        if flags and mapped and mapped[-1][1] == offset:
            mapped[-1] = mapped[-1][0], offset + length
        elif flags:
            mapped.append((offset, offset + length))
        offset += length
    device.close()
    assert extents == mapped
    return {chunk for low, high in extents for chunk in range(low // CHUNK, -(-high // CHUNK))}


def test_growing(pool: Pool, tmp_path: Path) -> None:
    device = pool.open_device("vol")
    pool.volume_resize("vol", 2 * SIZE)
    assert device.size == 2 * SIZE == (tmp_path / "vol.img").stat().st_size
    assert pool.find_export("vol").size == 2 * SIZE  # type: ignore[union-attr]
    assert pool.find_export("vol@first").size == SIZE  # type: ignore[union-attr]
    assert read(device, 0, 2 * SIZE) == FIRST + bytes(SIZE)
    assert changed(pool, "vol@first") == set(range(SIZE // CHUNK, -(-2 * SIZE // CHUNK)))
    write(device, SIZE - 100, b"x" * 300)
    write(device, 2 * SIZE - 10, b"y" * 10)
    flush(device)
    assert read(device, SIZE - 101, 302) == FIRST[-101:-100] + b"x" * 300 + b"\0"
    assert image(pool, "vol@first") == FIRST
    device.close()


def test_growing_and_growing_again_between_snapshots(pool: Pool) -> None:
    for number in (2, 3, 4):
        pool.volume_resize("vol", number * SIZE)
        device = pool.open_device("vol")
        write(device, number * SIZE - 2 * CHUNK, stamped(number, 0, CHUNK))
        device.close()
        pool.snapshot_create([f"vol@s{number}"])
    sizes = {info.name: info.size for info in pool.snapshot_list()}
    assert sizes == {"first": SIZE, "s2": 2 * SIZE, "s3": 3 * SIZE, "s4": 4 * SIZE}
    assert changed(pool, "vol@s2", "vol@s3") == set(range(2 * SIZE // CHUNK, -(-3 * SIZE // CHUNK)))
    for number in (2, 3, 4):
        part = image(pool, f"vol@s{number}")
        assert part[:SIZE] == FIRST
        assert part[number * SIZE - 2 * CHUNK :][:CHUNK] == stamped(number, 0, CHUNK)


def test_shrinking_keeps_what_snapshots_need(pool: Pool, tmp_path: Path) -> None:
    device = pool.open_device("vol")
    with pytest.raises(UsageError):
        pool.volume_resize("vol", 20 * CHUNK + 5)
    pool.volume_resize("vol", 20 * CHUNK + 5, shrink=True)
    assert device.size == 20 * CHUNK + 5 == (tmp_path / "vol.img").stat().st_size
    assert image(pool, "vol") == FIRST[: 20 * CHUNK + 5]
    assert image(pool, "vol@first") == FIRST
    assert changed(pool, "vol@first") == {20}, "the chunk that was cut in two"
    pool.snapshot_create(["vol@small"])
    assert changed(pool, "vol@first", "vol@small") == {20}
    pool.volume_resize("vol", SIZE)
    assert image(pool, "vol") == FIRST[: 20 * CHUNK + 5].ljust(SIZE, b"\0"), "what was cut off must not come back"
    assert changed(pool, "vol@first") == {*range(20, 40), SIZE // CHUNK}
    assert changed(pool, "vol@small") == set(range(20, -(-SIZE // CHUNK)))
    write(device, 60 * CHUNK, b"z" * CHUNK)
    write(device, 21 * CHUNK, b"z" * CHUNK)
    flush(device)
    assert image(pool, "vol@first") == FIRST
    assert image(pool, "vol@small") == FIRST[: 20 * CHUNK + 5]
    assert changed(pool, "vol@first") == {*range(20, 40), 60, SIZE // CHUNK}
    device.close()
    pool.snapshot_delete(["vol@first"])
    assert image(pool, "vol@small") == FIRST[: 20 * CHUNK + 5]
    pool.snapshot_delete(["vol@small"])
    assert pool.status().store.used_bytes == 0


def test_records_behind_the_end_of_everything(pool: Pool) -> None:
    """Written after a snapshot that ended before, and cut off again: the check must not mind."""
    pool.volume_resize("vol", 2 * SIZE)
    device = pool.open_device("vol")
    write(device, 2 * SIZE - CHUNK, b"x" * CHUNK)
    flush(device)
    device.close()
    pool.volume_resize("vol", SIZE, shrink=True)
    assert image(pool, "vol@first") == FIRST == image(pool, "vol")
    assert changed(pool, "vol@first") <= {SIZE // CHUNK}, "the chunk that was cut in two"


def test_requests_behind_the_new_end_are_refused(pool: Pool, tmp_path: Path) -> None:
    """Also those of clients who still know the old one."""
    device = pool.open_device("vol")
    pool.volume_resize("vol", 50 * CHUNK, shrink=True)
    assert not device.write_now(60 * CHUNK, memoryview(b"late"))
    for kind, data in ((OpKind.WRITE, b"late" * 1000), (OpKind.TRIM, None), (OpKind.ZERO, None)):
        with pytest.raises(NoSpaceError):
            submit(device, kind, 50 * CHUNK - 1, 4000, data=data).wait()
    assert (tmp_path / "vol.img").stat().st_size == 50 * CHUNK
    assert read(device, 40 * CHUNK, 10 * CHUNK) == bytes(10 * CHUNK)
    device.close()


def test_writes_go_on_meanwhile(pool: Pool) -> None:
    """Before and behind the cut, wherever they are on their way when it comes."""
    device = pool.open_device("vol")
    pending = [
        submit(device, OpKind.WRITE, number * CHUNK, data=stamped(2, number * CHUNK, CHUNK))
        for number in range(SIZE // CHUNK)
    ]
    pool.volume_resize("vol", 30 * CHUNK, shrink=True)
    for number, done in enumerate(pending):
        try:
            done.wait()
        except NoSpaceError:
            assert number >= 30
    flush(device)
    assert read(device, 0, 30 * CHUNK) == stamped(2, 0, 30 * CHUNK)
    assert image(pool, "vol@first") == FIRST
    device.close()


def test_a_snapshot_in_the_middle_of_a_shrink(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was preserved for the one before is not preserved for it."""
    original = resize.Resizes._cut
    taken: list[str] = []

    def cut(self: resize.Resizes, volume: object, size: int, epoch: int) -> bool:
        if not taken:
            device = pool.open_device("vol")
            assert device.write_now(30 * CHUNK, memoryview(b"w" * CHUNK))  # exclusive by now
            device.close()
            taken.extend(info.name for info in pool._take([("vol", "second")]))
        return original(self, volume, size, epoch)  # type: ignore[arg-type]

    monkeypatch.setattr(resize.Resizes, "_cut", cut)
    pool.volume_resize("vol", 10 * CHUNK, shrink=True)
    assert taken == ["second"]
    assert image(pool, "vol@first") == FIRST
    assert image(pool, "vol@second") == FIRST[: 30 * CHUNK] + b"w" * CHUNK + FIRST[31 * CHUNK :]


def test_rolling_back_over_a_resize(pool: Pool) -> None:
    pool.volume_resize("vol", 10 * CHUNK, shrink=True)
    with pytest.raises(ConflictError):
        pool.rollback("vol@first")
    pool.volume_resize("vol", 2 * SIZE)
    pool.rollback("vol@first")
    assert image(pool, "vol") == FIRST.ljust(2 * SIZE, b"\0")
    assert image(pool, "vol@first") == FIRST


def test_a_restart_in_between(pool: Pool, tmp_path: Path) -> None:
    pool.volume_resize("vol", 2 * SIZE)
    pool.close()
    again = Pool.open(tmp_path / "pool")
    try:
        assert again.volume_list()[0].size == 2 * SIZE
        assert image(again, "vol@first") == FIRST
        again.volume_resize("vol", 10 * CHUNK, shrink=True)
    finally:
        again.close()
    pool.__init__(tmp_path / "pool", PoolOptions(), FileIO())  # type: ignore[misc]
    assert image(pool, "vol@first") == FIRST
    assert image(pool, "vol") == FIRST[: 10 * CHUNK]


class Failing(FileIO):
    """``truncate`` fails from a given call on."""

    left = 1 << 30

    def truncate(self, fd: int, size: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "no space")
        super().truncate(fd, size)


@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("left", [0, 1])
def test_a_file_that_does_not_get_its_size(tmp_path: Path, grow: bool, left: int) -> None:
    make_pool(tmp_path, ["vol"], SIZE).close()
    io = Failing()
    pool = Pool.open(tmp_path / "pool", io=io)
    io.left = left
    if grow:
        with pytest.raises(OSError, match="no space"):
            pool.volume_resize("vol", 2 * SIZE)
        assert pool.volume_list()[0].size == SIZE
    else:
        pool.volume_resize("vol", 5 * CHUNK, shrink=True)
        assert pool.volume_list()[0].size == 5 * CHUNK
    pool.close()
    again = Pool.open(tmp_path / "pool")
    assert (tmp_path / "vol.img").stat().st_size == again.volume_list()[0].size == (SIZE if grow else 5 * CHUNK)
    again.volume_resize("vol", 3 * SIZE)
    assert image(again, "vol") == bytes(3 * SIZE)
    assert not again._volume("vol").record.resizing
    again.close()


def test_a_file_that_somebody_has_lengthened(pool: Pool, tmp_path: Path) -> None:
    """It may be what the volume is to get; but not where a larger snapshot reads zeroes there."""
    path = tmp_path / "vol.img"
    with path.open("r+b") as file:
        file.seek(3 * SIZE)
        file.write(b"theirs")
    pool.volume_resize("vol", 2 * SIZE)
    assert path.stat().st_size == 3 * SIZE + 6
    pool.volume_resize("vol", 4 * SIZE)
    assert image(pool, "vol")[3 * SIZE :].startswith(b"theirs")
    pool.snapshot_create(["vol@large"])
    pool.volume_resize("vol", SIZE, shrink=True)
    assert path.stat().st_size == SIZE
    os.truncate(path, 2 * SIZE)
    with pytest.raises(OriginError):
        pool.volume_resize("vol", 2 * SIZE)
    os.truncate(path, SIZE)
    pool.volume_resize("vol", 2 * SIZE)
    assert image(pool, "vol@large")[3 * SIZE :].startswith(b"theirs")


def test_a_full_store_refuses_a_shrink(tmp_path: Path) -> None:
    pool = Pool.open(tmp_path / "pool", PoolOptions(store_limit=10 * CHUNK, log_size=1 << 20), create=True)
    pool.volume_create("vol", tmp_path / "vol.img", SIZE)
    device = pool.open_device("vol")
    write(device, 0, stamped(1, 0, 40 * CHUNK))
    pool.snapshot_create(["vol@first"])
    with pytest.raises(NoSpaceError):
        pool.volume_resize("vol", 20 * CHUNK, shrink=True)
    assert device.size == SIZE
    assert read(device, 0, 40 * CHUNK) == stamped(1, 0, 40 * CHUNK)
    pool.volume_resize("vol", 35 * CHUNK, shrink=True)
    assert image(pool, "vol@first")[: 40 * CHUNK] == stamped(1, 0, 40 * CHUNK)
    device.close()
    pool.close()


def test_sizes_out_of_range(pool: Pool) -> None:
    for size in (0, -1, 1 << 60):
        with pytest.raises(OriginError):
            pool.volume_resize("vol", size)
    pool.volume_resize("vol", SIZE)


@pytest.mark.parametrize("kind", ["thin", "clone"])
def test_thin_volumes_and_clones(pool: Pool, tmp_path: Path, kind: str) -> None:
    if kind == "thin":
        pool.volume_create("new", size=SIZE, thin=True)
        device = pool.open_device("new")
        write(device, 0, FIRST[: 40 * CHUNK])
        write(device, SIZE - 500, FIRST[-500:])
    else:
        pool.clone("vol@first", "new")
        device = pool.open_device("new")
        write(device, CHUNK, FIRST[CHUNK : 2 * CHUNK])
    pool.snapshot_create(["new@a"])
    write(device, 30 * CHUNK, b"n" * CHUNK)
    now = FIRST[: 30 * CHUNK] + b"n" * CHUNK + FIRST[31 * CHUNK :]
    pool.volume_resize("new", 2 * SIZE)
    write(device, 2 * SIZE - 10, b"y" * 10)
    assert image(pool, "new") == now + bytes(SIZE - 10) + b"y" * 10
    pool.volume_resize("new", 20 * CHUNK + 5, shrink=True)
    for offset, kept in ((20 * CHUNK + 4, OpKind.WRITE), (60 * CHUNK, OpKind.TRIM)):
        with pytest.raises(NoSpaceError):
            submit(device, kept, offset, CHUNK, data=b"l" * CHUNK if kept == OpKind.WRITE else None).wait()
    assert image(pool, "new") == now[: 20 * CHUNK + 5]
    assert changed(pool, "new@a") <= {20}
    pool.snapshot_create(["new@b"])
    pool.volume_resize("new", SIZE)
    assert image(pool, "new") == now[: 20 * CHUNK + 5].ljust(SIZE, b"\0"), "what was cut off must not come back"
    assert changed(pool, "new@a") >= set(range(20, 40))
    assert image(pool, "new@a") == FIRST
    assert image(pool, "new@b") == now[: 20 * CHUNK + 5]
    device.close()
    pool.close()
    pool.__init__(tmp_path / "pool", PoolOptions(), FileIO())  # type: ignore[misc]
    assert image(pool, "new@a") == FIRST
    pool.snapshot_delete(["new@a", "new@b"])
    pool.volume_delete("new")
    pool.snapshot_delete(["vol@first"])
    assert pool.status().store.used_bytes == 0


def test_a_thin_volume_whose_cut_was_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool.open(tmp_path / "pool", PoolOptions(log_size=1 << 20), create=True)
    pool.volume_create("new", size=SIZE, thin=True)
    device = pool.open_device("new")
    write(device, 0, FIRST)
    device.close()
    with monkeypatch.context() as patches:
        patches.setattr(resize.Resizes, "_trim_step", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            pool.volume_resize("new", CHUNK, shrink=True)
    assert pool.check().ok and image(pool, "new") == FIRST[:CHUNK]
    pool.close()
    pool = Pool.open(tmp_path / "pool")
    assert pool.status().store.used_bytes == CHUNK
    pool.volume_resize("new", SIZE)
    assert image(pool, "new") == FIRST[:CHUNK].ljust(SIZE, b"\0")
    pool.close()
