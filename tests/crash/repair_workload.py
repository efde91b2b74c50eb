"""A pool that is damaged, and the traced program that repairs it: ``check --repair`` may be cut short, too.

``build`` makes the pool in the working folder and damages it, as the seed says: a preserved chunk, a page of the index,
or a record of the intent log.  ``repair`` is what the command does.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from pathlib import Path

from nbdsnap.engine.offline import OfflinePool
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.engine.repair import plan_repair, repair
from nbdsnap.store.intentlog import PAGE as LOG_HEADER
from nbdsnap.store.pages import PAGE
from tests.crash.marks import Marks
from tests.crash.pool_workload import LOG_SIZE, WORKING_FOLDER, adapt_engine, name_syncs
from tests.support.device import flush, write
from tests.support.history import content

CHUNK = 4096
CHUNKS = 200
SIZE = CHUNKS * CHUNK

KINDS = ("chunk", "page", "log")
DAMAGED = {"chunk": "index.mdb", "page": "index.mdb", "log": "intent.log"}
"""The file that a repair sets aside."""


def kind(seed: int) -> str:
    return KINDS[seed % len(KINDS)]


def build(seed: int) -> None:
    rng = random.Random(seed)
    adapt_engine()
    Path("vol.img").write_bytes(content(seed, 0, SIZE))
    pool = Pool.open(Path("pool"), PoolOptions(log_size=LOG_SIZE), create=True)
    pool.volume_create("vol", Path(WORKING_FOLDER) / "vol.img")
    device = pool.open_device("vol")
    for number in range(1, 4):
        pool.snapshot_create([f"vol@s{number}"])
        for chunk in rng.sample(range(CHUNKS), CHUNKS // 3):
            write(device, chunk * CHUNK, content(seed, number, CHUNK))
        flush(device)
    if kind(seed) == "log":
        pool.snapshot_create(["vol@s4"])
        for chunk in rng.sample(range(CHUNKS), 12):
            assert device.write_now(chunk * CHUNK, memoryview(content(seed, 9, CHUNK)))
        _damage_log(Path("pool/intent.log"), 3 + rng.randrange(6))
        os._exit(0)
    device.close()
    pool.close()
    if kind(seed) == "page":
        _damage_page(rng)
    else:
        _damage_chunks(rng)


def _damage_log(path: Path, number: int) -> None:
    """The record ``number`` of those that were appended last, where they still lie one behind the other."""
    stored = path.read_bytes()
    magic = stored[LOG_HEADER : LOG_HEADER + 4]
    places = [place for place in range(LOG_HEADER, len(stored), 8) if stored[place : place + 4] == magic]
    place = places[-number] + 100
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(64))


def _damage_page(rng: random.Random) -> None:
    path = Path("pool/index.mdb")
    stored = bytearray(path.read_bytes())
    number = rng.choice([number for number in range(2, len(stored) // PAGE) if any(stored[number * PAGE :][:PAGE])])
    stored[number * PAGE + 40 : number * PAGE + 80] = b"\xa5" * 40
    path.write_bytes(stored)


def _damage_chunks(rng: random.Random) -> None:
    path = Path("pool/store.data")
    stored = bytearray(path.read_bytes())
    for slot in rng.sample([slot for slot in range(len(stored) // CHUNK) if any(stored[slot * CHUNK :][:CHUNK])], 3):
        stored[slot * CHUNK + 7] ^= 1
    path.write_bytes(stored)


def mend() -> None:
    marks = Marks()
    name_syncs(marks)
    with OfflinePool(Path("pool")) as pool:
        repair(pool, plan_repair(pool))
    marks.mark(event="repaired")


if __name__ == "__main__":
    what, seed_text = itertools.islice(sys.argv, 1, 3)
    if what == "build":
        build(int(seed_text))
    else:
        mend()
