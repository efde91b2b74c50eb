"""Rollback: one instant for whoever reads or writes meanwhile, and finished whatever comes between."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdsnap.engine import rollback
from nbdsnap.engine.device import STATE_HOLE, STATE_ZERO, Device, OpKind
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import CorruptionError, InUseError, NbdsnapError, NoSpaceError, NotFoundError
from tests.support.controlled import ControlThread
from tests.support.deadline import wait_until
from tests.support.device import Completion, flush, read, submit, write
from tests.support.faultyio import FaultyIO
from tests.unit.conftest import Cli

CHUNK = 4096
CHUNKS = 64
SIZE = CHUNKS * CHUNK
STEP = 8 * CHUNK


def blocks(letter: str, chunks: int = CHUNKS) -> bytes:
    return letter.encode() * (chunks * CHUNK)


class Rolled:
    """Volume ``a``: snapshots ``old`` (o), ``mid`` (m, and holes at its end), ``new`` (n); live is x.  And a volume
    ``b`` with a snapshot."""

    def __init__(self, folder: Path, options: PoolOptions | None = None) -> None:
        self.folder = folder
        self.options = options or PoolOptions(log_size=64 << 10)
        self.io = FaultyIO()
        self.pool = self.open()
        for name in ("a", "b"):
            self.pool.volume_create(name, folder / f"{name}.img", SIZE)
        self.content = {"old": blocks("o"), "mid": blocks("m", 48) + bytes(16 * CHUNK), "new": blocks("n")}
        self.b = self.pool.open_device("b")
        device = self.pool.open_device("a")
        for name, content in self.content.items():
            write(device, 0, content)
            if name == "mid":
                submit(device, OpKind.TRIM, 48 * CHUNK, 16 * CHUNK).wait()
            self.pool.snapshot_create([f"a@{name}"])
        write(device, 0, blocks("x"))
        device.close()
        self.pool.snapshot_create(["b@s"])

    def open(self) -> Pool:
        return Pool.open(self.folder / "pool", self.options, create=True, io=self.io)

    def restart(self) -> None:
        self.b.close()
        self.pool.close()
        self.pool = self.open()
        self.b = self.pool.open_device("b")

    def read(self, name: str) -> bytes:
        device = self.pool.open_device(name)
        try:
            assert device.size == SIZE
            return read(device, 0, SIZE)
        finally:
            device.close()

    def check(self, live: bytes) -> None:
        assert self.read("a") == live
        for name, content in self.content.items():
            assert self.read(f"a@{name}") == content, name
        report = self.pool.check(data=True)
        assert report.ok, report.problems
        assert self.error() is None

    def error(self) -> str | None:
        return self.pool.volume_show("a").error


@pytest.fixture
def rolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rolled]:
    monkeypatch.setattr(rollback, "STEP_BYTES", STEP)
    made = Rolled(tmp_path)
    yield made
    made.io.heal()
    made.b.close()
    made.pool.close()


@pytest.mark.parametrize("name", ["old", "mid", "new"])
def test_any_snapshot_and_back(rolled: Rolled, name: str) -> None:
    report = rolled.pool.rollback(f"a@{name}")
    assert (report.snapshot, report.bytes, report.done) == (f"a@{name}", SIZE, True)
    rolled.check(rolled.content[name])
    rolled.pool.rollback("a@mid")
    rolled.check(rolled.content["mid"])
    rolled.restart()
    rolled.check(rolled.content["mid"])
    assert (rolled.folder / "a.img").read_bytes() == rolled.content["mid"]


def test_zeroes_come_back_as_holes(rolled: Rolled) -> None:
    rolled.pool.rollback("a@mid")
    device = rolled.pool.open_device("a")
    assert device.extents(0, SIZE) == [(48 * CHUNK, 0), (16 * CHUNK, STATE_HOLE | STATE_ZERO)]
    device.close()


def test_cost_is_the_difference(rolled: Rolled) -> None:
    """Nothing else is read or written: every other byte of the origin fails."""
    rolled.pool.snapshot_create(["a@now"])
    device = rolled.pool.open_device("a")
    write(device, 10 * CHUNK, b"d" * CHUNK)
    device.close()
    rolled.pool.settle()
    for where in (range(10 * CHUNK), range(11 * CHUNK, SIZE)):
        rolled.io.fail("read", "a.img", where=where)
        rolled.io.fail("write", "a.img", where=where)
    planned = rolled.pool.rollback("a@now", dry_run=True)
    assert (planned.bytes, planned.preserved_bytes, planned.done) == (CHUNK, 0, False)
    assert rolled.pool.rollback("a@now").bytes == CHUNK
    rolled.io.heal()
    rolled.check(blocks("x"))


def test_newest_snapshot_takes_no_space_then(rolled: Rolled) -> None:
    before = rolled.pool.status().store.used_bytes
    rolled.pool.rollback("a@new")
    assert rolled.pool.status().store.used_bytes == before - SIZE
    assert list(rolled.pool.diff("a@new")) == []
    assert rolled.pool.rollback("a@new").bytes == 0
    rolled.check(rolled.content["new"])
    device = rolled.pool.open_device("a")
    write(device, CHUNK, b"again")  # what it holds now is preserved again
    device.close()
    assert [(one.offset, one.length) for one in rolled.pool.diff("a@new")] == [(CHUNK, CHUNK)]
    rolled.check(blocks("n", 1) + b"again" + rolled.content["new"][CHUNK + 5 :])


def test_reader_of_the_newest_snapshot(rolled: Rolled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look into the index and its reading, a rollback frees the slots."""
    device = rolled.pool.open_device("a@new")
    original = rolled.pool._store.read_into
    calls: list[int] = []

    def read_into(buffer: memoryview, slot: int) -> None:
        calls.append(slot)
        if len(calls) == 1:
            rolled.pool._store.read_into = original  # type: ignore[method-assign]
            rolled.pool.rollback("a@new")
        original(buffer, slot)

    monkeypatch.setattr(rolled.pool._store, "read_into", read_into)
    assert read(device, 0, SIZE, now=False) == rolled.content["new"]
    assert calls
    device.close()
    rolled.check(rolled.content["new"])


