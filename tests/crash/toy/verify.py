"""What a toy store must be after a power cut, given the marks of its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.crash.disk import SECTOR
from tests.crash.explorer import ViolationError
from tests.crash.recording import Recording
from tests.crash.toy.store import CELL, CELLS, ToyStore
from tests.crash.toy.workload import content

Verify = Callable[[Path, int], None]


def make_verify(recording: Recording, bug: str = "") -> Verify:
    def verify(folder: Path, time: int) -> None:
        state = _Expected(recording, time)
        store = ToyStore(folder / "toy", bug)
        try:
            state.check(store)
        finally:
            store.close()

    return verify


class _Expected:
    def __init__(self, recording: Recording, time: int) -> None:
        self.cells: dict[int, list[int]] = {cell: [0] for cell in range(CELLS)}
        """By cell: the writes that it may hold; the first is the last one that is durable."""
        self.surely: set[int] = set()
        self.maybe: set[int] = set()
        self.images: dict[int, bytes] = {}
        written: set[int] = set()
        flushing: dict[int, set[int]] = {}
        for mark in recording.marks:
            fields = mark.fields
            if fields["event"] == "content":
                self.images[fields["snapshot"]] = bytes.fromhex(fields["content"])
            if mark.time >= time:
                continue
            match fields["event"]:
                case "write":
                    self.cells[fields["cell"]].append(fields["number"])
                case "written":
                    written.add(fields["number"])
                case "flush":
                    flushing[fields["writer"]] = set(written)
                case "flushed":
                    self._flushed(flushing.pop(fields["writer"]))
                case "create":
                    self.maybe.add(fields["snapshot"])
                case "created":
                    self.surely.add(fields["snapshot"])
                case "delete":
                    self.surely.discard(fields["snapshot"])
                case "deleted":
                    self.maybe.discard(fields["snapshot"])

    def _flushed(self, writes: set[int]) -> None:
        for numbers in self.cells.values():
            last = max((index for index, number in enumerate(numbers) if number in writes), default=0)
            del numbers[:last]

    def check(self, store: ToyStore) -> None:
        snapshots = set(store.snapshots())
        if not self.surely <= snapshots <= self.maybe:
            raise ViolationError(f"snapshots {snapshots}, expected {self.surely} to {self.maybe}")
        for cell, numbers in self.cells.items():
            data = store.read(cell)
            candidates = [content(number) if number else bytes(CELL) for number in numbers]
            for start in range(0, CELL, SECTOR):  # a write that is not flushed may be torn
                sector = slice(start, start + SECTOR)
                if data[sector] not in [candidate[sector] for candidate in candidates]:
                    raise ViolationError(f"sector {start // SECTOR} of cell {cell} holds none of the writes {numbers}")
        for snapshot in snapshots:
            for cell in range(CELLS):
                if snapshot not in self.images:
                    continue
                if store.snapshot_read(snapshot, cell) != self.images[snapshot][cell * CELL : (cell + 1) * CELL]:
                    raise ViolationError(f"cell {cell} of snapshot {snapshot} has changed")
