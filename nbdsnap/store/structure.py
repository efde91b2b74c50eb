"""Is the index's tree sound?  For the start after a crash, when there are no checksums of its pages.

LMDB trusts its file: from a damaged page it may read beyond the file, which ends the process, or search in the wrong
place, so that a snapshot gives other data without notice, or take a page that is in use for a free one.  So when
nothing else vouches for the file (:mod:`nbdsnap.store.pagesums`), this looks at every page that LMDB could come to,
before LMDB does:

* each page that the trees reach lies in the file, is what its parent takes it for, and is reached once;
* all keys are in order, inside what the branches above them say, and as long as their table's are;
* each tree holds as many entries as it should; each table is one of ours;
* no free page is in use.

What is in the values is not looked at: records and preserved chunks have checksums of their own, and the rest is what
``nbdsnap check`` compares.  The format is described in :mod:`nbdsnap.store.pages`, which reads what can still be read
of a damaged file, and says what that affects; this one only finds out whether there is damage, at a tenth of the cost:
0.4 s per million preserved chunks.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

from nbdsnap.errors import CorruptionError
from nbdsnap.store.current import CURRENT_KEY, LIVE_KEY
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.index import CHANGED_KEY, ITEM, SNAPSHOT_KEY, TABLES, USAGE_KEY

PAGE = 4096
NO_PAGE = (1 << 64) - 1
MAX_DEPTH = 32

KEY_SIZES = {
    "volumes": 4,
    "snapshots": SNAPSHOT_KEY.size,
    "preserved": 4,
    "changed": CHANGED_KEY.size,
    "slots": 4,
    "usage": USAGE_KEY.size,
    "current": CURRENT_KEY.size,
    "live": LIVE_KEY.size,
}
"""Bytes; the keys of other tables are of any length."""

VALUE_SIZES = {"usage": 8, "live": 8}
DUPLICATES = {"preserved": ITEM.size}
"""Tables whose values are sorted items, and their size."""

_MAGIC = 0xBEEFC0DE
_HEADER = struct.Struct("<QHHHH")
_META = struct.Struct("<IIQQ48s48sQQ")
_TREE = struct.Struct("<IHHQQQQQ")
_NODE = struct.Struct("<HHHH")
_U64 = struct.Struct("<Q")
_HEADER_BYTES = _HEADER.size
_NODE_BYTES = _NODE.size

_BRANCH, _LEAF, _OVERFLOW, _LEAF2 = 0x01, 0x02, 0x04, 0x20
_BIG, _SUBTREE, _DUPLICATES = 0x01, 0x02, 0x04

Key = bytes | int
"""Of the free list, a number."""


class _DamageError(Exception):
    """Page, and what is wrong with it."""


class _Tree(NamedTuple):
    item_size: int
    entries: int
    root: int


class _Table(NamedTuple):
    """What a tree's leaves must hold."""

    name: str
    key_size: int | None = None
    value_size: int | None = None
    item_size: int = 0
    """Of the items, where the values are sorted items."""
    numbers: bool = False
    """The keys are numbers in the machine's order of bytes."""
    of_trees: bool = False
    items_only: bool = False
    """A tree of items of this size, which are its keys."""

    @property
    def is_plain(self) -> bool:
        """Keys of one length, and values of which nothing is known."""
        return not (self.key_size is None or self.item_size or self.numbers or self.of_trees or self.value_size)


def verify(io: FileIO, path: Path) -> None:
    """Raise CorruptionError where the index at ``path`` is not sound.  No process has it open."""
    fd = io.open(path, os.O_RDONLY)
    try:
        if not io.size(fd):
            raise _damaged(path, "it is empty")
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as content:
            _Walk(content).all()
    except _DamageError as error:
        raise _damaged(path, str(error)) from None
    finally:
        io.close(fd)


def _damaged(path: Path, why: str) -> CorruptionError:
    return CorruptionError(
        f"the index {path} is damaged: {why}",
        hint="`nbdsnap check` says what that affects; the live data is in the origin files, unharmed",
    )


