"""The traced program: two writers and snapshots on a toy store, with marks of what they were told."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

from tests.crash.marks import Marks
from tests.crash.toy.store import CELL, CELLS, ToyStore

WRITERS = 2


def content(number: int) -> bytes:
    """What write ``number`` wrote."""
    return random.Random(number).randbytes(CELL)


def _writer(store: ToyStore, marks: Marks, writer: int, seed: int, writes: int) -> None:
    rng = random.Random(seed << 8 | writer)
    for count in range(writes):
        number = count * WRITERS + writer + 1
        cell = rng.randrange(CELLS // WRITERS) * WRITERS + writer
        marks.mark(event="write", number=number, cell=cell)
        store.write(cell, content(number))
        marks.mark(event="written", number=number)
        if rng.random() < 0.3:
            marks.mark(event="flush", writer=writer)
            store.flush(lambda: marks.mark(event="flushed", writer=writer))


def _snapshots(store: ToyStore, marks: Marks, seed: int, count: int) -> None:
    rng = random.Random(seed)
    live: list[int] = []
    for number in range(1, count + 1):
        marks.mark(event="create", snapshot=number)
        store.snapshot_create(number)
        marks.mark(event="created", snapshot=number)
        live.append(number)
        image = b"".join(store.snapshot_read(number, cell) for cell in range(CELLS))
        marks.mark(event="content", snapshot=number, content=image.hex())
        if len(live) > 2:
            victim = live.pop(rng.randrange(len(live)))
            marks.mark(event="delete", snapshot=victim)
            store.snapshot_delete(victim)
            marks.mark(event="deleted", snapshot=victim)


def main(folder: str, seed: str, bug: str) -> None:
    marks = Marks()
    marks.mark(event="open")
    store = ToyStore(Path(folder), bug, marks.site)
    marks.mark(event="opened")
    threads = [
        threading.Thread(target=_writer, args=(store, marks, writer, int(seed), 30), name=f"writer {writer}")
        for writer in range(WRITERS)
    ]
    threads.append(threading.Thread(target=_snapshots, args=(store, marks, int(seed), 8), name="snapshots"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
