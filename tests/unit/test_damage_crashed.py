"""Damage after a crash, when no checksums of a clean stop vouch for the index; and a pool that has lost its store.

The start looks at the index's structure before LMDB does: it refuses what would send a search astray or end the
process, and says so.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from nbdsnap.cli.main import run
from nbdsnap.engine.offline import OfflinePool
from nbdsnap.engine.pool import Pool
from nbdsnap.engine.repair import plan_repair, repair
from nbdsnap.errors import CorruptionError, NbdsnapError
from nbdsnap.store import structure
from nbdsnap.store.fileio import FileIO
from tests.support.blocks import stamped
from tests.support.device import flush, read, write
from tests.support.enginepool import make_pool

CHUNK = PAGE = 4096
CHUNKS = 1024
SIZE = CHUNKS * CHUNK

SEED = int(os.environ.get("NBDSNAP_SEED", "20262"))
FLIPS = int(os.environ.get("NBDSNAP_FLIPS", "25"))
"""Thousands by hand."""

WORKER_TIMEOUT_S = 200.0


def change(pool: Pool, seed: int, chunks: Iterable[int]) -> None:
    device = pool.open_device("vol")
    for chunk in chunks:
        write(device, chunk * CHUNK, stamped(seed, chunk * CHUNK, CHUNK))
    flush(device)
    device.close()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a server that is killed leaves of its pool: a folder, not to be changed."""
    folder = tmp_path_factory.mktemp("killed")
    pool = make_pool(folder, ["vol"], SIZE)
    change(pool, 1, range(0, CHUNKS, 2))
    for number, stride in ((1, 3), (2, 1), (3, 5), (4, 7)):
        pool.snapshot_create([f"vol@s{number}"])
        change(pool, 1 + number, range(0, CHUNKS, stride))
    pool.snapshot_delete(["vol@s2"])
    pool.settle()
    shutil.copytree(folder / "pool", folder / "killed")
    pool.close()
    return folder / "killed"