class _Walk:
    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._free, self._main, self._last = self._newest_meta()
        self._used = bytearray(self._last + 1)
        self._used[0] = self._used[1] = 1
        self._count = 0
        """Entries of the tree that is being walked."""
        self._found: list[tuple[bytes, bytes]] = []
        """Keys and values of the tree of trees, or of the free list."""

    def all(self) -> None:
        for name, stored in self._tree(self._main, _Table("of tables", value_size=_TREE.size, of_trees=True)):
            text = name.decode(errors="replace")
            if text not in TABLES:
                raise _DamageError(f"there is a table {text!r}, which is none of nbdsnap's")
            size = KEY_SIZES.get(text)
            self._tree(_parse_tree(stored), _Table(text, size, VALUE_SIZES.get(text), DUPLICATES.get(text, 0)))
        lists = self._tree(self._free, _Table("of free pages", _U64.size, numbers=True))
        for _, stored in lists:
            self._check_free(stored)

    def _newest_meta(self) -> tuple[_Tree, _Tree, int]:
        found: list[tuple[int, bytes, bytes, int]] = []
        for number in (0, 1):
            stored = self._content[number * PAGE + _HEADER_BYTES : number * PAGE + _HEADER_BYTES + _META.size]
            if len(stored) < _META.size:
                raise _DamageError("it is cut short")
            magic, version, _, _, free, main, last, transaction = _META.unpack(stored)
            if magic != _MAGIC or version != 1:
                raise _DamageError(f"page {number} is no root page of LMDB's")
            found.append((transaction, free, main, last))
        _, free, main, last = max(found, key=lambda one: one[0])
        if not 1 <= last < 1 << 48:
            raise _DamageError("its root page gives a wrong size")
        return _parse_tree(free), _parse_tree(main), min(last, max(len(self._content) // PAGE - 1, 1))

    def _tree(self, tree: _Tree, table: _Table) -> list[tuple[bytes, bytes]]:
        """Check one tree.  Returns the entries, where they are trees or lists of free pages."""
        outer, self._count = self._count, 0
        kept, self._found = self._found, []
        if tree.root != NO_PAGE:
            self._page(tree.root, None, None, table, 0)
        if self._count != tree.entries:
            raise _DamageError(f"the table {table.name} holds {self._count} entries, and should hold {tree.entries}")
        found, self._found, self._count = self._found, kept, outer
        return found

    def _page(self, number: int, low: Key | None, high: Key | None, table: _Table, depth: int) -> None:
        """Check a page and all below it; its keys must be in [low, high)."""
        page = self._take(number, depth)
        found, size, flags, lower, _ = _HEADER.unpack_from(page)
        if found != number:
            raise _DamageError(f"page {number} is another one")
        if flags == _LEAF | _LEAF2 and table.items_only:
            keys = _items(number, page, size, lower, table.item_size)
            self._count += len(keys)
            _check_keys(number, keys, low, high)
        elif flags == _LEAF and not table.items_only:
            self._leaf(number, page, low, high, table)
        elif flags == _BRANCH:
            self._branch(number, page, low, high, table, depth)
        else:
            raise _DamageError(f"page {number} is none of the table {table.name}")

    def _take(self, number: int, depth: int) -> bytes:
        if not 1 < number <= self._last or depth > MAX_DEPTH:
            raise _DamageError(f"page {number} lies beyond its end")
        if self._used[number]:
            raise _DamageError(f"page {number} is used twice")
        self._used[number] = 1
        return self._content[number * PAGE : (number + 1) * PAGE]

    def _branch(self, number: int, page: bytes, low: Key | None, high: Key | None, table: _Table, depth: int) -> None:
        keys: list[Key] = []
        children: list[int] = []
        for place in _places(number, page):
            first, second, third, key_size = _NODE.unpack_from(page, place)
            children.append(first | second << 16 | third << 32)
            start = place + _NODE_BYTES
            if start + key_size > PAGE:
                raise _DamageError(f"page {number}: a key is too long")
            keys.append(_key(page[start : start + key_size], table) if len(children) > 1 else b"")
        if not children:
            raise _DamageError(f"page {number} is empty")
        _check_keys(number, keys[1:], low, high)
        borders = [low, *keys[1:], high]
        for position, child in enumerate(children):
            self._page(child, borders[position], borders[position + 1], table, depth + 1)

    def _leaf(self, number: int, page: bytes, low: Key | None, high: Key | None, table: _Table) -> None:
        places = _places(number, page)
        if table.is_plain and _plain_entries(page, places, table.key_size):
            start, end = _NODE_BYTES, _NODE_BYTES + (table.key_size or 0)
            _check_keys(number, [page[place + start : place + end] for place in places], low, high)
            self._count += len(places)
            return
        keys: list[Key] = []
        expected = table.key_size
        unpack = _NODE.unpack_from
        for place in places:
            size, size_high, flags, key_size = unpack(page, place)
            start = place + _NODE_BYTES + key_size
            size |= size_high << 16
            if start + (size if not flags & _BIG else _U64.size) > PAGE or (
                expected is not None and key_size != expected
            ):
                raise _DamageError(f"page {number}: an entry is damaged")
            key = page[place + _NODE_BYTES : start]
            keys.append(_key(key, table) if table.numbers else key)
            if flags or table.item_size or table.numbers or table.of_trees or table.value_size is not None:
                self._value(number, table, key, flags, size, page[start:])
            else:
                self._count += 1
        _check_keys(number, keys, low, high)

    def _value(self, number: int, table: _Table, key: bytes, flags: int, size: int, rest: bytes) -> None:
        """Of an entry that is more than a key and some bytes."""
        if table.item_size:
            self._duplicates(number, table, flags, rest[:size])
            return
        if flags != (_SUBTREE if table.of_trees else flags & _BIG):
            raise _DamageError(f"page {number}: an entry is damaged")
        if table.value_size is not None and (size != table.value_size or flags & _BIG):
            raise _DamageError(f"page {number}: a value has another length")
        self._count += 1
        value = self._overflow(number, rest, size) if flags & _BIG else rest[:size]
        if table.of_trees or table.numbers:
            self._found.append((key, value))

    def _duplicates(self, number: int, table: _Table, flags: int, value: bytes) -> None:
        """The items of one key: a tree of their own, or, as long as they are few, a page inside the node."""
        items = _Table(table.name, item_size=table.item_size, items_only=True)
        if flags == _DUPLICATES | _SUBTREE and len(value) == _TREE.size:
            tree = _parse_tree(value)
            self._tree(tree, items)
            self._count += tree.entries
        elif flags == _DUPLICATES and len(value) > _HEADER_BYTES:
            _, size, _, lower, _ = _HEADER.unpack_from(value)
            keys = _items(number, value, size, lower, table.item_size)
            _check_keys(number, keys, None, None)
            self._count += len(keys)
        elif not flags and len(value) == table.item_size:
            self._count += 1
        else:
            raise _DamageError(f"page {number}: the items of a key are damaged")

    def _overflow(self, number: int, rest: bytes, size: int) -> bytes:
        """A value with pages of its own."""
        (first,) = _U64.unpack_from(rest)
        count = (_HEADER_BYTES + size - 1) // PAGE + 1
        pages = [self._take(page, 0) for page in range(first, first + count)]
        found, _, flags, _, _ = _HEADER.unpack_from(pages[0])
        if found != first or flags != _OVERFLOW:
            raise _DamageError(f"page {first}, which page {number} names, is none of a long value")
        return b"".join(pages)[_HEADER_BYTES : _HEADER_BYTES + size]

    def _check_free(self, stored: bytes) -> None:
        """A list of free pages: how many, and their numbers.  Those at the file's end may never have been written."""
        numbers = struct.unpack(f"<{len(stored) // 8}Q", stored[: len(stored) // 8 * 8])
        if not numbers or numbers[0] + 1 > len(numbers):
            raise _DamageError("its list of free pages is damaged")
        used = self._used
        for number in numbers[1 : 1 + numbers[0]]:
            if number < 2 or (number < len(used) and used[number]):
                raise _DamageError(f"page {number} is in use, and listed as free")
            if number < len(used):
                used[number] = 1


def _parse_tree(stored: bytes) -> _Tree:
    item_size, _, _, _, _, _, entries, root = _TREE.unpack(stored)
    return _Tree(item_size, entries, root)


def _key(stored: bytes, table: _Table) -> Key:
    if not table.numbers:
        return stored
    if len(stored) != _U64.size:
        raise _DamageError(f"a key of the table {table.name} is damaged")
    return int(_U64.unpack(stored)[0])


def _places(number: int, page: bytes) -> tuple[int, ...]:
    """Where the nodes of a page begin."""
    _, _, _, lower, upper = _HEADER.unpack_from(page)
    if not _HEADER_BYTES <= lower <= upper <= PAGE or lower & 1:
        raise _DamageError(f"the header of page {number} is damaged")
    places = struct.unpack(f"<{(lower - _HEADER_BYTES) >> 1}H", page[_HEADER_BYTES:lower])
    if places and not (upper <= min(places) and max(places) <= PAGE - _NODE_BYTES):
        raise _DamageError(f"page {number}: an entry lies outside of it")
    return places


def _plain_entries(page: bytes, places: tuple[int, ...], key_size: int | None) -> bool:
    """Whether all entries are surely well-formed, found out for all of them at once: their headers are few."""
    if not places:
        return True
    highest = max(places)
    for header in {page[place : place + _NODE_BYTES] for place in places}:
        size, size_high, flags, length = _NODE.unpack(header)
        if flags or size_high or length != key_size or highest + _NODE_BYTES + length + size > PAGE:
            return False
    return True


def _items(number: int, page: bytes, size: int, lower: int, expected: int) -> list[bytes]:
    """Of a leaf of fixed-size items."""
    count = (lower - _HEADER_BYTES) >> 1
    end = _HEADER_BYTES + count * size
    if size != expected or count < 0 or end > len(page):
        raise _DamageError(f"the header of page {number} is damaged")
    return list(struct.unpack(f"{size}s" * count, page[_HEADER_BYTES:end]))


def _check_keys(number: int, keys: list[Key] | list[bytes], low: Key | None, high: Key | None) -> None:
    if not keys:
        return
    if keys != sorted(keys):
        raise _DamageError(f"page {number}: its keys are not in order")
    if (low is not None and keys[0] < low) or (high is not None and not keys[-1] < high):  # type: ignore[operator]
        raise _DamageError(f"page {number}: its keys belong elsewhere")
