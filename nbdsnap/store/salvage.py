"""The index's tables, as far as a damaged file still holds them.

What :class:`~nbdsnap.store.index.IndexReader` reads through LMDB, this reads from the pages themselves
(:mod:`nbdsnap.store.pages`).  What can't be read, or is no entry of its table, is left out, and told as
:class:`Damage`: which table, and which volumes and chunks are concerned.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdsnap.errors import CorruptionError
from nbdsnap.store import chunkset
from nbdsnap.store.current import COUNT, CURRENT_KEY, GROUP, GROUP_SHIFT, LIVE_KEY, decode_group, unpack_key
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.index import (
    CHANGED_KEY,
    ITEM,
    LATER_TABLES,
    SNAPSHOT_KEY,
    TABLES,
    USAGE_KEY,
    JsonObject,
    Record,
    decode_record,
    unpack_item,
)
from nbdsnap.store.layout import BLOCK_SHIFT
from nbdsnap.store.pages import Entry, Gap, PageFile

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


@dataclass(frozen=True)
class Damage:
    """Entries of ``table`` that can't be read: of ``volume`` (None: perhaps of any), for the chunks [first, end)
    (``end`` None: to its last one)."""

    table: str
    why: str
    volume: int | None = None
    first: int = 0
    end: int | None = None


class Salvage:
    """Reads the index at ``path``, which no process has open and which may be damaged.

    ``damaged``: numbers of pages that are known to be.  Raises CorruptionError where no table can be found at all.
    """

    def __init__(self, io: FileIO, path: Path, damaged: Collection[int] = ()) -> None:
        self._pages = PageFile(io, path, damaged)
        self.damaged_pages = len(damaged)
        """Known to be: not all of them need be in use."""
        self.damage: dict[Damage, None] = {}
        """What was found so far, in order."""
        for gap in self._pages.gaps:
            self._add(Damage("all tables", _of_page(gap)))

    def close(self) -> None:
        self._pages.close()

    def is_damaged(self, table: str, volume: int) -> bool:
        """Whether entries of that volume may be missing from the table, as far as it was read."""
        return any(one.table == table and one.volume in (None, volume) for one in self.damage)

    def read_all(self) -> None:
        """Find all damage."""
        for table in TABLES:
            for _ in self._entries(table):
                pass

    def meta(self) -> JsonObject | None:
        for entry in self._entries("meta"):
            if entry.key == b"pool":
                return self._decoded("meta", "the pool's record", _decoder(entry, "the pool"))
        return None

    def volumes(self) -> Iterator[tuple[int, JsonObject]]:
        for entry in self._entries("volumes"):
            if len(entry.key) == _U32.size:
                (number,) = _U32.unpack(entry.key)
                what = f"volume number {number}"
                value = self._decoded("volumes", f"the record of {what}", _decoder(entry, what), number)
                if value is not None:
                    yield number, value

    def snapshots(self) -> Iterator[tuple[int, int, JsonObject]]:
        for entry in self._entries("snapshots"):
            if len(entry.key) == SNAPSHOT_KEY.size:
                number, epoch = SNAPSHOT_KEY.unpack(entry.key)
                what = f"snapshot number {epoch} of volume number {number}"
                value = self._decoded("snapshots", f"the record of {what}", _decoder(entry, what), number)
                if value is not None:
                    yield number, epoch, value

    def numbers(self) -> set[int]:
        """Of the volumes that have preserved chunks, or live ones in the store."""
        found = {_U32.unpack(key)[0] for key in self._pages.keys("preserved") if len(key) == _U32.size}
        live = self._pages.keys("current") if "current" in self._pages.tables() else []
        return found | {unpack_key(key)[0] for key in live if len(key) == CURRENT_KEY.size}

    def records(self, volume: int) -> Iterator[Record]:
        for entry in self._entries("preserved", _U32.pack(volume)):
            if len(entry.value) == ITEM.size:
                yield unpack_item(entry.value)
            else:
                self._add(Damage("preserved", f"a record of {len(entry.value)} bytes", volume))

    def changed(
        self, volume: int, first_epoch: int = 0, end_epoch: int = 1 << 32, first_block: int = 0
    ) -> Iterator[tuple[int, int, int]]:
        """``(epoch, block, set)`` of the volume from (first_epoch, first_block) to before ``end_epoch``."""
        for entry in self._entries("changed"):
            if len(entry.key) != CHANGED_KEY.size:
                continue
            number, epoch, block = CHANGED_KEY.unpack(entry.key)
            if number != volume or not (first_epoch, first_block) <= (epoch, block) < (end_epoch, 0):
                continue
            members = self._set("changed", entry, volume)
            if members is not None:
                yield epoch, block, members

    def slots(self) -> Iterator[tuple[int, int]]:
        for entry in self._entries("slots"):
            members = self._set("slots", entry, None)
            if members is not None and len(entry.key) == _U32.size:
                yield _U32.unpack(entry.key)[0], members

    def usage(self, volume: int) -> Iterator[tuple[int, int, int]]:
        for entry in self._entries("usage"):
            if len(entry.key) == USAGE_KEY.size and len(entry.value) == _U64.size:
                number, previous, epoch = USAGE_KEY.unpack(entry.key)
                if number == volume:
                    yield previous, epoch, _U64.unpack(entry.value)[0]

    def current_items(self, volume: int) -> Iterator[tuple[int, int]]:
        """``(chunk, slot)`` of the volume's live chunks."""
        for entry in self._entries("current"):
            if len(entry.key) != CURRENT_KEY.size or unpack_key(entry.key)[0] != volume:
                continue
            try:
                yield from decode_group(entry.key, entry.value)
            except ValueError as error:
                first = unpack_key(entry.key)[1] << GROUP_SHIFT
                self._add(Damage("current", str(error), volume, first, first + GROUP))

    def live_slots(self, volume: int) -> int:
        for entry in self._entries("live"):
            if entry.key == LIVE_KEY.pack(volume) and len(entry.value) == COUNT.size:
                return int(COUNT.unpack(entry.value)[0])
        return 0

    # Entries and what is none

    def _entries(self, table: str, key: bytes | None = None) -> Iterator[Entry]:
        if table in LATER_TABLES and table not in self._pages.tables():
            return  # as the format's first version left it
        for found in self._pages.read(table, key):
            if isinstance(found, Entry):
                yield found
            else:
                for damage in _damages(table, found):
                    self._add(damage)

    def _decoded(
        self, table: str, what: str, decode: Callable[[], JsonObject], volume: int | None = None
    ) -> JsonObject | None:
        try:
            return decode()
        except (CorruptionError, ValueError):
            self._add(Damage(table, f"{what} does not match its checksum", volume))
            return None

    def _set(self, table: str, entry: Entry, volume: int | None) -> int | None:
        try:
            return chunkset.decode(entry.value)
        except ValueError as error:
            self._add(Damage(table, str(error), volume))
            return None

    def _add(self, damage: Damage) -> None:
        self.damage[damage] = None


