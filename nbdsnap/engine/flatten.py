"""Freeing a clone from its base: what it still reads from there is copied into slots of its own.

In steps, each a command of the preserver with one transaction, between which everything goes on.  A step changes
nothing that anybody reads: a live chunk without an entry gets one with the base's content, and a record that says *as
in the base* gets that content.  So a step may be done twice, and a flatten that was cut short is simply begun again.

Behind the steps, nothing is read from the base any more but where it holds zeroes: what is written there meanwhile may
leave such records (BASE_SLOT), which then mean zeroes.  The last transaction makes the clone a thin volume; then its
own clones, and theirs, read past it no longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import xxhash

from nbdsnap.engine.redirected import RedirectedVolume
from nbdsnap.errors import DeviceError
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.current import Change
from nbdsnap.store.index import Index, IndexWriter, Record, checksum_seed
from nbdsnap.store.layout import BASE_SLOT, CHUNK, CHUNK_SHIFT, ZERO_SLOT, chunk_count

STEP_CHUNKS = 1024
"""Copied by one command, while other volumes' operations wait: 4 MiB."""

WINDOW = 64 << 20
"""Bytes of volume that one command looks at, at most."""

_ZERO_CHUNK = bytes(CHUNK)

Progress = Callable[[int, int], None]
"""Gets the bytes that are done, and all of them."""


@dataclass
class _Copies:
    """What one step gives a content of its own: live chunks, and records (with the epochs of those before them)."""

    live: list[int] = field(default_factory=list)
    records: list[tuple[Record, int]] = field(default_factory=list)


class Flattening:
    """Of one clone.  All but :meth:`__init__` on the preserver's thread."""

    def __init__(self, index: Index, store: ChunkStore, volume: RedirectedVolume) -> None:
        self._index = index
        self._store = store
        self._volume = volume
        self.position = 0
        """Chunk."""

    @property
    def done_bytes(self) -> int:
        return min(self.position << CHUNK_SHIFT, self._volume.size)

    def step(self) -> bool:
        """Whether there is more to do."""
        end = min(self.position + (WINDOW >> CHUNK_SHIFT), chunk_count(self._volume.size))
        copies, reached = self._plan(end)
        if copies.live or copies.records:
            self._copy(copies)
        self.position = reached
        return reached < chunk_count(self._volume.size)

    def _plan(self, end: int) -> tuple[_Copies, int]:
        """What to copy of the chunks from ``position`` on, and the chunk before which it ends."""
        number, base = self._volume.record.number, self._volume.chunks.base
        first = self.position
        holding: set[int] = set()
        for low, high in base.data_extents(first << CHUNK_SHIFT, (end - first) << CHUNK_SHIFT):
            holding.update(range(low >> CHUNK_SHIFT, chunk_count(high)))
            if len(holding) >= STEP_CHUNKS:
                break
        ordered = sorted(holding)
        if len(ordered) >= STEP_CHUNKS:
            end = ordered[STEP_CHUNKS - 1] + 1
        copies = _Copies()
        with self._index.read() as reader:
            present = {chunk for chunk, _ in reader.current(number).items(first, end)}
            copies.live = [chunk for chunk in ordered if chunk < end and chunk not in present]
            before = Record(-1, 0, 0, 0)
            for record in reader.cursor(number).all(first):
                if record.chunk >= end:
                    break
                if record.slot == BASE_SLOT:
                    copies.records.append((record, before.epoch if before.chunk == record.chunk else 0))
                    if len(copies.records) >= STEP_CHUNKS:
                        end = record.chunk + 1
                before = record
        copies.live = [chunk for chunk in copies.live if chunk < end]
        return copies, end

    def _copy(self, copies: _Copies) -> None:
        volume, number = self._volume, self._volume.record.number
        content = memoryview(bytearray(CHUNK))
        contents: list[bytes] = []
        for chunk in copies.live:
            volume.chunks.base.read(content, chunk << CHUNK_SHIFT, now=False)
            contents.append(bytes(content))
        new: list[Record] = []
        for record, _ in copies.records:
            volume.chunks.base.read(content, record.chunk << CHUNK_SHIFT, now=False)
            seed = checksum_seed(number, record.chunk, record.epoch)
            made = Record(record.chunk, record.epoch, ZERO_SLOT, xxhash.xxh3_64_intdigest(content, seed))
            if content != _ZERO_CHUNK:
                made.slot = 0
                contents.append(bytes(content))
            new.append(made)
        runs = self._store.reserve(len(contents))
        slots = [slot for first, count in runs for slot in range(first, first + count)]
        failed_syncs = self._store.failed_syncs
        changes: list[Change] = list(zip(copies.live, slots, strict=False))
        rest = iter(slots[len(copies.live) :])
        usage: dict[tuple[int, int], int] = {}
        for made, (_, previous) in zip(new, copies.records, strict=True):
            if made.slot != ZERO_SLOT:
                made.slot = next(rest)
                usage[previous, made.epoch] = usage.get((previous, made.epoch), 0) + 1

        def change(txn: IndexWriter) -> None:
            for (old, _), made in zip(copies.records, new, strict=True):
                txn.replace_preserved(number, old, made)
            txn.change_slots(used=slots)
            txn.add_usage(number, usage)
            txn.current(number).change(changes)

        try:
            if contents:
                self._store.write(runs, [b"".join(contents)])
                self._store.sync(failed_syncs)
            self._index.update(change)
        except DeviceError:
            raise  # whether the commit is on disk is not known: its slots stay out of use until the next start
        except BaseException:
            self._store.release(runs)
            raise
        volume.chunks.moved(changes)
