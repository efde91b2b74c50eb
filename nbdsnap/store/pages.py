"""The index's pages, read without LMDB: for a file that may be damaged.

LMDB trusts its file: a damaged page can end the process that reads it.  This reader believes nothing.  What it can't
read it reports as a :class:`Gap`, with the range of keys that lie (or lay) there, and goes on behind it.  It never
changes the file, and is for a pool that no process has open.

LMDB's format, as far as it is needed here (version 1 of its file, 64-bit, little-endian)::

    page     u64 number   u16 item size   u16 flags   u16 lower   u16 upper   u16[n] places of nodes   … nodes
    meta     page header, then u32 magic   u32 version   u64 address   u64 map size   tree: free   tree: main
             u64 last page   u64 transaction
    tree     u32 item size   u16 flags   u16 depth   u64[3] pages   u64 entries   u64 root page
    node     u16 low   u16 high   u16 flags   u16 key size   key   data
             in a branch, low, high and flags are the child's number; in a leaf, low and high the data's size

A leaf of fixed-size duplicates has no nodes, but its items one after the other.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nbdsnap.errors import CorruptionError
from nbdsnap.store.fileio import FileIO

PAGE = 4096
NO_PAGE = (1 << 64) - 1
MAX_DEPTH = 32
"""LMDB's own limit (CURSOR_STACK)."""

_MAGIC = 0xBEEFC0DE
_HEADER = struct.Struct("<QHHHH")
_META = struct.Struct("<IIQQ48s48sQQ")
_TREE = struct.Struct("<IHHQQQQQ")
_NODE = struct.Struct("<HHHH")
_U64 = struct.Struct("<Q")

_BRANCH, _LEAF, _OVERFLOW, _LEAF2 = 0x01, 0x02, 0x04, 0x20
_BIG, _SUBTREE, _DUPLICATES = 0x01, 0x02, 0x04

Key = bytes


class Entry(NamedTuple):
    key: Key
    value: bytes


@dataclass(frozen=True)
class Gap:
    """Entries from ``low`` to before ``high`` (None: the table's end) can't be read."""

    page: int
    why: str
    low: Key | None
    high: Key | None
    key: Key | None = None
    """In a table with duplicates: the gap is among this key's items, and ``low`` and ``high`` are items."""


class _BadPageError(Exception):
    """Why a page can't be read."""


@dataclass(frozen=True)
class _Tree:
    item_size: int
    entries: int
    root: int

    @classmethod
    def parse(cls, stored: bytes) -> _Tree:
        item_size, _, _, _, _, _, entries, root = _TREE.unpack(stored)
        return cls(item_size, entries, root)


class _Node(NamedTuple):
    key: bytes
    flags: int
    data: bytes
    child: int