def _decoder(entry: Entry, what: str) -> Callable[[], JsonObject]:
    return lambda: decode_record(entry.key, entry.value, what)


def _damages(table: str, gap: Gap) -> Iterator[Damage]:
    """Whose entries the gap may have held."""
    low, high = (
        unpack_key(key) if key is not None and len(key) == CURRENT_KEY.size else None for key in (gap.low, gap.high)
    )
    if table != "current" or low is None or high is None:
        yield _damage(table, gap)
        return
    for volume in range(low[0], high[0] + 1):
        first = low[1] << GROUP_SHIFT if volume == low[0] else 0
        end = high[1] << GROUP_SHIFT if volume == high[0] else None
        yield Damage(table, _of_page(gap), volume, first, end)


def _damage(table: str, gap: Gap) -> Damage:
    if table == "preserved" and gap.key is not None and len(gap.key) == _U32.size:
        first, end = _chunk(gap.low), None if gap.high is None else (_chunk(gap.high) or 0) + 1
        return Damage(table, _of_page(gap), _U32.unpack(gap.key)[0], first or 0, end)
    if table in ("changed", "snapshots", "usage", "preserved"):
        low, high = _number(gap.low), _number(gap.high)
        if low is not None and low == high:
            return Damage(table, _of_page(gap), low)
    return Damage(table, _of_page(gap))


def _of_page(gap: Gap) -> str:
    return f"page {gap.page} of the index is damaged: {gap.why}" if gap.page else gap.why


def _number(key: bytes | None) -> int | None:
    return None if key is None or len(key) < _U32.size else int(_U32.unpack(key[: _U32.size])[0])


def _chunk(item: bytes | None) -> int | None:
    return None if item is None or len(item) < 5 else int.from_bytes(item[:5], "big")


def chunks_of_block(block: int, members: int) -> Iterator[int]:
    """The chunk numbers of a set of ``changed``."""
    return ((block << BLOCK_SHIFT) + number for number in chunkset.iterate(members))
