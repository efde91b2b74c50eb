"""Thin volumes and clones: what is written goes into the store, and nothing is shared by accident."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdsnap.engine import flatten
from nbdsnap.engine.device import STATE_HOLE, STATE_ZERO, OpKind
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import AlreadyExistsError, InUseError, NotFoundError, OriginError, UsageError
from nbdsnap.store.index import Index
from tests.support.device import flush, read, submit, write
from tests.support.enginepool import make_pool

CHUNK = 4096
MIB = 1 << 20
HOLE = STATE_HOLE | STATE_ZERO


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = make_pool(tmp_path, ["vol"], MIB)
    yield pool
    pool.close()


def content(pool: Pool, name: str, offset: int = 0, length: int = MIB) -> bytes:
    device = pool.open_device(name)
    try:
        return read(device, offset, length)
    finally:
        device.close()


def put(pool: Pool, name: str, offset: int, data: bytes) -> None:
    device = pool.open_device(name)
    try:
        write(device, offset, data)
        flush(device)
    finally:
        device.close()


def zero(pool: Pool, name: str, offset: int, length: int, kind: OpKind = OpKind.TRIM, **flags: bool) -> None:
    device = pool.open_device(name)
    try:
        submit(device, kind, offset, length, **flags).wait()
    finally:
        device.close()


def used(pool: Pool) -> int:
    """Chunks in the store."""
    return pool.status().store.used_bytes // CHUNK


def live(pool: Pool, name: str) -> int:
    size = pool.volume_show(name).live_bytes
    assert size is not None
    return size // CHUNK


def test_a_thin_volume_is_zeroes_and_takes_what_is_written(pool: Pool) -> None:
    info = pool.volume_create("thin", size=1 << 40, thin=True)
    assert (info.kind, info.size, info.origin, info.base) == ("thin", 1 << 40, None, None)
    assert content(pool, "thin", (1 << 40) - MIB) == bytes(MIB)
    assert used(pool) == live(pool, "thin") == 0
    put(pool, "thin", (1 << 39) + 100, b"x" * CHUNK)  # touches two chunks
    assert used(pool) == live(pool, "thin") == 2
    assert content(pool, "thin", 1 << 39, 3 * CHUNK) == bytes(100) + b"x" * CHUNK + bytes(2 * CHUNK - 100)
    device = pool.open_device("thin")
    assert device.extents((1 << 39) - CHUNK, 4 * CHUNK) == [(CHUNK, HOLE), (2 * CHUNK, 0), (CHUNK, HOLE)]
    device.close()


def test_trim_gives_the_space_back(pool: Pool) -> None:
    pool.volume_create("thin", size=256 * MIB, thin=True)
    put(pool, "thin", 0, b"x" * 16 * MIB)
    before = pool.status().store
    assert before.used_bytes == 16 * MIB
    zero(pool, "thin", 100, 16 * MIB - 200)
    after = pool.status().store
    assert after.used_bytes == 2 * CHUNK, "the chunks at both ends keep a part"
    assert after.allocated_bytes < before.allocated_bytes - 15 * MIB
    assert content(pool, "thin", 0, 16 * MIB) == b"x" * 100 + bytes(16 * MIB - 200) + b"x" * 100
    zero(pool, "thin", 0, 256 * MIB, OpKind.ZERO)
    assert used(pool) == 0


def test_zeroes_that_must_not_be_a_hole_take_space(pool: Pool) -> None:
    pool.volume_create("thin", size=MIB, thin=True)
    zero(pool, "thin", 0, 4 * CHUNK, OpKind.ZERO, no_hole=True)
    assert used(pool) == 4
    assert content(pool, "thin") == bytes(MIB)


def test_a_snapshot_of_a_thin_volume_shares_until_it_is_written(pool: Pool) -> None:
    pool.volume_create("thin", size=MIB, thin=True)
    put(pool, "thin", 0, b"a" * 4 * CHUNK)
    pool.snapshot_create(["thin@one"])
    assert used(pool) == 4
    put(pool, "thin", 0, b"b" * CHUNK)
    put(pool, "thin", 0, b"c" * CHUNK)
    zero(pool, "thin", CHUNK, CHUNK)
    put(pool, "thin", 8 * CHUNK, b"d" * CHUNK)
    assert (used(pool), live(pool, "thin")) == (6, 4)
    assert content(pool, "thin@one") == b"a" * 4 * CHUNK + bytes(MIB - 4 * CHUNK)
    assert content(pool, "thin", 0, 4 * CHUNK) == b"c" * CHUNK + bytes(CHUNK) + b"a" * 2 * CHUNK
    assert [(one.offset // CHUNK, one.length // CHUNK) for one in pool.diff("thin@one")] == [(0, 2), (8, 1)]
    (info,) = pool.snapshot_list("thin")
    assert info.exclusive_bytes == 2 * CHUNK
    assert pool.snapshot_delete(["thin@one"]).freed_bytes == 2 * CHUNK
    assert used(pool) == live(pool, "thin") == 4


def test_a_clone_is_written_without_its_base_changing(pool: Pool) -> None:
    put(pool, "vol", 0, b"a" * MIB)
    pool.snapshot_create(["vol@one"])
    info = pool.clone("vol@one", "trial")
    assert (info.kind, info.size, info.base) == ("clone", MIB, "vol@one")
    assert content(pool, "trial") == b"a" * MIB
    assert used(pool) == 0
    put(pool, "trial", 100, b"b" * 200)
    zero(pool, "trial", 2 * CHUNK, CHUNK)
    put(pool, "vol", 0, b"c" * CHUNK)
    wanted = b"a" * 100 + b"b" * 200 + b"a" * (2 * CHUNK - 300) + bytes(CHUNK) + b"a" * (MIB - 3 * CHUNK)
    assert content(pool, "trial") == wanted
    assert content(pool, "vol@one") == b"a" * MIB
    assert content(pool, "vol", 0, CHUNK) == b"c" * CHUNK
    assert live(pool, "trial") == 1
    assert pool.check(data=True).ok


def test_what_has_clones_stays(pool: Pool) -> None:
    pool.snapshot_create(["vol@one"])
    pool.clone("vol@one", "trial")
    pool.clone("vol@one", "other")
    with pytest.raises(InUseError, match="vol@one has clones: other, trial"):
        pool.snapshot_delete(["vol@one"])
    with pytest.raises(InUseError, match="has clones"):
        pool.volume_delete("vol", snapshots=True)
    assert [info.clones for info in pool.snapshot_list("vol")] == [["other", "trial"]]
    pool.volume_delete("trial")
    pool.volume_delete("other")
    pool.snapshot_delete(["vol@one"])


def test_a_deleted_volume_gives_everything_back(pool: Pool) -> None:
    pool.volume_create("thin", size=MIB, thin=True)
    put(pool, "thin", 0, b"a" * MIB)
    pool.snapshot_create(["thin@one"])
    put(pool, "thin", 0, b"b" * MIB)
    with pytest.raises(InUseError):
        pool.volume_delete("thin")
    pool.volume_delete("thin", snapshots=True)
    assert used(pool) == 0
    assert [info.name for info in pool.volume_list()] == ["vol"]
    pool.volume_create("thin", size=MIB, thin=True)
    assert content(pool, "thin") == bytes(MIB)
    assert pool.check().ok


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, ["vol"], MIB)
    pool.volume_create("thin", size=MIB, thin=True)
    put(pool, "thin", 0, b"a" * CHUNK)
    pool.snapshot_create(["thin@one"])
    pool.clone("thin@one", "trial")
    put(pool, "trial", CHUNK, b"b" * CHUNK)
    pool.snapshot_create(["trial@two"])
    pool.clone("trial@two", "again")
    pool.close()
    pool = Pool.open(tmp_path / "pool")
    try:
        assert content(pool, "again", 0, 3 * CHUNK) == b"a" * CHUNK + b"b" * CHUNK + bytes(CHUNK)
        put(pool, "again", 0, b"c" * CHUNK)
        assert content(pool, "trial", 0, CHUNK) == b"a" * CHUNK
        assert pool.volume_ensure("thin", None, MIB, thin=True).kind == "thin"
        assert pool.check(data=True).ok
    finally:
        pool.close()


def test_what_can_not_be(pool: Pool, tmp_path: Path) -> None:
    pool.snapshot_create(["vol@one"])
    for wrong in ({"size": MIB}, {"thin": True}, {"origin": tmp_path / "x", "size": MIB, "thin": True}):
        with pytest.raises(UsageError):
            pool.volume_create("new", **wrong)  # type: ignore[arg-type]
    with pytest.raises(AlreadyExistsError):
        pool.clone("vol@one", "vol")
    with pytest.raises(NotFoundError):
        pool.clone("vol@two", "new")


def test_a_clone_waits_for_its_base(tmp_path: Path) -> None:
    """An origin that is missing at the start takes its clones along; when it is back, so are they."""
    pool = make_pool(tmp_path, ["vol"], MIB)
    put(pool, "vol", 0, b"a" * MIB)
    pool.snapshot_create(["vol@one"])
    pool.clone("vol@one", "trial")
    pool.snapshot_create(["trial@two"])
    pool.clone("trial@two", "again")
    pool.close()
    (tmp_path / "vol.img").rename(tmp_path / "away.img")
    pool = Pool.open(tmp_path / "pool")
    for info in pool.volume_list():
        assert info.error is not None
    with pytest.raises(NotFoundError, match="the base vol@one can't be read"):
        pool.open_device("trial")
    pool.close()
    (tmp_path / "away.img").rename(tmp_path / "vol.img")
    pool = Pool.open(tmp_path / "pool")
    assert content(pool, "again") == b"a" * MIB
    pool.close()


def test_flatten_frees_a_clone_from_its_base(pool: Pool) -> None:
    put(pool, "vol", 0, b"a" * (MIB - 8 * CHUNK))  # and zeroes behind it
    pool.snapshot_create(["vol@one"])
    pool.clone("vol@one", "trial")
    put(pool, "trial", 0, b"b" * CHUNK)
    pool.snapshot_create(["trial@two"])
    zero(pool, "trial", CHUNK, CHUNK)
    put(pool, "trial", MIB - CHUNK, b"c" * CHUNK)
    pool.clone("trial@two", "again")
    names = ["trial", "trial@two", "again", "vol", "vol@one"]
    before = {name: content(pool, name) for name in names}
    reported: list[tuple[int, int]] = []
    info = pool.volume_flatten("trial", progress=lambda done, total: reported.append((done, total)))
    assert (info.kind, info.base) == ("thin", None)
    assert reported[-1] == (MIB, MIB)
    assert {name: content(pool, name) for name in names} == before
    assert pool.check(data=True).ok
    pool.volume_delete("vol", snapshots=True)
    assert content(pool, "again") == before["again"]
    put(pool, "again", 3 * CHUNK, b"d" * CHUNK)
    assert content(pool, "trial@two") == before["trial@two"]
    with pytest.raises(UsageError, match="is no clone"):
        pool.volume_flatten("trial")
    pool.volume_flatten("again")
    pool.volume_delete("trial", snapshots=True)
    pool.volume_delete("again")
    assert used(pool) == 0


def test_flatten_takes_as_many_steps_as_it_needs(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatten, "STEP_CHUNKS", 7)
    monkeypatch.setattr(flatten, "WINDOW", 40 * CHUNK)
    put(pool, "vol", 0, b"a" * MIB)
    pool.snapshot_create(["vol@one"])
    pool.clone("vol@one", "trial")
    for chunk in range(0, MIB // CHUNK, 3):
        put(pool, "trial", chunk * CHUNK, b"b" * CHUNK)
        if chunk % 50 == 0:
            pool.snapshot_create([f"trial@s{chunk}"])
    names = [export.name for export in pool.exports() if export.name.startswith("trial")]
    before = {name: content(pool, name) for name in names}

    def write_behind_and_ahead(done: int, total: int) -> None:
        put(pool, "trial", done // 2 & -CHUNK, b"c" * CHUNK)
        put(pool, "trial", (done + MIB) // 2 & -CHUNK if done < MIB else 0, b"d" * CHUNK)

    pool.volume_flatten("trial", progress=write_behind_and_ahead)
    del before["trial"]
    assert {name: content(pool, name) for name in names if "@" in name} == before
    assert pool.check(data=True).ok
    pool.snapshot_delete(["vol@one"])


def test_reads_are_as_right_at_any_depth(pool: Pool) -> None:
    put(pool, "vol", 0, b"a" * MIB)
    expected = bytearray(b"a" * MIB)
    name = "vol"
    for depth in range(1, 13):
        pool.snapshot_create([f"{name}@s"])
        pool.clone(f"{name}@s", f"c{depth}")
        name = f"c{depth}"
        place = depth * 5 * CHUNK + depth
        put(pool, name, place, bytes([depth]) * 2 * CHUNK)
        expected[place : place + 2 * CHUNK] = bytes([depth]) * 2 * CHUNK
        assert content(pool, name) == expected
    assert content(pool, "c5@s", 0, MIB)[70 * CHUNK :] == b"a" * (MIB - 70 * CHUNK)
    device = pool.open_device(name)
    assert device.depths(0, 2 * CHUNK) == [(2 * CHUNK, 2)]
    assert device.depths(60 * CHUNK, 4 * CHUNK) == [(3 * CHUNK, 1), (CHUNK, 2)]
    device.close()


def test_rollback_of_a_base_leaves_its_clones_alone(pool: Pool) -> None:
    pool.volume_create("thin", size=MIB, thin=True)
    put(pool, "thin", 0, b"a" * CHUNK)
    pool.snapshot_create(["thin@one"])
    pool.clone("thin@one", "trial")
    pool.snapshot_create(["trial@two"])
    pool.clone("trial@two", "again")
    put(pool, "thin", 0, b"b" * 2 * CHUNK)
    wanted = b"a" * CHUNK + bytes(MIB - CHUNK)
    assert content(pool, "again") == wanted
    pool.rollback("thin@one")
    for name in ("thin", "thin@one", "trial", "trial@two", "again"):
        assert content(pool, name) == wanted, name
    assert pool.check(data=True).ok


def test_a_clone_that_was_made_smaller_does_not_see_its_base_again(pool: Pool) -> None:
    put(pool, "vol", 0, b"a" * MIB)
    pool.snapshot_create(["vol@one"])
    pool.clone("vol@one", "trial")
    pool.volume_resize("trial", MIB // 2 + 100, shrink=True)
    assert pool.check(data=True).ok
    pool.volume_resize("trial", 2 * MIB)
    assert content(pool, "trial", 0, 2 * MIB) == b"a" * (MIB // 2 + 100) + bytes(2 * MIB - MIB // 2 - 100)
    pool.volume_flatten("trial")
    assert content(pool, "trial", MIB // 2, MIB) == b"a" * 100 + bytes(MIB - 100)
    assert pool.check(data=True).ok


def test_a_read_asks_the_index_as_often_at_any_depth(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each clone has some chunks of its own; who has which is found out once."""
    pool.volume_create("c0", size=MIB, thin=True)
    put(pool, "c0", 0, b"a" * MIB)
    for depth in range(1, 41):
        pool.snapshot_create([f"c{depth - 1}@s"])
        pool.clone(f"c{depth - 1}@s", f"c{depth}")
        put(pool, f"c{depth}", depth * 3 * CHUNK, b"b" * CHUNK)
    asked: dict[str, int] = {}
    for name in ("c2", "c40"):
        device = pool.open_device(name)
        read(device, 0, MIB)
        count = 0
        original = Index.read

        def counted(index: Index, original: Callable[[Index], Any] = original) -> Any:
            nonlocal count
            count += threading.current_thread() is threading.main_thread()  # the engine's own threads ask, too
            return original(index)

        with monkeypatch.context() as patches:
            patches.setattr(Index, "read", counted)
            for chunk in range(200, 250):  # of the thin volume, at the other end of the chain
                assert read(device, chunk * CHUNK, CHUNK) == b"a" * CHUNK
        asked[name] = count
        device.close()
    assert asked["c40"] == asked["c2"] == 50