class PageFile:
    """The index file at ``path``.  ``damaged``: pages that are known to be, so that nothing in them is believed.

    Raises CorruptionError where not even the tables can be found.
    """

    def __init__(self, io: FileIO, path: Path, damaged: Collection[int] = ()) -> None:
        self.path = path
        self._damaged = frozenset(damaged)
        fd = io.open(path, os.O_RDONLY)
        try:
            if not io.size(fd):
                raise CorruptionError(f"the index {path} is damaged: it is empty")
            self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            io.close(fd)
        self._visited: set[int] = set()
        self._wanted: Key | None = None
        self.gaps: list[Gap] = []
        """Where the tables themselves should have been named."""
        try:
            self.last_page, main = self._newest_meta()
            self._tables = self._find_tables(main)
        except BaseException:
            self._map.close()
            raise

    def close(self) -> None:
        self._map.close()

    def tables(self) -> set[str]:
        return set(self._tables)

    def read(self, table: str, key: Key | None = None) -> Iterator[Entry | Gap]:
        """All entries of a table, ascending, with the gaps in between.  ``key``: of this key only, and all gaps among
        the keys."""
        tree = self._tables.get(table)
        if tree is None:
            yield Gap(0, f"the table {table} is not to be found", None, None)
            return
        self._visited.clear()
        for leaf in self._leaves(tree, "entries"):
            if isinstance(leaf, Gap):
                yield leaf
                continue
            for node in leaf:
                if not node.flags & _DUPLICATES:
                    yield self._entry(node)
                elif key is None or node.key == key:
                    yield from self._duplicates(node)

    def keys(self, table: str) -> list[Key]:
        """Of the table, as far as they can be read, without what lies under them."""
        tree = self._tables.get(table)
        if tree is None:
            return []
        self._visited.clear()
        return [node.key for leaf in self._leaves(tree, "entries") if not isinstance(leaf, Gap) for node in leaf]

    # The file

    def _newest_meta(self) -> tuple[int, _Tree]:
        best: tuple[int, int, _Tree] | None = None
        for number in (0, 1):
            stored = self._map[number * PAGE + _HEADER.size : number * PAGE + _HEADER.size + _META.size]
            if number in self._damaged or len(stored) < _META.size:
                continue
            magic, version, _, _, _, main, last, transaction = _META.unpack(stored)
            if magic == _MAGIC and version == 1 and (best is None or transaction > best[0]):
                best = transaction, last, _Tree.parse(main)
        if self._damaged & {0, 1}:  # the other one may be older, and its pages may have been written again since
            raise CorruptionError(f"the index {self.path} is damaged: its root page can't be read")
        if best is None:
            raise CorruptionError(f"the index {self.path} is damaged: it is no LMDB file, or its root pages are lost")
        return best[1], best[2]

    def _find_tables(self, main: _Tree) -> dict[str, _Tree]:
        tables: dict[str, _Tree] = {}
        for leaf in self._leaves(main, "tables"):
            if isinstance(leaf, Gap):
                self.gaps.append(leaf)
                continue
            for node in leaf:
                if len(node.data) == _TREE.size:
                    tables[node.key.decode(errors="replace")] = _Tree.parse(node.data)
        return tables

    def _leaves(self, tree: _Tree, what: str) -> Iterator[list[_Node] | Gap]:
        """The nodes of each leaf of a tree, and gaps; the last one where something is missing without a gap."""
        count, whole = 0, True
        for leaf in self._walk(tree.root, None, None, tree.item_size, 0):
            if isinstance(leaf, Gap):
                whole = False
            else:
                count += sum(self._count(node) for node in leaf)
            yield leaf
        if whole and count != tree.entries:
            yield Gap(tree.root, f"it holds {count} {what}, and should hold {tree.entries}", None, None)

    def _walk(
        self, number: int, low: Key | None, high: Key | None, item_size: int, depth: int
    ) -> Iterator[list[_Node] | Gap]:
        """The leaves below page ``number``, whose keys must be in [low, high)."""
        if number == NO_PAGE:
            return
        try:
            nodes = self._nodes(number, low, high, item_size, depth)
        except _BadPageError as error:
            yield Gap(number, str(error), low, high)
            return
        if not nodes or nodes[0].child < 0:
            yield nodes
            return
        for position, node in enumerate(nodes):
            end = nodes[position + 1].key if position + 1 < len(nodes) else high
            yield from self._walk(node.child, node.key if position else low, end, item_size, depth + 1)

    def _count(self, node: _Node) -> int:
        """LMDB counts the items of a key, not the key."""
        if not node.flags & _DUPLICATES:
            return 1
        if node.flags & _SUBTREE:
            return _Tree.parse(node.data).entries if len(node.data) == _TREE.size else 0
        return max(_HEADER.unpack(node.data[: _HEADER.size])[3] - _HEADER.size, 0) >> 1 if node.data else 0

    def _entry(self, node: _Node) -> Entry | Gap:
        try:
            return Entry(node.key, self._overflow(node) if node.flags & _BIG else node.data)
        except _BadPageError as error:
            return Gap(0, str(error), node.key, node.key + b"\0")

    def _duplicates(self, node: _Node) -> Iterator[Entry | Gap]:
        """The items of one key: a tree of their own, or, as long as they are few, a page inside the node."""
        key = node.key
        try:
            leaves = self._leaves(_subtree(node), "items") if node.flags & _SUBTREE else [_inner_page(node.data)]
        except _BadPageError as error:
            yield Gap(0, str(error), None, None, key)
            return
        for leaf in leaves:
            if isinstance(leaf, Gap):
                yield Gap(leaf.page, leaf.why, leaf.low, leaf.high, key)
            else:
                for one in leaf:
                    yield Entry(key, one.key)

    def _page(self, number: int) -> bytes:
        if number > self.last_page or (number + 1) * PAGE > len(self._map):
            raise _BadPageError("it lies beyond the file's end")
        if number in self._damaged:
            raise _BadPageError("it is not what it was when the pool was closed")
        return self._map[number * PAGE : (number + 1) * PAGE]

    def _overflow(self, node: _Node) -> bytes:
        """A value with pages of its own."""
        if len(node.data) < _U64.size:
            raise _BadPageError("a long value is damaged")
        (number,) = _U64.unpack(node.data[: _U64.size])
        length = node.child & 0xFFFFFFFF if node.child >= 0 else -node.child - 1
        page = self._page(number)
        found, _, flags, _, _ = _HEADER.unpack(page[: _HEADER.size])
        last = number + (_HEADER.size + length - 1) // PAGE
        if found != number or flags != _OVERFLOW or last > self.last_page:
            raise _BadPageError("a long value's page is damaged")
        content = b"".join(self._page(one) for one in range(number, last + 1))
        return content[_HEADER.size : _HEADER.size + length]

    def _nodes(self, number: int, low: Key | None, high: Key | None, item_size: int, depth: int) -> list[_Node]:
        """The nodes of a page, ascending and inside [low, high)."""
        page = self._page(number)
        if number in self._visited or depth > MAX_DEPTH:
            raise _BadPageError("it is used twice")
        self._visited.add(number)
        found, size, flags, _, _ = _HEADER.unpack(page[: _HEADER.size])
        if found != number:
            raise _BadPageError("it is another page")
        if flags == _LEAF | _LEAF2:
            if size != item_size:
                raise _BadPageError("its items have another size")
            nodes = _items(page)
        elif flags == _LEAF:
            nodes = _leaf_nodes(page)
        elif flags == _BRANCH:
            nodes = _branch_nodes(page)
        else:
            raise _BadPageError("it is no page of a table")
        _check_order(nodes, low, high, is_branch=flags == _BRANCH)
        return nodes


