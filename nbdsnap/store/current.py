"""The table ``current``: where the live chunks of a volume whose data is in the store lie.

One entry holds a *group* of GROUP chunks: a neighbourhood is read with one seek, a lonely chunk takes some 30 bytes,
and a full group 5 bytes a chunk.  All integers big-endian::

    key     u32 volume   u40 group
    value   u32 checksum   u64 members   u40[n] slots

* Bit ``i`` of ``members`` is set where chunk ``group * GROUP + i`` has an entry; ``slots`` are theirs, ascending by
  chunk.  A chunk without an entry is what the volume's base says: zeroes, or a snapshot's content.
* A slot is one of the store's, ZERO_SLOT (zeroes, whatever the base says) or LOST_SLOT (lost, and marked by a repair).
* The checksum is XXH3-64's lower half, of the key and all that follows it.

The table ``live`` counts, by volume, the entries with a slot of the store: u32 volume -> u64 slots.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import xxhash

from nbdsnap.errors import CorruptionError
from nbdsnap.store.layout import MAX_CHUNKS, MAX_SLOTS

if TYPE_CHECKING:
    import lmdb

GROUP_SHIFT = 6
GROUP = 1 << GROUP_SHIFT
"""Chunks in one entry: 256 KiB of volume, what one long read or write touches."""

CURRENT_KEY = struct.Struct(">IBI")
LIVE_KEY = struct.Struct(">I")
COUNT = struct.Struct(">Q")

_HEADER = struct.Struct(">IQ")
_SLOT_BYTES = 5
_LOW32 = (1 << 32) - 1

Change = tuple[int, int | None]
"""``(chunk, slot)``; None takes the chunk's entry away."""


def current_key(volume: int, group: int) -> bytes:
    return CURRENT_KEY.pack(volume, group >> 32, group & _LOW32)


def unpack_key(key: bytes | memoryview) -> tuple[int, int]:
    """``(volume, group)``."""
    volume, high, low = CURRENT_KEY.unpack(key)
    return volume, high << 32 | low


def _checksum(key: bytes, content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content, xxhash.xxh3_64_intdigest(key)) & _LOW32


def _seal(key: bytes, members: int, slots: bytes) -> bytes:
    content = COUNT.pack(members) + slots
    return struct.pack(">I", _checksum(key, content)) + content


def _open(key: bytes, stored: bytes) -> tuple[int, bytes]:
    """``(members, slots)``; ValueError where the entry is damaged."""
    if len(stored) < _HEADER.size:
        raise ValueError(f"an entry of {len(stored)} bytes")
    checksum, members = _HEADER.unpack_from(stored)
    slots = stored[_HEADER.size :]
    if len(slots) != members.bit_count() * _SLOT_BYTES or checksum != _checksum(key, stored[4:]):
        raise ValueError("an entry does not match its checksum")
    return members, slots


def decode_group(key: bytes, stored: bytes, first: int = 0, end: int = MAX_CHUNKS) -> list[tuple[int, int]]:
    """``(chunk, slot)`` of an entry's chunks in [first, end), ascending; ValueError where the entry is damaged."""
    members, slots = _open(key, stored)
    base = unpack_key(key)[1] << GROUP_SHIFT
    low, high = max(first - base, 0), min(end - base, GROUP)
    position = (members & ((1 << low) - 1)).bit_count() * _SLOT_BYTES
    wanted = members & ((1 << high) - (1 << low))
    found: list[tuple[int, int]] = []
    decode = int.from_bytes
    while wanted:
        lowest = wanted & -wanted
        found.append((base + lowest.bit_length() - 1, decode(slots[position : position + _SLOT_BYTES], "big")))
        position += _SLOT_BYTES
        wanted ^= lowest
    return found


