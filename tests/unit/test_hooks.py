"""Commands around snapshots: what was begun is ended, whatever happens."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.config import hooks_of, load_config
from nbdsnap.engine.hooks import Hooks
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import AlreadyExistsError, NbdsnapError
from tests.support.deadline import wait_until
from tests.support.device import read, write
from tests.unit.conftest import Cli


class Guests:
    """Volumes ``a`` and ``b`` with hooks that write what they are and get into a log; ``c`` has none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.hooks: dict[str, Hooks] = {}
        for name in ("a", "b"):
            self.set(name)
        self.pool = Pool.open(folder / "pool", PoolOptions(hooks=self.hooks), create=True)
        for name in ("a", "b", "c"):
            self.pool.volume_create(name, folder / f"{name}.img", 1 << 20)

    def set(self, name: str, before: str = "", after: str = "", timeout_s: float = 20.0) -> None:
        note = f'echo {{}} $NBDSNAP_VOLUME $NBDSNAP_SNAPSHOTS >> "{self.log}"; {{}}'
        self.hooks[name] = Hooks(
            ["sh", "-c", note.format("freeze", before)], ["sh", "-c", note.format("thaw", after)], timeout_s
        )

    def said(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def names(self) -> list[str]:
        return [f"{info.volume}@{info.name}" for info in self.pool.snapshot_list()]


@pytest.fixture
def guests(tmp_path: Path) -> Iterator[Guests]:
    made = Guests(tmp_path)
    yield made
    made.pool.close()


def test_around_a_snapshot(guests: Guests) -> None:
    guests.pool.snapshot_create(["a@x"])
    assert guests.said() == ["freeze a a@x", "thaw a a@x"]
    guests.pool.snapshot_create(["c@x"])
    assert guests.said() == []
    guests.pool.snapshot_create(["b@y", "c@y", "a@y"])
    assert guests.said() == [f"{what} b@y c@y a@y" for what in ("freeze b", "freeze a", "thaw a", "thaw b")]


def test_what_is_written_before_is_in_the_snapshot(guests: Guests) -> None:
    """The hook of ``a`` waits until its volume was written to: writes go on while it runs."""
    ready, done = guests.folder / "ready", guests.folder / "done"
    guests.set("a", f'touch "{ready}"; until [ -e "{done}" ]; do sleep 0.01; done')
    device = guests.pool.open_device("a")

    def write_when_ready() -> None:
        wait_until(ready.exists, "the hook to run")
        write(device, 0, b"flushed by the freeze")
        done.touch()

    writer = threading.Thread(target=write_when_ready)
    writer.start()
    guests.pool.snapshot_create(["a@x"])
    writer.join()
    device.close()
    snapshot = guests.pool.open_device("a@x")
    assert read(snapshot, 0, 21) == b"flushed by the freeze"
    snapshot.close()


def test_failing_before(guests: Guests) -> None:
    """No snapshot; and whatever was begun is thawed, the one that failed, too."""
    guests.set("a", "echo no such guest >&2; exit 3")
    with pytest.raises(NbdsnapError, match=r"before a snapshot of a \(sh\) failed with exit code 3") as failed:
        guests.pool.snapshot_create(["b@x", "a@x", "c@x"])
    assert failed.value.advice == "it said: no such guest"
    assert guests.names() == []
    assert guests.said() == [f"{what} b@x a@x c@x" for what in ("freeze b", "freeze a", "thaw a", "thaw b")]


def test_too_slow_before(guests: Guests) -> None:
    """It is ended, with all that it has started."""
    guests.set("a", f'(sleep 30; echo late >> "{guests.log}") & wait', timeout_s=0.2)
    began = time.monotonic()
    with pytest.raises(NbdsnapError, match=r"was not done in 0.2 s"):
        guests.pool.snapshot_create(["a@x"])
    assert time.monotonic() - began < 10
    assert guests.names() == []
    assert guests.said() == ["freeze a a@x", "thaw a a@x"]


def test_one_that_does_not_want_to_end(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdsnap.engine.hooks.KILL_S", 0.1)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(30)"
    guests.hooks["a"] = Hooks([sys.executable, "-c", stubborn], guests.hooks["a"].after, 0.5)
    with pytest.raises(NbdsnapError, match=r"was not done"):
        guests.pool.snapshot_create(["a@x"])
    assert guests.said() == ["thaw a a@x"]


def test_failing_after(guests: Guests) -> None:
    """The snapshot is there, and whoever asked for it is told; the others are thawed all the same."""
    guests.set("a", after="exit 1")
    with pytest.raises(NbdsnapError, match=r"a@x, b@x was taken, but the command after a snapshot of a"):
        guests.pool.snapshot_create(["a@x", "b@x"])
    assert sorted(guests.names()) == ["a@x", "b@x"]
    assert [line.split()[:2] for line in guests.said()] == [
        ["freeze", "a"],
        ["freeze", "b"],
        ["thaw", "b"],
        ["thaw", "a"],
    ]


def test_a_snapshot_that_fails_in_between(guests: Guests) -> None:
    """Thawed; the failure is the snapshot's, even if the thaw fails, too."""
    guests.set("a", after="exit 1")
    original = guests.pool._take

    def take(wanted: object) -> object:
        raise NbdsnapError("the disk is gone")

    guests.pool._take = take  # type: ignore[method-assign, assignment]
    with pytest.raises(NbdsnapError, match="the disk is gone"):
        guests.pool.snapshot_create(["a@x"])
    guests.pool._take = original  # type: ignore[method-assign]
    assert guests.said() == ["freeze a a@x", "thaw a a@x"]
    assert guests.names() == []


def test_what_can_not_be_taken_is_refused_before(guests: Guests) -> None:
    guests.pool.snapshot_create(["a@x"])
    guests.said()
    with pytest.raises(AlreadyExistsError):
        guests.pool.snapshot_create(["a@x"])
    assert guests.said() == []


def test_no_such_program(guests: Guests) -> None:
    guests.hooks["a"] = Hooks(["/nix/da"], guests.hooks["a"].after)
    with pytest.raises(NbdsnapError, match=r"can't be run: /nix/da: No such file"):
        guests.pool.snapshot_create(["a@x"])
    assert guests.said() == ["thaw a a@x"]


def test_configured(local_cli: Cli) -> None:
    """A command that opens the pool itself runs them, too."""
    folder = local_cli.config.parent
    with local_cli.config.open("a") as config:
        config.write(
            f'[[volume]]\nname = "vol"\norigin = "{folder}/vol.img"\nhook_timeout_s = 5\n'
            f'before_snapshot = ["touch", "{folder}/frozen"]\n'
            f'after_snapshot = ["mv", "{folder}/frozen", "{folder}/thawed"]\n'
        )
    assert hooks_of(load_config(local_cli.config))["vol"]["timeout_s"] == 5
    local_cli("snapshot", "create", "vol@a")
    assert (folder / "thawed").exists()
    local_cli("snapshot", "create", "vol@b")
    assert not (folder / "frozen").exists()
