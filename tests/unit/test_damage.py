"""Damage is found, named and contained; a repair removes what is lost and keeps the rest.

The exhaustive part flips bits of every file of a small pool, at places drawn from a seed, and requires that a snapshot
never reads differently: either nothing changes, or an error says so.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdsnap.cli.main import run
from nbdsnap.engine.offline import OfflinePool
from nbdsnap.engine.pool import Pool
from nbdsnap.engine.repair import plan_repair, repair
from nbdsnap.errors import CorruptionError, NbdsnapError
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.index import TABLES
from nbdsnap.store.pages import PageFile
from nbdsnap.store.salvage import Salvage
from tests.support.blocks import stamped
from tests.support.device import flush, read, write
from tests.support.enginepool import make_pool

CHUNK = 4096
PAGE = 4096
SIZE = 2 << 20
CHUNKS = SIZE // CHUNK

SEED = int(os.environ.get("NBDSNAP_SEED", "20261"))
FLIPS = int(os.environ.get("NBDSNAP_FLIPS", "60"))
"""Of each file.  Thousands by hand."""

Images = dict[str, bytes]


def change(pool: Pool, seed: int, chunks: Iterator[int] | range) -> None:
    device = pool.open_device("vol")
    for chunk in chunks:
        write(device, chunk * CHUNK, stamped(seed, chunk * CHUNK, CHUNK))
    flush(device)
    device.close()


def read_all(pool: Pool) -> Images:
    return {export.name: read_export(pool, export.name) for export in pool.exports() if export.read_only}


def read_export(pool: Pool, name: str) -> bytes:
    device = pool.open_device(name)
    try:
        return read(device, 0, device.size)
    finally:
        device.close()


def build(folder: Path) -> Images:
    """A pool in which chunks are shared by several snapshots, kept by one, zero, and live."""
    pool = make_pool(folder, ["vol"], SIZE)
    change(pool, 1, (chunk for chunk in range(CHUNKS) if chunk % 4 < 3))
    pool.snapshot_create(["vol@a"])
    change(pool, 2, range(0, CHUNKS, 3))
    pool.snapshot_create(["vol@b"])
    change(pool, 3, range(CHUNKS // 2))
    pool.snapshot_create(["vol@c"])
    change(pool, 4, range(CHUNKS // 4, CHUNKS, 5))
    images = read_all(pool)
    pool.close()
    return images


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Images]:
    folder = tmp_path_factory.mktemp("master")
    return folder, build(folder)


@pytest.fixture
def damaged(master: tuple[Path, Images]) -> Iterator[Path]:
    """The folder of that pool, as good as new after the test: the origin's inode and time must stay."""
    folder = master[0]
    origin = folder / "vol.img"
    content, status = origin.read_bytes(), origin.stat()
    kept = folder.with_name("kept")
    shutil.copytree(folder / "pool", kept)
    yield folder
    shutil.rmtree(folder / "pool")
    kept.rename(folder / "pool")
    if origin.read_bytes() != content:
        origin.write_bytes(content)
    os.utime(origin, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def images(master: tuple[Path, Images]) -> Images:
    return master[1]


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def corrupt_slot(folder: Path, name: str, chunk: int) -> int:
    """Damage what snapshot ``name`` has preserved of ``chunk``; its slot."""
    with OfflinePool(folder / "pool") as pool, pool.salvage() as salvage:
        epoch = next(epoch for _, epoch, record in salvage.snapshots() if record["name"] == name)
        record = next(one for one in salvage.records(1) if one.chunk == chunk and one.epoch >= epoch)
    flip(folder / "pool" / "store.data", record.slot * CHUNK * 8 + 77)
    return record.slot


def check(folder: Path, data: bool = True) -> list[str]:
    with OfflinePool(folder / "pool") as pool:
        return [problem.kind for problem in pool.check(data=data).problems]


def mend(folder: Path) -> list[str]:
    with OfflinePool(folder / "pool") as pool:
        plan = plan_repair(pool)
        repair(pool, plan)
        assert not {step.kind for step in plan.steps} & {"log"} or plan.log.actions
        return [step.kind for step in plan.steps]


def spoil_page(folder: Path, number: int) -> None:
    with (folder / "pool" / "index.mdb").open("r+b") as file:
        file.seek(number * PAGE + 8)
        file.write(b"\xa5" * (PAGE - 8))


def pages_of(folder: Path, table: str) -> list[int]:
    """Pages whose damage leaves gaps in ``table``, as the reader itself finds them."""
    index = folder / "pool" / "index.mdb"
    found = []
    for number in range(2, index.stat().st_size // PAGE):
        pages = PageFile(FileIO(), index, {number})
        if any(not hasattr(one, "value") for one in pages.read(table)) and table in pages.tables():
            found.append(number)
        pages.close()
    return found


# Finding


def test_a_sound_pool_has_no_problems(damaged: Path) -> None:
    assert check(damaged) == []
    with OfflinePool(damaged / "pool") as pool:
        assert not plan_repair(pool).steps


def test_the_offline_reader_reads_what_lmdb_reads(damaged: Path) -> None:
    pool = Pool.open(damaged / "pool")
    with pool._index.read() as reader:
        expected = [(one.chunk, one.epoch, one.slot, one.checksum) for one in reader.records(1)]
        tables = list(reader.changed(1, 0, 1 << 32)), list(reader.slots()), list(reader.usage(1))
        records = list(reader.volumes()), list(reader.snapshots()), reader.meta()
    salvage = Salvage(FileIO(), damaged / "pool" / "index.mdb")  # at rest: nothing changes meanwhile
    assert [(one.chunk, one.epoch, one.slot, one.checksum) for one in salvage.records(1)] == expected
    assert (list(salvage.changed(1)), list(salvage.slots()), list(salvage.usage(1))) == tables
    assert (list(salvage.volumes()), list(salvage.snapshots()), salvage.meta()) == records
    assert not salvage.damage
    salvage.close()
    pool.close()


def test_a_damaged_chunk_is_named(damaged: Path, images: Images, caplog: pytest.LogCaptureFixture) -> None:
    corrupt_slot(damaged, "b", 0)
    corrupt_slot(damaged, "b", 3)
    pool = Pool.open(damaged / "pool")
    try:
        assert pool.check().ok
        problems = pool.check(data=True).problems
        assert [(one.kind, one.snapshots, one.offset, one.length) for one in problems] == [
            ("checksum", ["vol@b"], 0, CHUNK),
            ("checksum", ["vol@b"], 3 * CHUNK, CHUNK),
        ]
        device = pool.open_device("vol@b")
        with pytest.raises(CorruptionError):
            read(device, 3 * CHUNK, 512)
        assert "vol@b: the data at offset 12288 (slot " in caplog.text
        assert read(device, CHUNK, 2 * CHUNK) == images["vol@b"][CHUNK : 3 * CHUNK]
        device.close()
        assert read_export(pool, "vol@a") == images["vol@a"]
        assert read_export(pool, "vol@c") == images["vol@c"]
    finally:
        pool.close()


def test_a_shared_chunk_is_read_once_and_names_all_its_snapshots(damaged: Path) -> None:
    corrupt_slot(damaged, "a", 1)  # first written after b
    with OfflinePool(damaged / "pool") as pool:
        (problem,) = pool.check(data=True).problems
    assert problem.snapshots == ["vol@a", "vol@b"]
    assert problem.detail == "vol@a, vol@b, bytes 4096 to 8191: its content is damaged"


def test_neighbours_are_one_range(damaged: Path) -> None:
    for chunk in (4, 5, 8):
        corrupt_slot(damaged, "b", chunk)
    with OfflinePool(damaged / "pool") as pool:
        found = [(one.snapshots, one.offset, one.length) for one in pool.check(data=True).problems]
    assert (["vol@a", "vol@b"], 4 * CHUNK, 2 * CHUNK) in found
    assert (["vol@a", "vol@b"], 8 * CHUNK, CHUNK) in found


def test_an_index_that_is_no_index_says_so(damaged: Path) -> None:
    (damaged / "pool" / "index.mdb").write_bytes(b"no" * 5000)
    assert check(damaged) == ["index"]
    with OfflinePool(damaged / "pool") as pool, pytest.raises(CorruptionError, match="is damaged"):
        plan_repair(pool)
    (damaged / "pool" / "index.mdb").unlink()
    assert check(damaged) == ["index"]


# Repairing


def test_repair_marks_lost_chunks_and_keeps_the_rest(damaged: Path, images: Images) -> None:
    corrupt_slot(damaged, "b", 0)
    assert mend(damaged) == ["lost"]
    assert check(damaged) == ["lost"]
    assert mend(damaged) == []
    pool = Pool.open(damaged / "pool")
    try:
        device = pool.open_device("vol@b")
        with pytest.raises(CorruptionError, match="lost to earlier damage"):
            read(device, 100, 10)
        assert read(device, CHUNK, SIZE - CHUNK) == images["vol@b"][CHUNK:]
        device.close()
        assert read_export(pool, "vol@a") == images["vol@a"]
        pool.snapshot_delete(["vol@b"])
        assert pool.check(data=True).ok
        assert read_export(pool, "vol@a") == images["vol@a"]
        pool.snapshot_delete(["vol@a", "vol@c"])
        assert pool.check(data=True).ok
        assert pool.status().store.used_bytes == 0
    finally:
        pool.close()


@pytest.mark.parametrize("sums", [True, False], ids=["sealed", "crashed"])
@pytest.mark.parametrize("table", ["meta", "volumes", "snapshots", "preserved", "changed", "slots", "usage"])
def test_any_page_of_the_index_can_be_lost(damaged: Path, images: Images, table: str, sums: bool) -> None:
    """After the repair every snapshot that is there reads as before, or fails to be read; none reads differently."""
    number = pages_of(damaged, table)[-1]
    spoil_page(damaged, number)
    if sums:
        with pytest.raises(CorruptionError):
            Pool.open(damaged / "pool")
    else:
        (damaged / "pool" / "index.sums").unlink()
    assert "index" in check(damaged, data=False)
    live = (damaged / "vol.img").read_bytes()
    mend(damaged)
    assert set(check(damaged)) <= {"lost"}
    pool = Pool.open(damaged / "pool")
    try:
        assert verify(pool, images) or table in ("preserved", "snapshots", "volumes")
        if table in ("meta", "changed", "slots", "usage"):
            assert len(read_all(pool)) == 3
        if table != "volumes":
            pool.snapshot_create(["vol@after"])
            change(pool, 9, range(CHUNKS))
            assert read_export(pool, "vol@after") == live
    finally:
        pool.close()


def test_a_damaged_page_that_is_not_in_use_is_found_and_mended(damaged: Path, images: Images) -> None:
    """The start refuses it as any other; so there must be a way out."""
    index = damaged / "pool" / "index.mdb"
    used = {number for table in TABLES for number in pages_of(damaged, table)}
    free = next(number for number in range(2, index.stat().st_size // PAGE) if number not in used)
    spoil_page(damaged, free)
    with pytest.raises(CorruptionError):
        Pool.open(damaged / "pool")
    assert check(damaged) == ["index"]
    assert mend(damaged) == ["rebuild"]
    assert check(damaged) == []
    assert outcome(damaged, images) == "harmless"


def test_a_dry_run_changes_nothing(damaged: Path) -> None:
    corrupt_slot(damaged, "b", 0)
    before = {path.name: path.read_bytes() for path in (damaged / "pool").iterdir() if path.name != "lock"}
    with OfflinePool(damaged / "pool") as pool:
        assert plan_repair(pool).steps
    assert {path.name: path.read_bytes() for path in (damaged / "pool").iterdir() if path.name != "lock"} == before


def test_the_command_line_checks_and_repairs(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = damaged / "nbdsnap.toml"
    config.write_text(
        f'[server]\nlisten = ["unix://{damaged}/nbd.sock"]\ncontrol = "{damaged}/control.sock"\n'
        f'[pool]\npath = "{damaged}/pool"\n'
    )
    corrupt_slot(damaged, "a", 1)
    spoil_page(damaged, pages_of(damaged, "usage")[-1])

    def nbdsnap(*words: str) -> tuple[int, str]:
        code = run(["--config", str(config), *words])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, " ".join((shown.out + shown.err).split())

    code, shown = nbdsnap("volume", "list")
    assert code == 7 and "1 of its pages changed while no server ran" in shown
    code, shown = nbdsnap("check", "--data")
    assert code == 7 and "vol@a, vol@b, bytes 4096 to 8191: its content is damaged" in shown
    assert "it is not what it was when the pool was closed (table usage)" in shown
    code, shown = nbdsnap("check", "--repair", "--dry-run")
    assert code == 0 and "lost; mark them, so that reads fail" in shown
    code, again = nbdsnap("check", "--repair", "--json")
    assert code == 0 and '"done": true' in again
    assert nbdsnap("check", "--repair") == (0, "there is nothing to repair")
    code, shown = nbdsnap("check")
    assert code == 7 and "its content was lost to earlier damage" in shown
    assert nbdsnap("snapshot", "delete", "vol@a", "vol@b")[0] == 0
    assert nbdsnap("check", "--data") == (0, "ok")
    assert nbdsnap("check", "--dry-run")[0] == 2


# The intent log


def killed_pool(folder: Path) -> None:
    """A pool whose process ended with acknowledged writes in the log."""
    program = """
import os, sys
from pathlib import Path
from nbdsnap.engine.pool import Pool
from tests.support.blocks import stamped
from tests.support.device import flush
from tests.support.held import hold_preserver
pool = Pool.open(Path(sys.argv[1]))
hold_preserver(pool)
device = pool.open_device("vol")
for chunk in range(64):
    assert device.write_now(chunk * 4096 + 4096 * 300, memoryview(stamped(5, chunk * 4096, 4096)))
    if chunk == 40:
        flush(device)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program, str(folder / "pool")], check=True)


def record_places(path: Path) -> list[int]:
    content, places, place = path.read_bytes(), [], 0
    while (place := content.find(b"NBLR", place)) >= 0:
        places.append(place)
        place += 1
    return places


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    build(tmp_path)
    change_one = Pool.open(tmp_path / "pool")
    change_one.snapshot_create(["vol@now"])
    change_one.close()
    killed_pool(tmp_path)
    return tmp_path


def test_a_damaged_record_of_the_log_is_found_and_the_others_are_kept(crashed: Path) -> None:
    log = crashed / "pool" / "intent.log"
    flip(log, (record_places(log)[10] + 100) * 8)
    with pytest.raises(CorruptionError, match="damaged at record"):
        Pool.open(crashed / "pool")
    assert check(crashed) == ["log"]
    assert mend(crashed) == ["log"]
    pool = Pool.open(crashed / "pool")
    live = read_export(pool, "vol")
    pool.close()
    arrived = [live[(300 + n) * CHUNK : (301 + n) * CHUNK] == stamped(5, n * CHUNK, CHUNK) for n in range(64)]
    assert arrived == [n != 10 for n in range(64)]


def test_a_damaged_header_of_the_log_is_found_and_says_what_may_be_lost(crashed: Path) -> None:
    flip(crashed / "pool" / "intent.log", 300)
    assert check(crashed) == ["log"]
    with OfflinePool(crashed / "pool") as pool:
        (step,) = plan_repair(pool).steps
    assert "up to so many are lost: volume number 1, within bytes" in step.detail
    mend(crashed)
    assert check(crashed) == []
    Pool.open(crashed / "pool").close()


def test_a_damaged_file_of_stranded_intents_is_cut(crashed: Path) -> None:
    away = crashed / "away.img"
    (crashed / "vol.img").rename(away)
    Pool.open(crashed / "pool").close()
    away.rename(crashed / "vol.img")
    (stranded,) = (crashed / "pool").glob("intents-*.log")
    flip(stranded, record_places(stranded)[20] * 8 + 500)
    assert check(crashed) == ["log"]
    assert mend(crashed) == ["log"]
    pool = Pool.open(crashed / "pool")
    live = read_export(pool, "vol")
    pool.close()
    arrived = [live[(300 + n) * CHUNK : (301 + n) * CHUNK] == stamped(5, n * CHUNK, CHUNK) for n in range(64)]
    assert arrived == [n < 20 for n in range(64)]


# Exhaustively


def verify(pool: Pool, images: Images) -> bool:
    """Whether all snapshots read as they were; AssertionError where one reads differently, chunk by chunk."""
    whole = set(images) == {export.name for export in pool.exports() if export.read_only}
    for name, image in images.items():
        if pool.find_export(name) is None:
            continue
        device = pool.open_device(name)
        for start in range(0, SIZE, CHUNK):
            try:
                assert read(device, start, CHUNK) == image[start : start + CHUNK], f"{name}, chunk {start // CHUNK}"
            except NbdsnapError:
                whole = False
        device.close()
    return whole


def outcome(folder: Path, images: Images) -> str:
    try:
        pool = Pool.open(folder / "pool")
    except NbdsnapError as error:
        assert str(error)
        return "refused"
    try:
        if verify(pool, images):
            return "harmless"
        assert not pool.check(data=True).ok
        return "noticed"
    finally:
        pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["index.mdb", "index.sums", "intent.log", "lock", "store.data"])
def test_flipped_bits_never_change_a_snapshot(
    damaged: Path, images: Images, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(f"{SEED} {file}")
    path = damaged / "pool" / file
    path.touch()
    content = path.read_bytes()
    kept = {one.name: one.read_bytes() for one in path.parent.iterdir()}
    outcomes = []
    for _ in range(FLIPS if content else 0):
        caplog.clear()  # an error that was logged holds its pool, and that its buffers
        for name, before in kept.items():
            if (path.parent / name).read_bytes() != before:
                (path.parent / name).write_bytes(before)
        bit = rng.randrange(len(content) * 8)
        flip(path, bit)
        try:
            outcomes.append(outcome(damaged, images))
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, {file}, bit {bit}: {error}") from error
    expected: dict[str, Callable[[], bool]] = {
        "index.mdb": lambda: set(outcomes) == {"refused"},
        "index.sums": lambda: set(outcomes) == {"harmless"},
        "store.data": lambda: "noticed" in outcomes and "refused" not in outcomes,
    }
    assert expected.get(file, lambda: True)(), outcomes


@pytest.mark.slow
def test_flips_in_the_index_of_a_killed_server_are_found(
    damaged: Path, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the sums of a clean stop a search may go astray; the check finds it, and so does the repair."""
    rng = random.Random(SEED)
    path = damaged / "pool" / "index.mdb"
    content = path.read_bytes()
    (path.parent / "index.sums").unlink()
    origin = (damaged / "vol.img").read_bytes()
    for _ in range(FLIPS):
        caplog.clear()
        path.write_bytes(content)
        flip(path, bit := rng.randrange(len(content) * 8))
        found = check(damaged)
        if found:
            with OfflinePool(damaged / "pool") as pool:
                repair(pool, plan_repair(pool))
            (path.parent / "index.sums").unlink()
        again = [kind for kind in check(damaged) if kind != "lost"]
        assert not again, f"seed {SEED}, bit {bit}: {found}, then {again}"
        pool_of_copy(damaged, images, f"seed {SEED}, bit {bit}: {found}")
    assert (damaged / "vol.img").read_bytes() == origin


def pool_of_copy(folder: Path, images: Images, what: str) -> None:
    """Verify the snapshots, and leave the pool as it was."""
    kept = {one.name: one.read_bytes() for one in (folder / "pool").iterdir()}
    pool = Pool.open(folder / "pool")
    try:
        verify(pool, images)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
    finally:
        pool.close()
    for path in (folder / "pool").iterdir():
        if path.name not in kept:
            path.unlink()
        elif path.read_bytes() != kept[path.name]:
            path.write_bytes(kept[path.name])
