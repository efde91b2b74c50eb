"""A file system image full of real files: adopted as it is, snapshotted, rewritten over NBD, and proven.

The image comes from this machine's own documentation (or Python's library, where that was left out), so that it has
what real file systems have: small files, large ones, compressed ones, holes, and metadata all over.
"""

from __future__ import annotations

import random
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.conftest import MIB
from tests.support.blocks import write_stamped
from tests.support.clients import qemu_io, read_export, run, sha256_of_export, sha256_of_file
from tests.support.deadline import wait_until
from tests.support.server import Server, Volume

StartServer = Callable[..., Server]

IMAGE_SIZE = 96 * MIB
FILES_LIMIT = 40 * MIB
"""Of the files taken: real, but not the whole of a documentation folder that may be huge."""

REWRITE_SEED = 20061101
UUID = "6e626473-6e61-7000-8000-000000000001"
"""Fixed, so that the image depends on the files alone."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    _copy_some(_real_files(), folder / "files")
    with (folder / "image").open("wb") as file:
        file.truncate(IMAGE_SIZE)
    run("mkfs.ext4", "-q", "-F", "-U", UUID, "-d", folder / "files", folder / "image")
    return folder / "image"


def _real_files() -> Path:
    documentation = Path("/usr/share/doc")
    if sum(1 for _ in documentation.glob("*/*")) > 500:
        return documentation
    return Path(sysconfig.get_path("stdlib"))


def _copy_some(source: Path, target: Path) -> None:
    """Whole folders of ``source``, in order, until there is enough."""
    copied = 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.is_symlink()):
        shutil.copytree(folder, target / folder.name, symlinks=True, ignore_dangling_symlinks=True)
        copied += sum(path.lstat().st_size for path in (target / folder.name).rglob("*") if path.is_file())
        if copied > FILES_LIMIT:
            return


def _rewrite(uri: str, rounds: int) -> None:
    """Writes, zeroes and discards of any size and alignment, all over the volume."""
    generator = random.Random(REWRITE_SEED)
    commands = []
    for number in range(rounds):
        length = generator.choice([1, 512, 4096, 20_000, 65_536, 1_000_000])
        command = generator.choice(
            [f"write -P {number % 255 + 1}", f"write -f -P {number % 255 + 1}", "write -z -u", "discard"]
        )
        commands.append(f"{command} {generator.randrange(IMAGE_SIZE - length)} {length}")
    qemu_io(uri, *commands, "flush")


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_an_adopted_image_and_its_snapshots(
    image: Path, start_server: StartServer, tmp_path: Path, transport: str
) -> None:
    origin = Path(shutil.copy(image, tmp_path / "vol.img"))  # as sparse as the original
    blocks = origin.stat().st_blocks
    original = sha256_of_file(image)
    server = start_server([Volume("vol", origin)])

    # adopted in place: what it was, and as sparse as it was
    assert sha256_of_export(server.uri("vol", transport), tmp_path) == original
    assert origin.stat().st_blocks == blocks

    # rewritten twice, here and there first, then all of it
    server.snapshot("vol@adopted")
    _rewrite(server.uri("vol", transport), rounds=300)
    server.snapshot("vol@rewritten")
    rewritten = sha256_of_file(origin)
    run("nbdcopy", "--flush", write_stamped(tmp_path / "new.img", IMAGE_SIZE, seed=9), server.uri("vol", transport))

    # the first snapshot is the image still, a clean file system with every file in it
    adopted = server.uri("vol@adopted", transport)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", adopted, image)
    copy = read_export(adopted, tmp_path / "copy.img")
    assert sha256_of_file(copy) == original
    run("e2fsck", "-fn", copy)
    assert sha256_of_export(server.uri("vol@rewritten", transport), tmp_path) == rewritten
    live = sha256_of_export(server.uri("vol", transport), tmp_path)
    assert live == sha256_of_file(tmp_path / "new.img") != rewritten != original
    assert server.json("check", "--data")["ok"]

    # flushed and stopped: the raw file is the live volume, byte for byte
    server.stop()
    assert sha256_of_file(origin) == live

    # started again: all three are what they were; with the snapshots gone, so is what they took
    server.start()
    for export, expected in (("vol", live), ("vol@adopted", original), ("vol@rewritten", rewritten)):
        assert sha256_of_export(server.uri(export, transport), tmp_path) == expected, export
    used = allocated_bytes(server.pool)
    assert used > 32 * MIB
    server.cli("snapshot", "delete", "vol@adopted", "vol@rewritten")
    wait_until(lambda: allocated_bytes(server.pool) < used - 32 * MIB, "the preserved chunks' space to be given back")
    assert sha256_of_file(origin) == live


def allocated_bytes(folder: Path) -> int:
    """What ``du`` says."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
