"""Makes the golden pools of the present format: ``python -m tests.golden.make tests/golden/v1.tar.xz``.

Run it when there is a new format version, with a new name, and never again for an old one: what lies in the archive is
what a version that was released wrote.

The archive holds two folders, each with a pool and the file of its volume.  ``clean``: closed in order.  ``killed``:
its process was killed with acknowledged writes in the intent log.  Names, contents, times and the pool's id are always
the same; the volume's file has another inode and time each time, and the index of ``clean`` has noted them.
"""

from __future__ import annotations

import io
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import uuid
from datetime import UTC, datetime
from pathlib import Path

from nbdsnap.engine import files, pool, records
from nbdsnap.engine.pool import Pool, PoolOptions
from tests.support.device import flush, write
from tests.support.held import hold_preserver

CHUNK = 4096
CHUNKS = 64
SIZE = CHUNKS * CHUNK - 700
"""The last chunk is a partial one."""

LOG_SIZE = 64 << 10
ORIGIN = Path("/proc/self/cwd/vol.img")
"""The pool keeps this path: the working folder of whoever opens it."""

VARIANTS = ("clean", "killed")
SNAPSHOTS = ("first", "second", "third")


def block(generation: int, chunk: int) -> bytes:
    """A chunk's content: says what it is, and compresses well."""
    return f"generation {generation} chunk {chunk}\n".encode().ljust(64, b".") * (CHUNK // 64)


def written(generation: int) -> list[int]:
    """The chunks that are written in a generation: before snapshot number ``generation``."""
    return {
        0: [chunk for chunk in range(CHUNKS) if chunk % 4 != 3],
        1: list(range(0, CHUNKS, 3)),
        2: list(range(20)),
        3: [*range(0, CHUNKS, 5), CHUNKS - 1],
        4: [1, 2, 40, 41],
    }[generation]


def image(generation: int) -> bytes:
    """The volume's content when that generation has been written."""
    content = bytearray(CHUNKS * CHUNK)
    for number in range(generation + 1):
        for chunk in written(number):
            content[chunk * CHUNK : (chunk + 1) * CHUNK] = block(number, chunk)
    return bytes(content[:SIZE])


def expected(variant: str) -> dict[str, bytes]:
    """What each export reads as."""
    snapshots = {f"vol@{name}": image(number) for number, name in enumerate(SNAPSHOTS)}
    return {"vol": image(3 if variant == "clean" else 4), **snapshots}


def open_pool() -> Pool:
    return Pool.open(Path("pool"), PoolOptions(log_size=LOG_SIZE), create=True)


def make(variant: str) -> None:
    """Make the pool in the working folder; for ``killed``, end the process."""
    always_the_same()
    opened = open_pool()
    opened.volume_create("vol", ORIGIN, SIZE)
    for generation, name in enumerate(SNAPSHOTS):
        write_generation(opened, generation)
        opened.snapshot_create([f"vol@{name}"])
    write_generation(opened, 3)
    opened.close()
    if variant == "killed":
        opened = open_pool()
        hold_preserver(opened)
        write_generation(opened, 4)
        os._exit(0)


def write_generation(opened: Pool, generation: int) -> None:
    device = opened.open_device("vol")
    for chunk in written(generation):
        offset = chunk * CHUNK
        write(device, offset, block(generation, chunk)[: SIZE - offset])
    flush(device)
    device.close()


def always_the_same() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    for module in (files, pool, records):
        vars(module)["now"] = lambda: moment
    files.uuid.uuid4 = lambda: uuid.UUID(int=1)


def archive(target: Path) -> None:
    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(fileobj=content, mode="w") as tar:
        for variant in VARIANTS:
            folder = Path(scratch, variant)
            folder.mkdir()
            program = f"from tests.golden.make import make; import os; os.chdir({str(folder)!r}); make({variant!r})"
            subprocess.run([sys.executable, "-c", program], check=True)
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.name.endswith("lock"):
                    tar.add(path, path.relative_to(scratch), filter=_plain)
    target.write_bytes(lzma.compress(content.getvalue(), preset=9))


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    info.mode = 0o600
    return info


if __name__ == "__main__":
    archive(Path(sys.argv[1]))
