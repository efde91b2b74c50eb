"""Thin volumes and clones when the store's disk fails, or is full; and readers that meet a slot that is given away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine.chain import SnapshotChunks
from nbdsnap.engine.device import OpKind
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import CorruptionError, DeviceError, NoSpaceError
from tests.support.device import flush, read, submit, write
from tests.support.faultyio import FaultyIO

CHUNK = 4096
SIZE = 128 * CHUNK
STORE = "store.data"


class Thin:
    """A pool with one thin volume of which the first half is written, and a snapshot of that."""

    def __init__(self, folder: Path) -> None:
        self.io = FaultyIO()
        self.folder = folder
        self.pool = Pool.open(folder / "pool", PoolOptions(log_size=1 << 20), create=True, io=self.io)
        self.pool.volume_create("thin", None, SIZE, thin=True)
        self.device = self.pool.open_device("thin")
        self.put(0, b"a" * (SIZE // 2))
        self.pool.snapshot_create(["thin@one"])

    def put(self, offset: int, data: bytes) -> None:
        write(self.device, offset, data)
        flush(self.device)
        self.pool.settle()

    def content(self, name: str, offset: int = 0, length: int = SIZE) -> bytes:
        device = self.pool.open_device(name)
        try:
            return read(device, offset, length, now=False)
        finally:
            device.close()

    def close(self) -> None:
        self.io.heal()
        self.device.close()
        self.pool.close()


@pytest.fixture
def thin(tmp_path: Path) -> Iterator[Thin]:
    thin = Thin(tmp_path)
    yield thin
    thin.close()


def test_a_bad_sector_is_lost_to_its_snapshot_and_to_nobody_else(thin: Thin) -> None:
    (slot,) = (slot for chunk, slot in _live(thin) if chunk == 3)
    thin.io.spoil(STORE, range(slot * CHUNK, (slot + 1) * CHUNK))
    with pytest.raises(OSError):
        thin.content("thin")
    thin.put(0, b"b" * (SIZE // 2))
    assert thin.content("thin") == b"b" * (SIZE // 2) + bytes(SIZE // 2)
    with pytest.raises(CorruptionError, match="thin@one: the data at offset 12288 was lost"):
        thin.content("thin@one", 3 * CHUNK, CHUNK)
    assert thin.content("thin@one", 4 * CHUNK, CHUNK) == b"a" * CHUNK
    assert thin.pool.snapshot_list()[0].problem is not None
    assert {problem.kind for problem in thin.pool.check(data=True).problems} == {"lost"}
    thin.pool.snapshot_delete(["thin@one"])
    assert thin.pool.check(data=True).ok


def test_a_write_that_only_half_covers_a_bad_sector_fails(thin: Thin) -> None:
    (slot,) = (slot for chunk, slot in _live(thin) if chunk == 3)
    thin.io.spoil(STORE, range(slot * CHUNK, (slot + 1) * CHUNK))
    with pytest.raises(OSError):
        write(thin.device, 3 * CHUNK + 5, b"b")
    write(thin.device, 5 * CHUNK + 5, b"b")
    thin.pool.settle()
    assert thin.content("thin", 5 * CHUNK, 10) == b"aaaaabaaaa"


def test_a_disk_that_does_not_answer_loses_nothing(thin: Thin) -> None:
    thin.put(100 * CHUNK, b"z" * CHUNK)
    thin.io.fail("read", STORE)
    done = submit(thin.device, OpKind.WRITE, 0, data=b"b" * CHUNK * 65)
    with pytest.raises(OSError):
        done.wait()
    thin.io.heal()
    assert thin.pool.check(data=True).ok
    assert thin.content("thin@one") == b"a" * (SIZE // 2) + bytes(SIZE // 2)
    assert thin.pool.snapshot_list()[0].problem is None


def test_a_failed_sync_of_the_store_is_final_for_what_was_written_in_place(thin: Thin) -> None:
    """Also where it was the sync of something else: the kernel tells each failure once."""
    thin.put(0, b"b" * CHUNK)
    write(thin.device, 0, b"c" * CHUNK)  # in place
    thin.io.fail("sync", STORE, times=1)
    other = thin.pool
    other.volume_create("other", None, SIZE, thin=True)
    device = other.open_device("other")
    with pytest.raises(OSError):
        write(device, 0, b"x" * CHUNK * 65, fua=True)
    device.close()
    with pytest.raises((OSError, DeviceError)):
        flush(thin.device)
    with pytest.raises((OSError, DeviceError)):
        write(thin.device, 0, b"d" * CHUNK, now=False, fua=True)
    (error,) = (info.error for info in thin.pool.volume_list() if info.name == "thin")
    assert error is not None and "sync" in error


def test_a_full_store_refuses_what_needs_space_and_nothing_else(tmp_path: Path) -> None:
    pool = Pool.open(tmp_path / "pool", PoolOptions(store_limit=32 * CHUNK, log_size=1 << 20), create=True)
    pool.volume_create("thin", None, SIZE, thin=True)
    device = pool.open_device("thin")
    write(device, 0, b"a" * 32 * CHUNK)
    with pytest.raises(NoSpaceError):
        write(device, 40 * CHUNK, b"a" * CHUNK)
    write(device, 0, b"b" * CHUNK)
    submit(device, OpKind.TRIM, 8 * CHUNK, CHUNK).wait()
    write(device, 40 * CHUNK, b"c" * CHUNK)
    assert read(device, 40 * CHUNK, CHUNK) == b"c" * CHUNK
    device.close()
    pool.close()


def test_a_reader_of_zeroes_does_not_see_who_gets_their_slot(thin: Thin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroes that were written take a slot until a snapshot alone needs them.  Whoever has looked that slot up, and
    reads it when it is another chunk's, has to look again."""
    thin.put(40 * CHUNK, bytes(CHUNK))
    thin.pool.snapshot_create(["thin@two"])
    original = SnapshotChunks._read_slots
    calls = 0

    def overtaken(chunks: SnapshotChunks, buffer: memoryview, slot: int, inside: int, *, now: bool) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            thin.put(40 * CHUNK, b"x" * CHUNK)
            thin.put(50 * CHUNK, b"y" * 8 * CHUNK)
        return original(chunks, buffer, slot, inside, now=now)

    monkeypatch.setattr(SnapshotChunks, "_read_slots", overtaken)
    assert thin.content("thin@two", 40 * CHUNK, CHUNK) == bytes(CHUNK)
    assert calls == 1


def _live(thin: Thin) -> list[tuple[int, int]]:
    with thin.pool._index.read() as reader:
        return list(reader.current_items(1))