def test_dry_run_changes_nothing(rolled: Rolled) -> None:
    planned = rolled.pool.rollback("a@old", dry_run=True)
    assert (planned.bytes, planned.preserved_bytes) == (SIZE, 0)  # what "new" needs is in the store already
    rolled.pool.snapshot_create(["a@last"])
    assert rolled.pool.rollback("a@old", dry_run=True).preserved_bytes == SIZE
    rolled.check(blocks("x"))


def test_open_volume_is_refused(rolled: Rolled) -> None:
    device = rolled.pool.open_device("a")
    with pytest.raises(InUseError, match="1 connections"):
        rolled.pool.rollback("a@old")
    assert read(device, 0, SIZE) == blocks("x")
    rolled.pool.rollback("a@old", force=True)
    assert read(device, 0, SIZE) == rolled.content["old"]
    write(device, 5, b"on top")
    flush(device)
    device.close()
    rolled.check(b"o" * 5 + b"on top" + rolled.content["old"][11:])


@pytest.mark.parametrize("name", ["a@nix", "nix@old", "b@old"])
def test_what_is_not_there(rolled: Rolled, name: str) -> None:
    with pytest.raises(NotFoundError):
        rolled.pool.rollback(name)


class Meanwhile:
    """Does something in the middle of a rollback, once: a ``progress`` for it."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        if len(self.calls) == 3:
            assert 0 < done < total
            self.action()


def test_meanwhile(rolled: Rolled) -> None:
    """Reads see the snapshot, writes wait, and the pool is at everyone else's service."""
    rolled.pool.snapshot_create(["a@last"])
    rolled.content["last"] = blocks("x")
    device = rolled.pool.open_device("a", ["last"])
    waiting: list[Completion] = []

    def act() -> None:
        for now in (True, False):
            assert read(device, 0, SIZE, now=now) == rolled.content["mid"]
        assert device.extents(0, SIZE) == [(48 * CHUNK, 0), (16 * CHUNK, STATE_HOLE | STATE_ZERO)]
        assert list(device.changes("last", 0, SIZE)) == [(SIZE, 1)], "what is not in place yet counts as changed"
        device.cache(0, SIZE)
        assert not device.write_now(0, memoryview(b"later"))
        waiting.append(submit(device, OpKind.WRITE, 7, data=b"later"))
        waiting.append(submit(device, OpKind.TRIM, SIZE - CHUNK, CHUNK, fua=True))
        flush(device)
        write(rolled.b, 0, blocks("b"), now=False)
        with pytest.raises(AssertionError, match="not done"):
            _wait_briefly(waiting[0])
        for refused in (
            lambda: rolled.pool.snapshot_create(["b@t", "a@t"]),
            lambda: rolled.pool.snapshot_delete(["a@mid"]),
            lambda: rolled.pool.rollback("a@old", force=True),
            lambda: list(rolled.pool.diff("a@new")),
        ):
            with pytest.raises(InUseError, match="rolled back"):
                refused()
        rolled.pool.snapshot_delete(["a@new"])

    meanwhile = Meanwhile(act)
    rolled.pool.rollback("a@mid", force=True, progress=meanwhile)
    assert meanwhile.calls[-1] == (SIZE, SIZE)
    for completion in waiting:
        completion.wait()
    device.close()
    del rolled.content["new"]
    rolled.check(b"m" * 7 + b"later" + rolled.content["mid"][12:])
    assert [info.name for info in rolled.pool.snapshot_list("b")] == ["s"]


