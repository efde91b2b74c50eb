"""Damage to a pool with thin volumes and clones: an index that lies is noticed, and a repair keeps what is certain."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from nbdsnap.engine.offline import OfflinePool
from nbdsnap.engine.pool import Pool
from nbdsnap.engine.repair import plan_repair, repair
from nbdsnap.errors import CorruptionError, NbdsnapError
from nbdsnap.store import pagesums
from nbdsnap.store.fileio import FileIO
from tests.support.blocks import stamped
from tests.support.device import flush, read, write
from tests.support.enginepool import make_pool

CHUNK = 4096
PAGE = 4096
SIZE = 4 << 20
CHUNKS = SIZE // CHUNK
SEED = int(os.environ.get("NBDSNAP_SEED", "20261"))
FLIPS = int(os.environ.get("NBDSNAP_FLIPS", "12"))

Images = dict[str, bytes]


def change(pool: Pool, name: str, seed: int, chunks: range) -> None:
    device = pool.open_device(name)
    for chunk in chunks:
        write(device, chunk * CHUNK, stamped(seed, chunk * CHUNK, CHUNK))
    flush(device)
    device.close()


def read_export(pool: Pool, name: str) -> bytes:
    device = pool.open_device(name)
    try:
        return read(device, 0, device.size)
    finally:
        device.close()


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Images]:
    folder = tmp_path_factory.mktemp("redirected")
    pool = make_pool(folder)
    pool.volume_create("thin", size=SIZE, thin=True)
    change(pool, "thin", 1, range(0, CHUNKS, 2))
    pool.snapshot_create(["thin@a"])
    change(pool, "thin", 2, range(0, CHUNKS, 3))
    pool.clone("thin@a", "trial")
    change(pool, "trial", 3, range(0, CHUNKS, 5))
    pool.snapshot_create(["trial@b"])
    change(pool, "trial", 4, range(0, CHUNKS, 7))
    images = {export.name: read_export(pool, export.name) for export in pool.exports()}
    pool.close()
    return folder / "pool", images


@pytest.fixture
def copy(master: tuple[Path, Images], tmp_path: Path) -> Path:
    return Path(shutil.copytree(master[0], tmp_path / "pool"))


def mend(path: Path) -> None:
    with OfflinePool(path) as pool:
        repair(pool, plan_repair(pool))


def assert_true_or_refused(path: Path, images: Images) -> int:
    """Each chunk of each export reads as it was, or not at all.  Returns how many can't be read."""
    refused = 0
    pool = Pool.open(path)
    try:
        for name, image in images.items():
            try:
                device = pool.open_device(name)
            except NbdsnapError:  # without its base, a clone is not served
                refused += CHUNKS
                continue
            for offset in range(0, SIZE, CHUNK):
                try:
                    assert read(device, offset, CHUNK) == image[offset : offset + CHUNK], f"{name} at {offset}"
                except CorruptionError:
                    refused += 1
            device.close()
    finally:
        pool.close()
    return refused


def leaves(path: Path, key: bytes) -> list[int]:
    """Leaf pages that hold several keys which begin so; some of them are not in use any more."""
    content = (path / "index.mdb").read_bytes()
    pages = [content[place : place + PAGE] for place in range(0, len(content), PAGE)]
    return [number for number, page in enumerate(pages) if page[10:12] == b"\x02\x00" and page.count(key) > 2]


def spoil(path: Path, page: int) -> list[str]:
    """Damage that page; what a check says then."""
    with (path / "index.mdb").open("r+b") as file:
        file.seek(page * PAGE + 2048)
        kept = file.read(64)
        file.seek(page * PAGE + 2048)
        file.write(bytes(byte ^ 0xFF for byte in kept))
    with OfflinePool(path) as pool:
        return [problem.detail for problem in pool.check().problems]


def test_a_repair_of_a_sound_pool_does_nothing(copy: Path, master: tuple[Path, Images]) -> None:
    with OfflinePool(copy) as pool:
        assert pool.check(data=True).ok
        assert plan_repair(pool).steps == []
    assert assert_true_or_refused(copy, master[1]) == 0


def test_lost_records_do_not_cost_live_data(copy: Path, master: tuple[Path, Images]) -> None:
    """The whole index is written anew when anything of it is damaged: with everything that could be read."""
    index = copy / "index.mdb"
    (copy / "index.sums").unlink()
    content = bytearray(index.read_bytes())
    place = content.rfind(b'"name":"b"')
    content[place + 8] ^= 1
    index.write_bytes(content)
    pagesums.write_sums(FileIO(), index)
    mend(copy)
    images = {name: image for name, image in master[1].items() if name != "trial@b"}
    assert assert_true_or_refused(copy, images) == 0
    with OfflinePool(copy) as pool:
        assert pool.check(data=True).ok


def test_a_lost_page_of_live_chunks_is_marked(copy: Path, master: tuple[Path, Images]) -> None:
    key = (1).to_bytes(4, "big") + bytes(3)  # what the keys of the first volume's groups begin with
    for page in leaves(copy, key):
        if any("live data of thin" in detail for detail in spoil(copy, page)):
            break
        spoil(copy, page)  # twice is not at all
    else:
        raise AssertionError("no page of live chunks")
    mend(copy)
    refused = assert_true_or_refused(copy, master[1])
    assert 0 < refused <= 4 * CHUNKS
    with OfflinePool(copy) as pool:
        assert {problem.kind for problem in pool.check(data=True).problems} == {"lost"}
    pool = Pool.open(copy)  # what is written over is whole again
    change(pool, "thin", 9, range(CHUNKS))
    assert read_export(pool, "thin") == b"".join(stamped(9, chunk * CHUNK, CHUNK) for chunk in range(CHUNKS))
    pool.close()


@pytest.mark.slow
def test_flipped_bits_never_change_what_is_read(master: tuple[Path, Images], tmp_path: Path) -> None:
    """With the index's checksums, and without them, as after a crash."""
    numbers = random.Random(SEED)
    size = (master[0] / "index.mdb").stat().st_size
    for number in range(FLIPS):
        path = Path(shutil.copytree(master[0], tmp_path / str(number)))
        bit = numbers.randrange(size * 8)
        with (path / "index.mdb").open("r+b") as file:
            file.seek(bit // 8)
            (byte,) = file.read(1)
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
        if number % 2:
            (path / "index.sums").unlink()
        try:
            mend(path)
            assert_true_or_refused(path, master[1])
        except CorruptionError:
            pass  # nothing to go by
        except AssertionError as error:
            raise AssertionError(f"bit {bit}, {number}: {error}") from error
        shutil.rmtree(path)
