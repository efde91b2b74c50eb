"""Giving the space of deleted snapshots back: in the background, one step of each deletion in turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine import reclaim
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import ConflictError
from tests.support.deadline import wait_until
from tests.support.enginepool import make_pool, write_blocks
from tests.unit.conftest import Cli

CHUNK = 4096
MANY = 40
"""Snapshots of the large volume, each with a chunk of its own in another block."""

STRIDE = 16 << 20


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Volumes ``large`` and ``small``; a step of a deletion looks at one chunk."""
    monkeypatch.setattr(reclaim, "SLICE_CHUNKS", 1)
    pool = make_pool(tmp_path, ["large", "small"])
    for name in ("large", "small"):
        write_blocks(pool, name, [n * STRIDE for n in range(MANY)], b"o" * CHUNK)
    for number in range(MANY):
        pool.snapshot_create([f"large@s{number}"])
        write_blocks(pool, "large", [number * STRIDE])
    pool.snapshot_create(["small@s"])
    write_blocks(pool, "small", [0])
    pool.settle()
    yield pool
    if not pool._preserver._stopping:
        pool.close()


def large() -> list[str]:
    return [f"large@s{number}" for number in range(MANY)]


def test_gone_at_once_and_given_back_later(pool: Pool) -> None:
    deleted = pool.snapshot_delete(large(), wait=False)
    assert [info.name for info in pool.snapshot_list()] == ["s"]
    seen: list[tuple[int, int]] = []
    pool.reclaim(lambda done, total: seen.append((done, total)))
    assert deleted.freed_bytes == MANY * CHUNK
    assert all(done <= total for done, total in seen)
    status = pool.status().store
    assert (status.reclaiming_bytes, status.used_bytes) == (0, CHUNK)
    assert pool.check(data=True).ok


def test_a_small_one_does_not_wait_for_a_large_one(pool: Pool) -> None:
    pool.snapshot_delete(large(), wait=False)
    pool.snapshot_delete(["small@s"])
    assert pool.status().store.reclaiming_bytes > MANY * CHUNK // 2
    pool.reclaim()
    assert pool.status().store.used_bytes == 0


class Rests(threading.Event):
    """Counts how often, and for how long, somebody rests."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return False


def test_it_rests_while_clients_are_there(pool: Pool) -> None:
    pool._deletions._stopping = rests = Rests()
    pool.snapshot_delete(large()[:5])
    assert rests.seconds == []
    device = pool.open_device("small@s")
    pool.snapshot_delete(large()[5:])
    device.close()
    assert len(rests.seconds) >= MANY - 6
    assert all(0 < seconds < 10 for seconds in rests.seconds)
    pool.snapshot_delete(["small@s"])
    assert len(rests.seconds) <= MANY


def test_closed_in_between(pool: Pool, tmp_path: Path) -> None:
    """The next start goes on; who waited is told."""
    device = pool.open_device("small")
    pool._deletions._stopping = Rests()
    told: list[BaseException] = []

    def wait() -> None:
        try:
            pool.snapshot_delete(large())
        except ConflictError as error:
            told.append(error)

    step = pool._deletions._step
    steps: list[int] = []
    waiting = threading.Thread(target=wait)
    closing = threading.Thread(target=pool.close)

    def step_and_close(work: object) -> bool:
        steps.append(1)
        if len(steps) == 3:
            closing.start()
            wait_until(lambda: pool._preserver._stopping, "the pool to be closing")
        return step(work)  # type: ignore[arg-type]

    pool._deletions._step = step_and_close  # type: ignore[method-assign, assignment]
    waiting.start()
    waiting.join(10)
    closing.join(10)
    device.close()
    assert len(told) == 1
    assert len(steps) == 3
    again = Pool.open(tmp_path / "pool")
    again.reclaim()
    assert again.status().store.used_bytes == CHUNK
    assert again.check(data=True).ok
    again.close()


def test_command(cli: Cli) -> None:
    cli.write("vol", [0, CHUNK])
    cli("snapshot", "create", "vol@a")
    cli.write("vol", [0, CHUNK])
    assert cli("snapshot", "delete", "vol@a", "--dry-run").lines == ["would delete vol@a", "would free 8KiB"]
    assert cli("snapshot", "delete", "vol@a", "--background").lines == ["deleted vol@a", "freed 8KiB"]
    cli("snapshot", "create", "vol@b")
    cli.write("vol", [0])
    assert cli("snapshot", "delete", "vol@b").lines == ["deleted vol@b", "freed 4KiB"]
    assert cli("status", "--json").json["store"]["used_bytes"] == 0