class CurrentTable:
    """The entries of one volume, in a transaction.  Changing them needs one that writes."""

    def __init__(self, txn: lmdb.Transaction, tables: dict[str, Any], volume: int) -> None:
        self._txn = txn
        self._entries = tables["current"]
        self._live = tables["live"]
        self._volume = volume

    # Reading

    def items(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """``(chunk, slot)`` of the chunks [first, end) that have an entry, ascending."""
        for group, stored in self._groups(first >> GROUP_SHIFT, (end + GROUP - 1) >> GROUP_SHIFT):
            try:
                yield from decode_group(current_key(self._volume, group), stored, first, end)
            except ValueError as error:
                raise _damaged(error) from None

    def members(self, first_group: int, end_group: int) -> Iterator[tuple[int, int]]:
        """``(group, members)`` of the groups that have an entry, ascending."""
        for group, stored in self._groups(first_group, end_group):
            yield group, _open_checked(current_key(self._volume, group), stored)[0]

    def _groups(self, first: int, end: int) -> Iterator[tuple[int, bytes]]:
        if end - first == 1:
            stored = self._txn.get(current_key(self._volume, first), db=self._entries)
            if stored is not None:
                yield first, bytes(stored)
            return
        cursor = self._txn.cursor(self._entries)
        found = cursor.set_range(current_key(self._volume, first))
        while found:
            volume, group = unpack_key(cursor.key())
            if volume != self._volume or group >= end:
                return
            yield group, bytes(cursor.value())
            found = cursor.next()

    def live_slots(self) -> int:
        """How many slots of the store the volume's live data takes."""
        stored = self._txn.get(LIVE_KEY.pack(self._volume), db=self._live)
        return 0 if stored is None else int(COUNT.unpack(stored)[0])

    # Changing

    def change(self, changes: Iterable[Change]) -> None:
        """Put, replace and take away entries; each chunk at most once."""
        by_group: dict[int, list[Change]] = {}
        for change in changes:
            by_group.setdefault(change[0] >> GROUP_SHIFT, []).append(change)
        added = sum(self._change_group(group, of_group) for group, of_group in by_group.items())
        self._add_live(added)

    def _change_group(self, group: int, changes: list[Change]) -> int:
        """Returns by how much the number of slots grows."""
        key = current_key(self._volume, group)
        stored = self._txn.get(key, db=self._entries)
        members, content = (0, b"") if stored is None else _open_checked(key, bytes(stored))
        slots = bytearray(content)
        added = 0
        for chunk, slot in changes:
            bit = 1 << (chunk & (GROUP - 1))
            place = (members & (bit - 1)).bit_count() * _SLOT_BYTES
            if members & bit:
                added -= int.from_bytes(slots[place : place + _SLOT_BYTES], "big") < MAX_SLOTS
                if slot is None:
                    del slots[place : place + _SLOT_BYTES]
                    members ^= bit
                else:
                    slots[place : place + _SLOT_BYTES] = slot.to_bytes(_SLOT_BYTES, "big")
            elif slot is not None:
                slots[place:place] = slot.to_bytes(_SLOT_BYTES, "big")
                members |= bit
            added += slot is not None and slot < MAX_SLOTS
        if members:
            self._txn.put(key, _seal(key, members, bytes(slots)), db=self._entries)
        elif stored is not None:
            self._txn.delete(key, db=self._entries)
        return added

    def _add_live(self, added: int) -> None:
        if not added:
            return
        count = self.live_slots() + added
        if count < 0:
            raise CorruptionError("the index counts fewer live slots than it holds", hint="run: nbdsnap check")
        key = LIVE_KEY.pack(self._volume)
        if count:
            self._txn.put(key, COUNT.pack(count), db=self._live)
        else:
            self._txn.delete(key, db=self._live)


def _open_checked(key: bytes, stored: bytes) -> tuple[int, bytes]:
    try:
        return _open(key, stored)
    except ValueError as error:
        raise _damaged(error) from None


def _damaged(error: ValueError) -> CorruptionError:
    return CorruptionError(f"the index's table current is damaged: {error}", hint="run: nbdsnap check")
