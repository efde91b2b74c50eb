"""Sets of chunk (or slot) numbers inside one block of BLOCK numbers, as Python integers and as stored bytes.

In memory a set is an int: bit ``i`` is number ``i`` of the block.  Union, difference and count are then one operation
each in C.  Stored, the shorter of two forms is taken:

* sparse: two bytes, big-endian, per member, each once, in any order; at most SPARSE_MAX members;
* dense: BLOCK / 8 bytes, little-endian, bit ``i`` of the whole is member ``i``.

The length tells them apart: a sparse set is always shorter than BLOCK / 8 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from nbdsnap.store.layout import BLOCK

DENSE_BYTES = BLOCK // 8
SPARSE_MAX = DENSE_BYTES // 2 - 1

FULL = (1 << BLOCK) - 1


def encode(members: int) -> bytes:
    """The stored form of a set."""
    count = members.bit_count()
    if count > SPARSE_MAX:
        return members.to_bytes(DENSE_BYTES, "little")
    return struct.pack(f">{count}H", *iterate(members))


def decode(stored: bytes) -> int:
    """The set of a stored form; ValueError where it is none."""
    if len(stored) == DENSE_BYTES:
        return int.from_bytes(stored, "little")
    if len(stored) % 2 or len(stored) > DENSE_BYTES:
        raise ValueError(f"a set of {len(stored)} bytes")
    return from_iterable(struct.unpack(f">{len(stored) // 2}H", stored))


def from_iterable(numbers: Iterable[int]) -> int:
    """The set of ``numbers``, each below BLOCK; ValueError where one is not."""
    table = bytearray(DENSE_BYTES)
    try:
        for number in numbers:
            table[number >> 3] |= 1 << (number & 7)
    except IndexError:
        raise ValueError("a number beyond its block") from None
    return int.from_bytes(table, "little")


def span(first: int, end: int) -> int:
    """The set of all numbers in [first, end)."""
    return (1 << end) - (1 << first)


def add(stored: bytes, numbers: list[int]) -> bytes:
    """The stored form with ``numbers``, none of which is a member yet.  A sparse set is only appended to."""
    if len(stored) + 2 * len(numbers) < DENSE_BYTES:
        return stored + struct.pack(f">{len(numbers)}H", *numbers)
    return encode(decode(stored) | from_iterable(numbers))


def iterate(members: int) -> Iterator[int]:
    """The members, ascending."""
    for first, end in runs(members):
        yield from range(first, end)


def runs(members: int) -> Iterator[tuple[int, int]]:
    """The maximal runs of members as half-open ranges, ascending."""
    bits = bin(members)[:1:-1]  # as text, lowest first: finding the next bit is then one call in C
    first = bits.find("1")
    while first >= 0:
        end = bits.find("0", first)
        if end < 0:
            end = len(bits)
        yield first, end
        first = bits.find("1", end)
