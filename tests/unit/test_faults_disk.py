"""Disks that fail: whatever one file's disk does, what was acknowledged stays true, and the other volumes go on."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine.device import Device, OpKind
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import CorruptionError, DeviceError, NbdsnapError
from tests.support.deadline import wait_until
from tests.support.device import flush, read, submit, write
from tests.support.faultyio import FaultyIO

CHUNK = 4096
SIZE = 64 * CHUNK
OLD, NEW, NEWER = b"o" * CHUNK, b"n" * CHUNK, b"N" * CHUNK
LOG_SIZE = 64 << 10
"""Small, so that a log that stands still is full at once."""

Failure = (OSError, NbdsnapError)


class Volumes:
    """A pool of the volumes ``a`` and ``b`` with a snapshot ``s`` each, full of OLD."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.io = FaultyIO()
        self.pool = self._open()
        for name in ("a", "b"):
            (folder / f"{name}.img").write_bytes(OLD * (SIZE // CHUNK))
            self.pool.volume_create(name, folder / f"{name}.img")
        self._open_devices()
        self.pool.snapshot_create(["a@s", "b@s"])

    def _open(self) -> Pool:
        return Pool.open(self.folder / "pool", PoolOptions(log_size=LOG_SIZE), create=True, io=self.io)

    def _open_devices(self) -> None:
        self.a, self.b = (self.pool.open_device(name) for name in ("a", "b"))

    def close(self) -> None:
        self.a.close()
        self.b.close()
        self.pool.close()

    def restart(self) -> None:
        self.close()
        self.io.heal()
        self.pool = self._open()
        self._open_devices()

    def snapshot(self, name: str) -> Device:
        device = self.pool.open_device(name)
        device.close()  # it stays readable
        return device

    def error(self, name: str) -> str | None:
        return self.pool.volume_show(name).error

    def check_goes_on(self, device: Device, round_: int) -> None:
        """Everything works on a volume: more first overwrites than the log can hold, flushes, snapshots."""
        name = f"{device.name}@goes-on-{round_}"
        before = read(device, 0, SIZE)
        self.pool.snapshot_create([name])
        for chunk in range(SIZE // CHUNK):
            write(device, chunk * CHUNK, bytes([round_]) * CHUNK)
        flush(device)
        assert read(device, 0, SIZE) == bytes([round_]) * SIZE
        assert read(self.snapshot(name), 0, SIZE) == before
        self.pool.snapshot_create([f"{name}-after"])

    def check_whole(self) -> None:
        report = self.pool.check(data=True)
        assert report.ok, report.problems
        for name in ("a@s", "b@s"):
            assert read(self.snapshot(name), 0, SIZE) == OLD * (SIZE // CHUNK), name


@pytest.fixture
def volumes(tmp_path: Path) -> Iterator[Volumes]:
    made = Volumes(tmp_path)
    yield made
    made.io.heal()
    made.close()


def preserve(volumes: Volumes, device: Device, offset: int) -> None:
    """A first overwrite, and its preservation."""
    write(device, offset, NEW)
    volumes.pool.settle()


def test_unreadable_origin(volumes: Volumes) -> None:
    """Only the bad sector's readers are told; one of a snapshot, too, as long as its data lies there."""
    volumes.io.fail("read", "a.img", where=range(CHUNK, 2 * CHUNK))
    for device in (volumes.a, volumes.snapshot("a@s")):
        with pytest.raises(OSError, match="Input/output"):
            read(device, CHUNK, CHUNK)
        assert read(device, 2 * CHUNK, CHUNK) == OLD
    volumes.check_goes_on(volumes.b, 1)


def test_old_content_of_a_disk_that_is_gone_is_never_overwritten(volumes: Volumes) -> None:
    """The write waits in the log, and holds up its volume's first overwrites, but no other volume.  Nothing counts as
    lost: the disk may come back."""
    volumes.io.fail("read", "a.img")
    assert volumes.a.write_now(CHUNK, memoryview(NEW))
    wait_until(lambda: "stalled" in (volumes.error("a") or ""), "the stall to be told")
    for round_ in range(1, 4):
        volumes.check_goes_on(volumes.b, round_)
    with pytest.raises(Failure):
        volumes.pool.snapshot_create(["a@later"])
    volumes.io.heal()
    wait_until(lambda: volumes.error("a") is None, "the stall to end")
    volumes.check_goes_on(volumes.a, 9)
    volumes.check_whole()
    assert not list((volumes.folder / "pool").glob("intents-*"))


def test_a_bad_sector_is_lost_to_its_snapshots_and_to_nobody_else(
    volumes: Volumes, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first overwrite goes on, and mends it; what can't be read is recorded as that, and named everywhere."""
    volumes.io.spoil("a.img", range(CHUNK, 2 * CHUNK))
    volumes.pool.snapshot_create(["a@t"])
    for chunk in range(4):
        write(volumes.a, chunk * CHUNK, NEW)
    flush(volumes.a)
    volumes.pool.settle()
    volumes.check_goes_on(volumes.a, 1)
    for restarted in (False, True):
        if restarted:
            volumes.restart()
        assert volumes.error("a") is None
        for name in ("a@s", "a@t"):
            with pytest.raises(CorruptionError, match="lost"):
                read(volumes.snapshot(name), CHUNK, CHUNK)
            assert read(volumes.snapshot(name), 0, CHUNK) == OLD
            assert read(volumes.snapshot(name), 2 * CHUNK, SIZE - 2 * CHUNK) == OLD * (SIZE // CHUNK - 2)
        assert read(volumes.snapshot("a@goes-on-1"), 0, 5 * CHUNK) == NEW * 4 + OLD
        (problem,) = volumes.pool.check(data=True).problems
        assert (problem.kind, problem.snapshots, problem.offset, problem.length) == (
            "lost",
            ["a@s", "a@t"],
            CHUNK,
            CHUNK,
        )
        marked = {info.name for info in volumes.pool.snapshot_list("a") if "lost" in (info.problem or "")}
        assert marked == {"s", "t"}
    (line,) = (record.message for record in caplog.records if "can't be read" in record.message)
    assert "volume a, offset 4096" in line and "a@s, a@t" in line
    volumes.pool.snapshot_delete(["a@s", "a@t"])
    assert volumes.pool.check(data=True).ok


@pytest.mark.parametrize("kind", [OpKind.TRIM, OpKind.ZERO, OpKind.WRITE])
def test_whatever_overwrites_a_bad_sector_goes_on(volumes: Volumes, kind: OpKind) -> None:
    volumes.io.spoil("a.img", range(3 * CHUNK, 5 * CHUNK))
    data = NEW * 8 if kind == OpKind.WRITE else None
    submit(volumes.a, kind, 0, 8 * CHUNK, data).wait()
    assert read(volumes.a, 0, 8 * CHUNK) == (data or bytes(8 * CHUNK))
    volumes.pool.settle()
    (problem,) = volumes.pool.check(data=True).problems
    assert (problem.kind, problem.offset, problem.length) == ("lost", 3 * CHUNK, 2 * CHUNK)
    assert read(volumes.snapshot("a@s"), 0, 3 * CHUNK) == OLD * 3
    volumes.check_goes_on(volumes.a, 1)


@pytest.mark.parametrize("offset", [CHUNK - 100, CHUNK, CHUNK + 100, 2 * CHUNK - 100])
def test_a_write_that_only_half_covers_a_bad_sector_fails(volumes: Volumes, offset: int) -> None:
    """The rest of the chunk can't be had, so nothing is acknowledged, and nobody waits."""
    volumes.io.spoil("a.img", range(CHUNK, 2 * CHUNK))
    with pytest.raises(OSError, match="Input/output"):
        write(volumes.a, offset, b"n" * 200)
    assert volumes.error("a") is None
    write(volumes.a, 4 * CHUNK, NEW)
    flush(volumes.a)
    write(volumes.a, CHUNK, NEW)
    write(volumes.a, offset, b"n" * 200)
    volumes.pool.settle()
    assert read(volumes.a, CHUNK, CHUNK) == NEW
    volumes.check_goes_on(volumes.a, 1)


@pytest.mark.parametrize("times", [1, 2])
def test_a_read_that_fails_now_and_then_loses_nothing(volumes: Volumes, times: int) -> None:
    volumes.io.fail("read", "a.img", times=times, where=range(CHUNK, 2 * CHUNK))
    for chunk in range(4):
        write(volumes.a, chunk * CHUNK, NEW)
    volumes.pool.settle()
    volumes.io.heal()
    volumes.check_goes_on(volumes.a, 1)
    volumes.check_whole()


def test_stalled_writes_survive_a_restart(volumes: Volumes) -> None:
    volumes.io.fail("write", "a.img")
    for chunk in range(4):
        write(volumes.a, chunk * CHUNK, NEW)
        write(volumes.a, chunk * CHUNK, NEWER)
    wait_until(lambda: volumes.error("a"), "the stall to be told")
    for round_ in range(1, 4):
        volumes.check_goes_on(volumes.b, round_)
    assert read(volumes.a, 0, 4 * CHUNK) == NEWER * 4
    flush(volumes.b)
    volumes.restart()
    assert volumes.error("a") is None
    assert read(volumes.a, 0, 5 * CHUNK) == NEWER * 4 + OLD
    volumes.check_whole()


def test_a_volume_that_cannot_replay_is_not_served_and_loses_nothing(volumes: Volumes) -> None:
    volumes.io.fail("write", "a.img")
    write(volumes.a, 0, NEW)
    wait_until(lambda: volumes.error("a"), "the stall to be told")
    volumes.close()
    for _ in range(2):
        volumes.pool = volumes._open()
        assert "acknowledged writes" in (volumes.error("a") or "")
        assert list((volumes.folder / "pool").glob("intents-*"))
        volumes.pool.close()
    volumes.io.heal()
    volumes.pool = volumes._open()
    volumes._open_devices()
    assert read(volumes.a, 0, CHUNK) == NEW
    volumes.check_whole()


def test_a_volume_is_deleted_with_what_it_could_not_take(volumes: Volumes) -> None:
    volumes.io.fail("write", "a.img")
    write(volumes.a, 0, NEW)
    wait_until(lambda: volumes.error("a"), "the stall to be told")
    volumes.close()
    volumes.pool = volumes._open()
    volumes.b = volumes.pool.open_device("b")
    assert list((volumes.folder / "pool").glob("intents-*"))
    volumes.pool.volume_delete("a", snapshots=True)
    assert not list((volumes.folder / "pool").glob("intents-*"))
    volumes.check_goes_on(volumes.b, 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_write_in_place_that_fails_is_told_and_no_more(volumes: Volumes, number: int) -> None:
    preserve(volumes, volumes.a, 0)
    volumes.io.fail("write", "a.img", number, times=2)  # at once, then in the queue
    with pytest.raises(OSError, match=os.strerror(number)) as told:
        write(volumes.a, 0, NEWER)
    assert told.value.errno == number
    write(volumes.a, 0, NEWER)
    flush(volumes.a)
    assert read(volumes.a, 0, CHUNK) == NEWER
    assert volumes.error("a") is None


def test_a_failed_sync_is_final(volumes: Volumes, caplog: pytest.LogCaptureFixture) -> None:
    """Not retried as if it had not happened: no more writes to that volume, whichever way.  The rest goes on."""
    preserve(volumes, volumes.a, 0)
    write(volumes.a, 0, NEWER)  # in place
    fault = volumes.io.fail("sync", "a.img", times=1)
    with pytest.raises(OSError, match="Input/output"):
        flush(volumes.a)
    assert fault.hits == 1
    assert any("a takes no more writes" in record.message for record in caplog.records)
    assert "a.img failed" in (volumes.error("a") or "")
    for attempt in (
        lambda: flush(volumes.a),
        lambda: write(volumes.a, 0, NEW),
        lambda: write(volumes.a, CHUNK, NEW),
        lambda: submit(volumes.a, OpKind.TRIM, 0, CHUNK).wait(),
        lambda: volumes.pool.snapshot_create(["a@later"]),
    ):
        with pytest.raises((DeviceError, OSError)):
            attempt()
    assert read(volumes.a, 0, 2 * CHUNK) == NEWER + OLD
    for round_ in range(1, 4):
        volumes.check_goes_on(volumes.b, round_)
    assert volumes.error("b") is None
    volumes.restart()
    volumes.check_goes_on(volumes.a, 9)
    volumes.check_whole()


def test_flushed_intents_survive_their_origins_failed_sync(volumes: Volumes) -> None:
    volumes.io.fail("sync", "a.img")
    for chunk in range(3):
        assert volumes.a.write_now(chunk * CHUNK, memoryview(NEW))
    wait_until(lambda: volumes.error("a"), "a checkpoint to fail")
    for round_ in range(1, 4):
        volumes.check_goes_on(volumes.b, round_)
    volumes.close()
    content = bytearray((volumes.folder / "a.img").read_bytes())
    content[: 3 * CHUNK] = OLD * 3  # what a disk that lost them has
    (volumes.folder / "a.img").write_bytes(content)
    volumes.io.heal()
    volumes.pool = volumes._open()
    volumes._open_devices()
    assert read(volumes.a, 0, 4 * CHUNK) == NEW * 3 + OLD
    volumes.check_whole()


@pytest.mark.parametrize("operation", ["write", "sync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failing_store(volumes: Volumes, operation: str, number: int) -> None:
    """Who waits is told, what was acknowledged is kept, and what needs no preserving goes on."""
    preserve(volumes, volumes.a, 0)
    volumes.io.fail(operation, "store.data", number)
    with pytest.raises(Failure):
        submit(volumes.a, OpKind.TRIM, CHUNK, CHUNK).wait()
    assert volumes.b.write_now(0, memoryview(NEW))
    wait_until(lambda: volumes.error("b"), "the stall to be told")
    write(volumes.a, 0, NEWER)
    flush(volumes.a)
    flush(volumes.b)
    assert read(volumes.a, 0, 2 * CHUNK) == NEWER + OLD
    assert read(volumes.b, 0, 2 * CHUNK) == NEW + OLD
    volumes.io.heal()
    wait_until(lambda: volumes.error("b") is None, "the stall to end")
    volumes.check_goes_on(volumes.a, 1)
    volumes.check_goes_on(volumes.b, 2)
    volumes.check_whole()


def test_an_unreadable_store(volumes: Volumes) -> None:
    preserve(volumes, volumes.a, 0)
    volumes.io.fail("read", "store.data")
    with pytest.raises(OSError, match="Input/output"):
        read(volumes.snapshot("a@s"), 0, CHUNK)
    assert read(volumes.snapshot("a@s"), CHUNK, CHUNK) == OLD
    assert read(volumes.a, 0, CHUNK) == NEW
    volumes.io.heal()
    volumes.check_whole()


def test_a_log_that_cannot_be_written(volumes: Volumes) -> None:
    """Writes then wait for their preservation instead."""
    volumes.io.fail("write", "intent.log")
    assert not volumes.a.write_now(0, memoryview(NEW))
    write(volumes.a, 0, NEW)
    assert read(volumes.a, 0, 2 * CHUNK) == NEW + OLD
    volumes.io.heal()
    volumes.check_goes_on(volumes.a, 1)
    volumes.check_whole()


def test_a_failed_sync_of_the_log_loses_nothing(volumes: Volumes) -> None:
    """What is in it is made durable in place instead, and a new log begins."""
    for chunk in range(3):
        assert volumes.a.write_now(chunk * CHUNK, memoryview(NEW))
    fault = volumes.io.fail("sync", "intent.log", times=1)
    flush(volumes.a)
    wait_until(lambda: fault.hits, "the log's sync to fail")
    assert volumes.error("a") is None
    volumes.check_goes_on(volumes.a, 1)
    volumes.check_goes_on(volumes.b, 2)
    volumes.restart()
    assert read(volumes.a, 0, SIZE) == bytes([1]) * SIZE
    volumes.check_whole()


def test_a_log_whose_disk_is_gone(volumes: Volumes) -> None:
    for file in ("intent.log", "intent.log.new"):
        volumes.io.fail("sync", file)
    assert volumes.a.write_now(0, memoryview(NEW))
    with pytest.raises(Failure):
        flush(volumes.a)
    wait_until(lambda: volumes.pool.status().problem, "the status to say so")
    write(volumes.b, 0, NEW)
    assert read(volumes.b, 0, CHUNK) == NEW
    volumes.io.heal()
    wait_until(lambda: volumes.pool.status().problem is None, "a new log")
    flush(volumes.a)
    volumes.check_goes_on(volumes.a, 1)
    volumes.check_whole()


@pytest.mark.parametrize("longest", [1, 511, 4096 + 17])
def test_short_writes_are_completed(volumes: Volumes, longest: int) -> None:
    for file in ("a.img", "store.data", "intent.log"):
        volumes.io.shorten(file, longest)
    write(volumes.a, 100, NEW)
    preserve(volumes, volumes.a, 5 * CHUNK)
    write(volumes.a, 5 * CHUNK, NEWER)  # in place
    flush(volumes.a)
    volumes.restart()
    assert read(volumes.a, 0, 6 * CHUNK) == OLD[:100] + NEW + OLD[:-100] + OLD * 3 + NEWER
    volumes.check_whole()


def test_faults_are_in_the_log(volumes: Volumes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    volumes.io.fail("write", "store.data")
    with pytest.raises(Failure):
        submit(volumes.a, OpKind.TRIM, CHUNK, CHUNK).wait()
    assert any("TRIM at 4096" in record.message and "Input/output" in record.message for record in caplog.records)