def _check_order(nodes: list[_Node], low: Key | None, high: Key | None, *, is_branch: bool) -> None:
    keys = [node.key for node in (nodes[1:] if is_branch else nodes)]  # a branch's first key is empty
    if any(one >= other for one, other in pairwise(keys)):
        raise _BadPageError("its keys are not in order")
    if keys and ((low is not None and keys[0] < low) or (high is not None and keys[-1] >= high)):
        raise _BadPageError("its keys belong elsewhere")


def _subtree(node: _Node) -> _Tree:
    if len(node.data) != _TREE.size:
        raise _BadPageError("a table of items is damaged")
    return _Tree.parse(node.data)


def _inner_page(page: bytes) -> list[_Node]:
    """A leaf of fixed-size items inside a node."""
    nodes = _items(page)
    _check_order(nodes, None, None, is_branch=False)
    return nodes


def _items(page: bytes) -> list[_Node]:
    """Of a leaf of fixed-size items: each as the key of a node."""
    if len(page) < _HEADER.size:
        raise _BadPageError("it is cut short")
    _, size, flags, lower, _ = _HEADER.unpack(page[: _HEADER.size])
    count = (lower - _HEADER.size) >> 1
    if not flags & _LEAF2 or not size or lower < _HEADER.size or _HEADER.size + count * size > len(page):
        raise _BadPageError("its header is damaged")
    return [
        _Node(page[start : start + size], 0, b"", -1)
        for start in range(_HEADER.size, _HEADER.size + count * size, size)
    ]


def _places(page: bytes) -> list[int]:
    """Where the nodes of a page begin."""
    _, _, _, lower, upper = _HEADER.unpack(page[: _HEADER.size])
    if not _HEADER.size <= lower <= upper <= PAGE or lower & 1:
        raise _BadPageError("its header is damaged")
    places = list(struct.unpack(f"<{(lower - _HEADER.size) >> 1}H", page[_HEADER.size : lower]))
    if any(not upper <= place <= PAGE - _NODE.size for place in places):
        raise _BadPageError("a node of it lies elsewhere")
    return places


def _branch_nodes(page: bytes) -> list[_Node]:
    nodes = []
    for place in _places(page):
        low, high, top, key_size = _NODE.unpack(page[place : place + _NODE.size])
        start = place + _NODE.size
        if start + key_size > PAGE:
            raise _BadPageError("a node of it is too long")
        nodes.append(_Node(page[start : start + key_size], 0, b"", low | high << 16 | top << 32))
    if not nodes:
        raise _BadPageError("it is empty")
    return nodes


def _leaf_nodes(page: bytes) -> list[_Node]:
    nodes = []
    for place in _places(page):
        low, high, flags, key_size = _NODE.unpack(page[place : place + _NODE.size])
        start = place + _NODE.size + key_size
        size = low | high << 16
        stored = _U64.size if flags & _BIG else size
        if flags & ~(_BIG | _SUBTREE | _DUPLICATES) or start + stored > PAGE:
            raise _BadPageError("a node of it is damaged")
        key = page[place + _NODE.size : start]
        nodes.append(_Node(key, flags, page[start : start + stored], -1 - size))
    return nodes