def _wait_briefly(completion: Completion) -> None:
    assert completion._event.wait(0.02), "not done"


def test_whoever_waited_for_it_is_gone(rolled: Rolled) -> None:
    """It is finished all the same."""

    def leave() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rolled.pool.rollback("a@mid", progress=Meanwhile(leave))
    device = rolled.pool.open_device("a")
    assert read(device, 0, SIZE) == rolled.content["mid"]
    write(device, 0, b"waits")  # until it is over
    device.close()
    rolled.check(b"waits" + rolled.content["mid"][5:])


# What can't go on


def test_failing_disk(rolled: Rolled) -> None:
    device = rolled.pool.open_device("a")
    rolled.io.fail("write", "a.img", where=range(30 * CHUNK, 31 * CHUNK))
    with pytest.raises(OSError, match="Input/output"):
        rolled.pool.rollback("a@old", force=True)
    assert read(device, 0, SIZE) == rolled.content["old"]
    with pytest.raises(OSError, match="Input/output"):
        write(device, 0, b"refused")
    assert "a rollback is not finished" in (rolled.error() or "")
    with pytest.raises(InUseError, match="rolled back"):
        rolled.pool.snapshot_delete(["a@old"])
    with pytest.raises(InUseError, match="a@old"):
        rolled.pool.rollback("a@mid", force=True)
    rolled.io.heal()
    assert rolled.pool.rollback("a@old", force=True).done
    write(device, 0, b"taken")
    device.close()
    rolled.check(b"taken" + rolled.content["old"][5:])
    rolled.pool.snapshot_delete(["a@old"])


def test_failing_disk_and_restart(rolled: Rolled) -> None:
    """A start goes on; where it can't, the volume is not served, and the next start tries again."""
    rolled.io.fail("write", "a.img", where=range(30 * CHUNK, 31 * CHUNK))
    with pytest.raises(OSError, match="Input/output"):
        rolled.pool.rollback("a@mid")
    rolled.restart()
    assert "can't be rolled back to a@mid" in (rolled.error() or "")
    with pytest.raises(NbdsnapError, match="can't be rolled back"):
        rolled.pool.open_device("a")
    assert read(rolled.b, 0, SIZE) == bytes(SIZE)
    with pytest.raises(InUseError, match="rolled back"):
        rolled.pool.snapshot_delete(["a@mid"])
    rolled.io.heal()
    rolled.restart()
    rolled.check(rolled.content["mid"])


