"""No space left: of the store's limit, of the file system, of the index.  No snapshot is ever silently broken."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nbdsnap.engine.device import Device, OpKind
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import InUseError, NbdsnapError, NoSpaceError, NotFoundError, UsageError
from nbdsnap.store.index import Index, NewRecords
from nbdsnap.store.layout import ZERO_SLOT
from tests.support.deadline import wait_until
from tests.support.device import flush, read, submit, write
from tests.support.faultyio import FaultyIO

CHUNK = 4096
CHUNKS = 64
SIZE = CHUNKS * CHUNK
OLD = b"o" * CHUNK
LOG_SIZE = 64 << 10


class Store:
    """A pool of one volume, full of OLD, whose store takes ``limit`` chunks."""

    def __init__(self, folder: Path, limit: int | None, on_full: str = "refuse-writes") -> None:
        self.folder = folder
        self.io = FaultyIO()
        self.options = PoolOptions(None if limit is None else limit * CHUNK, LOG_SIZE, on_full)
        (folder / "vol.img").write_bytes(OLD * CHUNKS)
        self.pool = Pool.open(folder / "pool", self.options, create=True, io=self.io)
        self.pool.volume_create("vol", folder / "vol.img")
        self.device = self.pool.open_device("vol")

    def close(self) -> None:
        self.device.close()
        self.pool.close()

    def restart(self) -> None:
        self.close()
        self.pool = Pool.open(self.folder / "pool", self.options, io=self.io)
        self.device = self.pool.open_device("vol")

    def fill(self, chunks: range, number: int) -> None:
        for chunk in chunks:
            write(self.device, chunk * CHUNK, bytes([number]) * CHUNK)

    def snapshot(self, name: str, *, priority: int = 0, held: bool = False) -> None:
        self.pool.snapshot_create([f"vol@{name}"])
        if priority:
            self.pool.snapshot_priority(f"vol@{name}", priority)
        if held:
            self.pool.snapshot_hold([f"vol@{name}"])

    def names(self) -> list[str]:
        return [info.name for info in self.pool.snapshot_list("vol")]

    def read(self, name: str) -> bytes:
        device = self.pool.open_device(f"vol@{name}")
        try:
            return read(device, 0, SIZE)
        finally:
            device.close()

    def check(self) -> None:
        report = self.pool.check(data=True)
        assert report.ok, report.problems


@contextmanager
def store(folder: Path, limit: int | None, on_full: str = "refuse-writes") -> Iterator[Store]:
    made = Store(folder, limit, on_full)
    try:
        yield made
    finally:
        made.io.heal()
        made.close()


def assert_no_space(device: Device, offset: int, data: bytes) -> None:
    with pytest.raises((NoSpaceError, OSError)) as refused:
        write(device, offset, data)
    assert isinstance(refused.value, NoSpaceError) or refused.value.errno == errno.ENOSPC  # type: ignore[union-attr]


# Refusing writes


def test_a_full_store_refuses_what_it_would_have_to_preserve(tmp_path: Path) -> None:
    """Exactly at its limit, whether or not by way of the log; all else goes on."""
    with store(tmp_path, 8) as full:
        full.snapshot("s")
        full.fill(range(8), 1)
        for chunk in (8, 9):
            assert_no_space(full.device, chunk * CHUNK, bytes(CHUNK))
        with pytest.raises(NoSpaceError):
            submit(full.device, OpKind.TRIM, 8 * CHUNK, CHUNK).wait()
        full.fill(range(8), 2)
        flush(full.device)
        assert read(full.device, 0, SIZE) == b"\2" * 8 * CHUNK + OLD * (CHUNKS - 8)
        assert full.read("s") == OLD * CHUNKS
        assert full.pool.volume_show("vol").error is None, "nothing was acknowledged that can't be done"
        full.pool.snapshot_delete(["vol@s"])
        full.fill(range(CHUNKS), 3)
        full.check()


def test_the_log_promises_no_more_than_fits(tmp_path: Path) -> None:
    with store(tmp_path, 3) as full:
        full.snapshot("s")
        taken = [full.device.write_now(chunk * CHUNK, memoryview(b"n" * CHUNK)) for chunk in range(8)]
        assert sum(taken) <= 3
        full.pool.settle()
        assert full.pool.status().store.used_bytes <= 3 * CHUNK
        assert full.pool.volume_show("vol").error is None


@pytest.mark.parametrize("room", [-5, 0])
def test_more_is_promised_than_there_is_room(tmp_path: Path, room: int) -> None:
    """Room that was there when promises were made has gone: a further write waits for the truth."""
    with store(tmp_path, None) as full:
        full.snapshot("s")
        full.pool._space.room = room
        assert not full.device.write_now(0, memoryview(b"n" * CHUNK))
        write(full.device, 0, b"n" * CHUNK)
        full.check()


def test_a_full_file_system_refuses_likewise(tmp_path: Path) -> None:
    with store(tmp_path, None) as full:
        full.snapshot("s")
        full.io.free = 0
        full.io.fail("write", "store.data", errno.ENOSPC)
        full.pool.settle()  # it has looked
        for chunk in range(3):
            assert_no_space(full.device, chunk * CHUNK, b"n" * CHUNK)
        assert full.pool.volume_show("vol").error is None
        full.io.heal()
        full.fill(range(3), 1)
        assert full.read("s") == OLD * CHUNKS
        full.check()


def test_deleting_a_snapshot_ends_a_stall(tmp_path: Path) -> None:
    """Acknowledged writes that met a disk that was fuller than it said."""
    with store(tmp_path, None) as full:
        full.snapshot("s")
        full.io.fail("write", "store.data", errno.ENOSPC)
        assert full.device.write_now(0, memoryview(b"n" * CHUNK))
        wait_until(lambda: full.pool.volume_show("vol").error, "the stall to be told")
        full.pool.snapshot_delete(["vol@s"])
        wait_until(lambda: full.pool.volume_show("vol").error is None, "the stall to end")
        full.pool.settle()
        assert (tmp_path / "vol.img").read_bytes() == b"n" * CHUNK + OLD * (CHUNKS - 1)


# Dropping snapshots


def test_dropping_goes_by_priority_then_age(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with store(tmp_path, 8, "drop-snapshots") as full:
        for number, (name, priority) in enumerate([("kept", 127), ("b", 5), ("c", -3), ("d", 5), ("e", 0)]):
            full.snapshot(name, priority=priority)
            full.fill(range(number, number + 1), number)
        for chunk in range(10, CHUNKS):
            with suppress(NoSpaceError):
                full.fill(range(chunk, chunk + 1), 7)
        assert full.names() == ["kept"]
        assert full.read("kept") == OLD * CHUNKS
        full.check()
    dropped = [record.message for record in caplog.records if "dropped the snapshot" in record.message]
    assert [message.partition("vol@")[2].partition(",")[0] for message in dropped] == [
        "c (priority -3",
        "e (priority 0",
        "b (priority 5",
        "d (priority 5",
    ]


def test_held_and_open_snapshots_are_never_dropped(tmp_path: Path) -> None:
    with store(tmp_path, 4, "drop-snapshots") as full:
        full.snapshot("held", held=True)
        full.snapshot("open")
        opened = full.pool.open_device("vol@open")
        full.snapshot("free")
        full.fill(range(4), 1)
        assert_no_space(full.device, 5 * CHUNK, b"n" * CHUNK)
        assert full.names() == ["held", "open"]
        assert read(opened, 0, SIZE) == full.read("held") == OLD * CHUNKS
        opened.close()
        assert_no_space(full.device, 5 * CHUNK, b"n" * CHUNK)
        assert full.names() == ["held"]
        full.pool.snapshot_hold(["vol@held"], held=False)
        full.fill(range(5, CHUNKS), 2)
        assert full.names() == []
        with pytest.raises(NotFoundError):
            full.pool.open_device("vol@held")
        full.check()


def test_every_snapshot_that_remains_is_whole(tmp_path: Path) -> None:
    """A long run in a store that is always too small; seeded by its counters, checked after each round."""
    with store(tmp_path, CHUNKS, "drop-snapshots") as full:
        images: dict[str, bytes] = {}
        for number in range(1, 40):
            images[f"s{number}"] = read(full.device, 0, SIZE)
            full.snapshot(f"s{number}", priority=number * 7 % 5)
            for chunk in range(number % 3, CHUNKS, 3):
                write(full.device, chunk * CHUNK + 5, bytes([number]) * 600, now=chunk % 2 == 0)
            names = full.names()
            assert names, "the store has room for one"
            for name in names:
                assert full.read(name) == images[name], name
            assert full.pool.status().store.used_bytes <= SIZE
            full.check()
        assert len(full.names()) < 39
        full.restart()
        full.check()
        assert all(full.read(name) == images[name] for name in full.names())


def test_a_disk_that_is_full_drops_snapshots_too(tmp_path: Path) -> None:
    with store(tmp_path, None, "drop-snapshots") as full:
        full.snapshot("a")
        full.fill(range(8), 1)
        full.pool.settle()
        full.snapshot("b")
        full.io.fail("write", "store.data", errno.ENOSPC, times=1)
        submit(full.device, OpKind.WRITE, 0, data=b"n" * CHUNK, fua=True).wait()
        assert full.names() == ["b"]
        assert full.read("b") == b"\1" * 8 * CHUNK + OLD * (CHUNKS - 8)
        full.check()


# Holds and priorities


def test_holds_and_priorities_last(tmp_path: Path) -> None:
    with store(tmp_path, None) as one:
        for name in "abc":
            one.snapshot(name)
        held = one.pool.snapshot_hold(["vol@a", "vol@b"])
        assert [(info.name, info.held) for info in held] == [("a", True), ("b", True)]
        assert one.pool.snapshot_priority("vol@c", -128).priority == -128
        with pytest.raises(NotFoundError):
            one.pool.snapshot_hold(["vol@c", "vol@missing"])
        for priority in (-129, 128):
            with pytest.raises(UsageError):
                one.pool.snapshot_priority("vol@c", priority)
        one.restart()
        assert [(info.held, info.priority) for info in one.pool.snapshot_list("vol")] == [
            (True, 0),
            (True, 0),
            (False, -128),
        ]
        with pytest.raises(InUseError, match="held"):
            one.pool.snapshot_delete(["vol@c", "vol@a"])
        one.pool.snapshot_hold(["vol@a"], held=False)
        one.pool.snapshot_delete(["vol@c", "vol@a"])
        assert one.names() == ["b"]


# Warnings


def test_warnings_come_in_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nbdsnap.engine.space")
    with store(tmp_path, 20) as filling:
        filling.snapshot("s")
        filling.fill(range(15), 1)
        filling.pool.settle()
        assert filling.pool.status().store.warning is None
        filling.fill(range(15, 17), 1)
        filling.pool.settle()
        assert filling.pool.status().store.warning == "the exception store is 85 % full: 12KiB left"
        filling.fill(range(17, 20), 1)
        filling.pool.settle()
        status = filling.pool.status().store
        assert (status.free_bytes, status.used_bytes) == (0, 20 * CHUNK)
        assert "100 % full" in (status.warning or "")
        filling.pool.snapshot_delete(["vol@s"])
        assert filling.pool.status().store.warning is None
        wait_until(lambda: "full again" in caplog.text, "the end to be in the log")
    assert caplog.text.count("% full: ") == 2


def test_a_full_disk_is_warned_of_like_a_limit(tmp_path: Path) -> None:
    with store(tmp_path, None) as filling:
        filling.snapshot("s")
        filling.fill(range(9), 1)
        filling.pool.settle()
        filling.io.free = CHUNK * 16 // 15
        assert "90 % full" in (filling.pool.status().store.warning or "")


# The index


def test_the_index_grows_by_itself(tmp_path: Path) -> None:
    index = Index(tmp_path / "index", create=True, map_size=256 << 10)
    for start in range(0, 40_000, 4000):
        chunks = list(range(start, start + 4000))
        records = NewRecords(1, chunks, [ZERO_SLOT] * 4000, chunks)
        index.update(lambda txn, records=records: txn.preserve(1, records))  # type: ignore[misc]
    with index.read() as reader:
        assert [record.chunk for record in reader.cursor(1).all()] == list(range(40_000))
    index.close()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files can't grow beyond ``size``, like on a full disk (EFBIG instead of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("on_full", ["refuse-writes", "drop-snapshots"])
def test_an_index_that_cannot_grow(tmp_path: Path, on_full: str) -> None:
    """Records of zeroes take space in the index alone."""
    volume = tmp_path / "vol.img"
    pool = Pool.open(tmp_path / "pool", PoolOptions(log_size=LOG_SIZE, on_full=on_full), create=True)
    pool.volume_create("vol", volume, 128 << 20)
    pool.snapshot_create(["vol@a"])
    device = pool.open_device("vol")
    pool.settle()
    index = tmp_path / "pool" / "index.mdb"
    refused: NbdsnapError | None = None
    with file_size_limit(index.stat().st_size):
        for chunk in range(1000):
            try:
                submit(device, OpKind.WRITE, chunk * 2 * CHUNK % (64 << 10), data=b"n" * CHUNK).wait()
                pool.snapshot_create([f"vol@s{chunk}"])
            except NbdsnapError as error:
                refused = error
                break
        assert isinstance(refused, NoSpaceError) or on_full == "drop-snapshots", refused
        read(device, 0, CHUNK)
    pool.snapshot_create(["vol@later"])
    submit(device, OpKind.WRITE, 0, data=b"n" * CHUNK, fua=True).wait()
    assert pool.check(data=True).ok
    device.close()
    pool.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        reason = "mounting a file system takes root"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("on_full", ["refuse-writes", "drop-snapshots"])
def test_a_real_disk_that_is_full(tmp_path: Path, small_disk: Path, on_full: str) -> None:
    image = bytearray(OLD * 2048)
    (tmp_path / "vol.img").write_bytes(image)
    pool = Pool.open(small_disk / "pool", PoolOptions(log_size=LOG_SIZE, on_full=on_full), create=True)
    pool.volume_create("vol", tmp_path / "vol.img")
    device = pool.open_device("vol")
    images: dict[str, bytes] = {}
    refused = 0
    for number in range(1, 13):
        try:
            pool.snapshot_create([f"vol@s{number}"])
            images[f"s{number}"] = bytes(image)
        except NoSpaceError:
            refused += 1
        for chunk in range(number, 2048, 10):
            try:
                write(device, chunk * CHUNK, bytes([number]) * CHUNK)
                image[chunk * CHUNK : (chunk + 1) * CHUNK] = bytes([number]) * CHUNK
            except (NoSpaceError, OSError):
                refused += 1
    flush(device)
    names = [info.name for info in pool.snapshot_list("vol")]
    assert bool(refused) == (on_full == "refuse-writes")
    assert (len(names) < 12) == (on_full == "drop-snapshots") or refused
    assert read(device, 0, len(image)) == bytes(image)
    for name in names:
        snapshot = pool.open_device(f"vol@{name}")
        assert read(snapshot, 0, len(image)) == images[name], name
        snapshot.close()
    assert pool.check(data=True).ok
    pool.snapshot_delete([f"vol@{name}" for name in names])
    wait_until(lambda: pool.volume_show("vol").error is None, "the stall to end")
    pool.settle()
    assert (tmp_path / "vol.img").read_bytes() == bytes(image)
    device.close()
    pool.close()