def copy(killed: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(killed, folder)
    return folder


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def use(folder: Path) -> str:
    """Open the pool and do everything with it."""
    try:
        pool = Pool.open(folder)
    except CorruptionError as error:
        assert error.exit_code == 7 and str(error)
        assert error.advice, error
        return "refused"
    outcome = "opened"
    try:
        for export in [one.name for one in pool.exports() if one.read_only]:
            device = pool.open_device(export)
            for offset in range(0, SIZE, 16 * CHUNK):
                try:
                    read(device, offset, 16 * CHUNK)
                except NbdsnapError:
                    outcome = "error"
            device.close()
        try:
            pool.snapshot_create(["vol@after"])
            change(pool, 9, range(100, 200))
            pool.snapshot_delete([f"vol@{info.name}" for info in pool.snapshot_list()])
        except (OSError, NbdsnapError):
            outcome = "error"
    finally:
        pool.close()
    return outcome


def _flip_and_use(killed: Path, scratch: Path, bits: list[int], note: Path) -> None:
    for bit in bits:
        note.write_text(f"bit {bit}")
        folder = copy(killed, scratch / "pool")
        flip(folder / "index.mdb", bit)
        outcome = use(folder)
        with note.with_suffix(".outcomes").open("a") as file:
            file.write(f"{outcome}\n")


@pytest.mark.slow
def test_a_flipped_bit_never_ends_the_process(killed: Path, tmp_path: Path) -> None:
    """In a process of its own, which may not die, hang or leave an exception behind."""
    rng = random.Random(SEED)
    content = (killed / "index.mdb").read_bytes()
    used = [number for number in range(len(content) // PAGE) if any(content[number * PAGE :][:PAGE])]
    bits = [
        (rng.choice(used) * PAGE + rng.choice((rng.randrange(PAGE), rng.randrange(64)))) * 8 + rng.randrange(8)
        for _ in range(FLIPS)
    ]
    note = tmp_path / "note"
    worker = multiprocessing.get_context("spawn").Process(target=_flip_and_use, args=(killed, tmp_path, bits, note))
    worker.start()
    worker.join(WORKER_TIMEOUT_S)
    hung = worker.is_alive()
    worker.kill()
    worker.join()
    assert not hung and worker.exitcode == 0, f"seed {SEED}, {note.read_text()}: exit {worker.exitcode}"
    outcomes = note.with_suffix(".outcomes").read_text().split()
    assert "refused" in outcomes and "opened" in outcomes


def test_every_page_that_is_lost_is_noticed(killed: Path, tmp_path: Path) -> None:
    """All that the trees reach; the pages that nothing reaches do not matter."""
    io = FileIO()
    whole = (killed / "index.mdb").read_bytes()
    index = tmp_path / "index.mdb"
    refused = set()
    for number in range(len(whole) // PAGE):
        index.write_bytes(whole[: number * PAGE + 10] + b"\xa5" * (PAGE - 10) + whole[(number + 1) * PAGE :])
        try:
            structure.verify(io, index)
        except CorruptionError:
            refused.add(number)
    index.write_bytes(whole)
    structure.verify(io, index)
    assert {0, 1} <= refused and len(refused) > 5


def test_the_server_refuses_a_damaged_index_and_says_what_to_do(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(killed, tmp_path / "pool")
    content = bytearray((folder / "index.mdb").read_bytes())
    for number in range(2, len(content) // PAGE):
        content[number * PAGE + 12 : number * PAGE + 16] = b"\xff\xff\xff\xff"  # where its entries lie
    (folder / "index.mdb").write_bytes(content)
    config = tmp_path / "nbdsnap.toml"
    config.write_text(
        f'[server]\nlisten = ["unix://{tmp_path}/nbd.sock"]\ncontrol = "{tmp_path}/control.sock"\n'
        f'[pool]\npath = "{folder}"\n'
    )
    assert run(["--config", str(config), "serve"]) == 7
    message = capsys.readouterr().err
    assert "is damaged" in message and "nbdsnap check" in message and "Traceback" not in message
    assert run(["--config", str(config), "check"]) == 7
    assert "page" in capsys.readouterr().out


# A store that is not there


def test_a_missing_store_is_found_and_nothing_is_changed(killed: Path, tmp_path: Path) -> None:
    folder = copy(killed, tmp_path / "pool")
    (folder / "store.data").unlink()
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    for data in (False, True):
        with OfflinePool(folder) as pool:
            problems = pool.check(data=data).problems
            assert plan_repair(pool).steps
        kinds = {problem.kind for problem in problems}
        assert kinds == ({"store", "checksum"} if data else {"store"})
    after = {one.name: one.read_bytes() for one in folder.iterdir()}
    after["lock"] = before["lock"]  # the pid of who looked last
    assert after == before
    with pytest.raises(CorruptionError, match="missing") as refused:
        Pool.open(folder)
    assert "repair" in refused.value.advice
    assert not (folder / "store.data").exists()


def test_a_pool_goes_on_without_its_store_after_a_repair(killed: Path, tmp_path: Path) -> None:
    folder = copy(killed, tmp_path / "pool")
    (folder / "store.data").unlink()
    with OfflinePool(folder) as offline:
        repair(offline, plan_repair(offline))
    pool = Pool.open(folder)
    try:
        assert {problem.kind for problem in pool.check(data=True).problems} == {"lost"}
        device = pool.open_device("vol@s4")
        with pytest.raises(CorruptionError, match="lost"):
            read(device, 0, CHUNK)
        assert read(device, CHUNK, CHUNK) == stamped(3, CHUNK, CHUNK)  # in the origin still
        device.close()
    finally:
        pool.close()


def test_a_store_that_is_cut_short_is_found(killed: Path, tmp_path: Path) -> None:
    folder = copy(killed, tmp_path / "pool")
    os.truncate(folder / "store.data", 100 * CHUNK)
    with OfflinePool(folder) as pool:
        assert {problem.kind for problem in pool.check().problems} == {"slot"}