def test_closed_in_the_middle(rolled: Rolled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited is gone, and the pool is closed: the next start finishes."""
    pool = rolled.pool
    closing = threading.Thread(target=pool.close)
    original = rollback.Rollbacks._apply
    steps: list[int] = []

    def apply(self: rollback.Rollbacks, *arguments: Any) -> None:
        original(self, *arguments)
        steps.append(1)
        if len(steps) == 5:  # on the preserver's thread: the next command comes too late
            closing.start()
            wait_until(lambda: pool._preserver._stopping, "the pool to be closing")

    def leave() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rollback.Rollbacks, "_apply", apply)
    with pytest.raises(KeyboardInterrupt):
        pool.rollback("a@mid", progress=Meanwhile(leave))
    wait_until(lambda: closing.ident is not None, "the pool to be closed")
    closing.join(10)
    assert len(steps) == 5
    rolled.b.close()
    rolled.pool = rolled.open()
    rolled.b = rolled.pool.open_device("b")
    assert len(steps) == 5 + SIZE // STEP
    rolled.check(rolled.content["mid"])


def test_no_space(tmp_path: Path) -> None:
    """Refused before anything has changed."""
    options = PoolOptions(log_size=64 << 10, store_limit=int(SIZE * 3.5))
    made = Rolled(tmp_path, options)
    made.pool.snapshot_create(["a@last"])
    with pytest.raises(NoSpaceError, match="newer snapshots need"):
        made.pool.rollback("a@old")
    made.check(blocks("x"))
    made.pool.snapshot_delete(["a@last"])
    made.pool.rollback("a@old")
    made.check(made.content["old"])
    made.b.close()
    made.pool.close()


def test_no_space_drops_snapshots(tmp_path: Path) -> None:
    """But never the one that is rolled back to."""
    options = PoolOptions(log_size=64 << 10, store_limit=int(SIZE * 3.5), on_full="drop-snapshots")
    made = Rolled(tmp_path, options)
    made.pool.snapshot_create(["a@last"])
    made.pool.rollback("a@old")
    left = [info.name for info in made.pool.snapshot_list("a")]
    assert "old" in left
    assert "last" in left
    assert len(left) < 4
    made.content = {name: made.content.get(name, blocks("x")) for name in left}
    made.check(made.content["old"])
    made.b.close()
    made.pool.close()


def test_disk_that_fills_up(rolled: Rolled) -> None:
    rolled.pool.snapshot_create(["a@last"])
    rolled.io.fail("write", "store.data", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        rolled.pool.rollback("a@old")
    rolled.io.heal()
    rolled.pool.rollback("a@old")
    rolled.content["last"] = blocks("x")
    rolled.check(rolled.content["old"])


def test_damaged_snapshot(rolled: Rolled) -> None:
    """Refused before anything has changed."""
    store = rolled.folder / "pool" / "store.data"
    damaged = bytearray(store.read_bytes())
    place = damaged.index(b"o" * CHUNK)
    damaged[place + 100] ^= 1
    store.write_bytes(damaged)
    with pytest.raises(CorruptionError):
        rolled.pool.rollback("a@old")
    assert rolled.read("a") == blocks("x")
    rolled.pool.rollback("a@mid")
    assert rolled.read("a") == rolled.content["mid"]


# The view


def test_a_volume_that_has_grown(rolled: Rolled) -> None:
    """Behind the snapshot's end, the view is zeroes."""
    device: Device = rolled.pool.open_device("a@old")
    view = rollback.View(device)
    for offset, inside in ((SIZE - CHUNK, CHUNK), (SIZE, 0), (SIZE + CHUNK, 0)):
        buffer = memoryview(bytearray(b"?" * 2 * CHUNK))
        view.read(buffer, offset)
        assert bytes(buffer) == b"o" * inside + bytes(2 * CHUNK - inside)
        assert view.read_now(buffer, offset)
        assert bytes(buffer) == b"o" * inside + bytes(2 * CHUNK - inside)
    zeroes = STATE_HOLE | STATE_ZERO
    assert view.extents(SIZE - CHUNK, 3 * CHUNK) == [(CHUNK, 0), (2 * CHUNK, zeroes)]
    assert view.extents(SIZE, CHUNK) == [(CHUNK, zeroes)]
    view.close()
    mid = rollback.View(rolled.pool.open_device("a@mid"))
    assert mid.extents(0, SIZE + CHUNK) == [(48 * CHUNK, 0), (17 * CHUNK, zeroes)]
    mid.close()


# The command


def test_command(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    cli.write("vol", [0, 1 << 20])
    cli("snapshot", "create", "vol@b")
    cli.write("vol", [1 << 20])
    assert cli("rollback", "vol@a", "--dry-run").lines == [
        "would write over 8KiB of vol",
        "newer snapshots would need up to 4KiB of that",
    ]
    done = cli("rollback", "vol@a", "--json").json
    assert done == {"snapshot": "vol@a", "bytes": 8192, "preserved_bytes": 4096, "done": True}
    assert cli("rollback", "vol@b").lines == ["vol is vol@b again: 8KiB written over"]
    cli("rollback", "vol@nix", code=4)
    cli("rollback", "vol", code=2)
    cli("rollback", code=2)


def test_command_with_clients(local_cli: Cli) -> None:
    local_cli("snapshot", "create", "vol@a")
    pool = Pool.open(local_cli.pool_path)
    local_cli.pool = pool
    device = pool.open_device("vol")
    with ControlThread(pool, local_cli.config.parent / "control.sock"):
        refused = local_cli("rollback", "vol@a", code=5)
        assert "--force" in refused.err
        assert local_cli("rollback", "vol@a", "--force").lines == ["vol is vol@a again: 0B written over"]
    device.close()
    pool.close()