def test_accepting_a_changed_origin_brings_its_clones_back(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, ["vol"], MIB)
    put(pool, "vol", 0, b"a" * MIB)
    pool.snapshot_create(["vol@one"])
    pool.clone("vol@one", "trial")
    pool.snapshot_create(["trial@two"])
    pool.clone("trial@two", "again")
    pool.close()
    with (tmp_path / "vol.img").open("r+b") as file:
        file.write(b"b")
    pool = Pool.open(tmp_path / "pool")
    with pytest.raises(OriginError, match=r"the base vol@one can't be read: .* was changed"):
        pool.open_device("again")
    assert pool.volume_accept("again").error is not None, "it is not the clone's to accept"
    pool.volume_accept("vol")
    assert content(pool, "again") == b"b" + b"a" * (MIB - 1)
    assert [info.error for info in pool.volume_list()] == [None] * 3
    assert [info.problem for info in pool.snapshot_list("trial")] == [None]
    pool.close()


@pytest.mark.parametrize("snapshot", [False, True])
def test_after_a_restart_the_first_write_finds_out_for_its_neighbours(tmp_path: Path, snapshot: bool) -> None:
    """Where they lie, and that they may be written in place."""
    pool = make_pool(tmp_path)
    pool.volume_create("thin", size=MIB, thin=True)
    put(pool, "thin", 0, b"a" * MIB)
    if snapshot:
        pool.snapshot_create(["thin@one"])
        put(pool, "thin", 0, b"b" * MIB)
    pool.close()
    pool = Pool.open(tmp_path / "pool")
    put(pool, "thin", 0, b"c" * CHUNK)
    pool.settle()
    logged = pool._log.next_sequence
    for chunk in range(1, 64):
        put(pool, "thin", chunk * CHUNK, b"d" * CHUNK)
    assert pool._log.next_sequence == logged
    assert content(pool, "thin", 0, 64 * CHUNK) == b"c" * CHUNK + b"d" * 63 * CHUNK
    pool.close()
