"""The exception index: the only owner of LMDB.

Versions are key order
----------------------
Each volume counts *epochs*.  Taking a snapshot gives it the current epoch as its number and begins the next.  A
*record* ``(chunk, epoch)`` in ``preserved`` holds the chunk's content as it was at the end of that epoch.  It is the
content for every snapshot ``s`` with ``previous < s <= epoch``, where ``previous`` is the epoch of the chunk's record
before it (0 where there is none).  So snapshot ``s`` reads a chunk from the first record at or after ``s``; where
there is none, from the live data. Sharing is implicit in the order: no list of sharers, no limit on snapshots, and a
new snapshot touches no record.

Tables (integers big-endian, so that byte order is numeric order)
-----------------------------------------------------------------
=============  ===================================  ================================================================
table          key                                  value
=============  ===================================  ================================================================
``meta``       text                                 record: ``pool`` = {format, id, created, next_volume}
``volumes``    u32 volume                           record: see :mod:`nbdsnap.engine.records`
``snapshots``  u32 volume, u32 epoch                record: likewise
``preserved``  u32 volume (sorted duplicates)       u40 chunk, u32 epoch, u40 slot, u64 checksum
``changed``    u32 volume, u32 epoch, u32 block     chunk set: the chunks of the block with a record of that epoch
``slots``      u32 block                            chunk set: the slots of the block that are in use
``usage``      u32 volume, u32 previous, u32 epoch  u64: slots in records with that epoch and that previous one
``current``    u32 volume, u40 group                live chunks of thin volumes and clones: :mod:`nbdsnap.store.current`
``live``       u32 volume                           u64: slots in ``current``
=============  ===================================  ================================================================

* ``changed`` is exactly ``preserved`` turned around, and gives what a diff or a deletion must look at.
* ``usage`` counts by the interval of epochs that a record serves: all space accounting is computed from it alone.
* A *record* value is eight bytes of checksum, of its key and itself, and JSON in UTF-8.  A chunk's checksum covers its
  data and its own key, so that a bit flipped in a record, or in what it points at, is noticed when the chunk is read;
  see :func:`checksum_seed`.
* ``preserved`` keeps its records as LMDB's fixed-size sorted duplicates of one key per volume: 22 bytes each without
  a header (32 measured with random inserts, 53 as plain keys; a lookup takes 2.1 us against 2.4).

Block data never goes into LMDB.  Its environment is opened once per process, never across a fork.

Transactions
------------
One writer at a time (:meth:`Index.update`), any number of readers (:meth:`Index.read`).  When the map is full, an
update is undone, the map grown and the update run again, so it must be a function of the transaction alone, without
other effects.  The map may only grow while no transaction is open in the process: readers hold a gate, hence are short.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import lmdb
import xxhash

from nbdsnap.errors import CorruptionError, DeviceError, NoSpaceError
from nbdsnap.store import chunkset
from nbdsnap.store.current import CurrentTable
from nbdsnap.store.layout import BLOCK_SHIFT, FORMAT_VERSION, MAX_CHUNKS, MAX_SLOTS

T = TypeVar("T")
JsonObject = dict[str, Any]
Stored = bytes | memoryview

TABLES = ("meta", "volumes", "snapshots", "preserved", "changed", "slots", "usage", "current", "live")
LATER_TABLES = ("current", "live")
"""Those that a pool of the format's first version lacks until it is opened for the first time by a later one."""

MAX_READERS = 510
"""Read transactions at a time: one for each worker thread and command, with room."""

INITIAL_MAP = 1 << 40
"""Bytes of address space to begin with; the map doubles when it is full.  The file itself is only as large as its
content."""

FULL_BYTES = 1 << 20
"""A file system with less than this free may have cut a transaction's write short."""

ITEM = struct.Struct(">BIIBIQ")
"""A record of ``preserved``: chunk (high byte, low 32 bits), epoch, slot (likewise), checksum."""

_PREFIX = struct.Struct(">BII")
CHANGED_KEY = struct.Struct(">III")
USAGE_KEY = struct.Struct(">III")
_USAGE = struct.Struct(">IIIQ")
"""Key and value."""

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
SNAPSHOT_KEY = struct.Struct(">II")

_LOW32 = (1 << 32) - 1
_LOW64 = (1 << 64) - 1


def checksum_seed(volume: int, chunk: int, epoch: int) -> int:
    """The seed of a preserved chunk's XXH3-64 checksum, so that it covers where the chunk belongs as well as its
    bytes."""
    return ((volume << 40 | chunk) * 0x9E3779B97F4A7C15 + epoch) & _LOW64


class Record:
    """A preserved chunk: ``slot`` is ZERO_SLOT where it is all zeroes, BASE_SLOT where it is as in the volume's base,
    LOST_SLOT where it was lost."""

    __slots__ = ("checksum", "chunk", "epoch", "slot")

    def __init__(self, chunk: int, epoch: int, slot: int, checksum: int) -> None:
        self.chunk = chunk
        self.epoch = epoch
        self.slot = slot
        self.checksum = checksum

    @property
    def has_slot(self) -> bool:
        return self.slot < MAX_SLOTS


class NewRecords:
    """Records of one epoch that are to be put, as columns: ``chunks`` ascending, and a slot and a checksum for each."""

    __slots__ = ("checksums", "chunks", "epoch", "slots")

    def __init__(self, epoch: int, chunks: list[int], slots: list[int], checksums: list[int]) -> None:
        self.epoch = epoch
        self.chunks = chunks
        self.slots = slots
        self.checksums = checksums

    @classmethod
    def of(cls, epoch: int, records: Sequence[Record]) -> NewRecords:
        return cls(epoch, [r.chunk for r in records], [r.slot for r in records], [r.checksum for r in records])


def unpack_item(item: Stored) -> Record:
    high, low, epoch, slot_high, slot_low, checksum = ITEM.unpack(item)
    return Record(high << 32 | low, epoch, slot_high << 32 | slot_low, checksum)


def _prefix(chunk: int, epoch: int) -> bytes:
    return _PREFIX.pack(chunk >> 32, chunk & _LOW32, epoch)


def _pack(chunk: int, epoch: int, slot: int, checksum: int) -> bytes:
    return ITEM.pack(chunk >> 32, chunk & _LOW32, epoch, slot >> 32, slot & _LOW32, checksum)


def encode_record(key: bytes, value: JsonObject) -> bytes:
    text = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    return xxhash.xxh3_64_digest(key + text) + text


def decode_record(key: Stored, stored: Stored, what: str) -> JsonObject:
    text = bytes(stored[8:])
    if xxhash.xxh3_64_digest(bytes(key) + text) != bytes(stored[:8]):
        raise CorruptionError(f"the index's record of {what} is damaged", hint="run: nbdsnap check")
    value: JsonObject = json.loads(text)
    return value


class IndexReader:
    """The tables, read-only, as of one moment.  Also the reading half of :class:`IndexWriter`."""

    def __init__(self, index: Index, txn: lmdb.Transaction) -> None:
        self._txn = txn
        self._db = index.tables

    def meta(self) -> JsonObject | None:
        stored = self._txn.get(b"pool", db=self._db["meta"])
        return None if stored is None else decode_record(b"pool", stored, "the pool")

    def volumes(self) -> Iterator[tuple[int, JsonObject]]:
        for key, value in self._txn.cursor(self._db["volumes"]):
            (volume,) = _U32.unpack(key)
            yield volume, decode_record(key, value, f"volume number {volume}")

    def snapshots(self) -> Iterator[tuple[int, int, JsonObject]]:
        """``(volume, epoch, record)``, ascending."""
        for key, value in self._txn.cursor(self._db["snapshots"]):
            volume, epoch = SNAPSHOT_KEY.unpack(key)
            yield volume, epoch, decode_record(key, value, f"snapshot number {epoch} of volume number {volume}")

    def cursor(self, volume: int) -> PreservedCursor:
        return PreservedCursor(self._txn.cursor(self._db["preserved"]), volume)

    def records(self, volume: int) -> Iterator[Record]:
        """All of the volume, ascending by chunk and epoch."""
        return self.cursor(volume).all()

    def changed(
        self, volume: int, first_epoch: int, end_epoch: int, first_block: int = 0
    ) -> Iterator[tuple[int, int, int]]:
        """``(epoch, block, set)`` from (first_epoch, first_block) to before ``end_epoch``, ascending."""
        cursor = self._txn.cursor(self._db["changed"])
        found = cursor.set_range(CHANGED_KEY.pack(volume, first_epoch, first_block))
        while found:
            key_volume, epoch, block = CHANGED_KEY.unpack(cursor.key())
            if key_volume != volume or epoch >= end_epoch:
                return
            yield epoch, block, _decode_set(cursor.value(), "changed")
            found = cursor.next()

    def changed_within(
        self, volume: int, first_epoch: int, end_epoch: int, first_block: int, end_block: int
    ) -> Iterator[tuple[int, int]]:
        """``(block, set)`` of the blocks [first_block, end_block), by epoch; one seek for each epoch, and for what it
        has inside."""
        cursor = self._txn.cursor(self._db["changed"])
        found = cursor.set_range(CHANGED_KEY.pack(volume, first_epoch, first_block))
        while found:
            key_volume, epoch, block = CHANGED_KEY.unpack(cursor.key())
            if key_volume != volume or epoch >= end_epoch:
                return
            if block < first_block:
                found = cursor.set_range(CHANGED_KEY.pack(volume, epoch, first_block))
            elif block >= end_block:
                found = cursor.set_range(CHANGED_KEY.pack(volume, epoch + 1, first_block))
            else:
                yield block, _decode_set(cursor.value(), "changed")
                found = cursor.next()

    def changed_block(self, volume: int, epoch: int, block: int) -> int:
        stored = self._txn.get(CHANGED_KEY.pack(volume, epoch, block), db=self._db["changed"])
        return 0 if stored is None else _decode_set(stored, "changed")

    def epochs_from(self, volume: int, first_epoch: int) -> Iterator[int]:
        """The epochs at or after ``first_epoch`` that have any record, ascending; one seek each."""
        cursor = self._txn.cursor(self._db["changed"])
        while cursor.set_range(CHANGED_KEY.pack(volume, first_epoch, 0)):
            key_volume, epoch, _ = CHANGED_KEY.unpack(cursor.key())
            if key_volume != volume:
                return
            yield epoch
            first_epoch = epoch + 1

    def slots(self) -> Iterator[tuple[int, int]]:
        """``(block, set)`` of the slots in use, ascending."""
        for key, value in self._txn.cursor(self._db["slots"]):
            yield _U32.unpack(key)[0], _decode_set(value, "slots")

    def current(self, volume: int) -> CurrentTable:
        return CurrentTable(self._txn, self._db, volume)

    def current_items(self, volume: int) -> Iterator[tuple[int, int]]:
        """``(chunk, slot)`` of all live chunks that have an entry, ascending."""
        return self.current(volume).items(0, MAX_CHUNKS)

    def live_slots(self, volume: int) -> int:
        return self.current(volume).live_slots()

    def usage(self, volume: int) -> Iterator[tuple[int, int, int]]:
        """``(previous, epoch, slots)`` for every interval of the volume that has records with slots."""
        cursor = self._txn.cursor(self._db["usage"])
        if not cursor.set_range(USAGE_KEY.pack(volume, 0, 0)):
            return
        unpack = _USAGE.unpack
        for key, value in cast("Iterator[tuple[bytes, bytes]]", cursor.iternext()):
            key_volume, previous, epoch, slots = unpack(key + value)
            if key_volume != volume:
                return
            yield previous, epoch, slots


class PreservedCursor:
    """Walks the records of one volume, in the order (chunk, epoch)."""

    def __init__(self, cursor: lmdb.Cursor, volume: int) -> None:
        self._cursor = cursor
        self._key = _U32.pack(volume)

    def lookup(self, first: int, end: int, epoch: int) -> list[Record]:
        """For the chunks [first, end): the record that holds the content of the snapshot ``epoch``, where there is one.

        One seek per record found, and one for each gap; chunks that were never preserved cost nothing.
        """
        cursor, key = self._cursor, self._key
        found: list[Record] = []
        chunk = first
        while chunk < end and cursor.set_range_dup(key, _prefix(chunk, epoch)):
            record = unpack_item(cursor.value())
            if record.chunk >= end:
                break
            if record.epoch >= epoch:
                found.append(record)
                chunk = record.chunk + 1
            else:  # a later chunk's record, and too old: what does that chunk have at or after the epoch?
                chunk = record.chunk
        return found

    def latest(self, chunk: int) -> Record | None:
        """The chunk's newest record."""
        cursor = self._cursor
        if cursor.set_range_dup(self._key, _prefix(chunk + 1, 0)):
            if not cursor.prev_dup():
                return None
        elif not (cursor.set_key(self._key) and cursor.last_dup()):
            return None
        record = unpack_item(cursor.value())
        return record if record.chunk == chunk else None

    def latest_epochs(self, chunks: Sequence[int]) -> list[int]:
        """For each of ``chunks``, ascending: the epoch of its newest record, 0 where there is none.

        One seek for each, or none where the seek before says that there is nothing.
        """
        cursor, key = self._cursor, self._key
        seek, low32 = cursor.set_range_dup, _LOW32
        epochs: list[int] = []
        nothing_before = 0
        for chunk in chunks:
            if chunk < nothing_before:
                epochs.append(0)
                continue
            if not seek(key, _PREFIX.pack(chunk >> 32, chunk & low32, 0)):
                epochs.append(0)
                nothing_before = MAX_CHUNKS
                continue
            high, low, epoch = _PREFIX.unpack_from(cursor.value())
            nothing_before = high << 32 | low
            if nothing_before == chunk:
                latest = self.latest(chunk)
                epochs.append(latest.epoch if latest else epoch)
            else:
                epochs.append(0)
        return epochs

    def around(self, chunk: int, epoch: int) -> tuple[Record | None, Record | None, Record | None]:
        """``(previous, the record, next)`` of the chunk, of which any may be missing."""
        cursor = self._cursor
        if not cursor.set_range_dup(self._key, _prefix(chunk, epoch)):
            return None, None, None
        record = unpack_item(cursor.value())
        if record.chunk != chunk or record.epoch != epoch:
            return None, None, None
        following = unpack_item(cursor.value()) if cursor.next_dup() else None
        cursor.set_range_dup(self._key, _prefix(chunk, epoch))
        previous = unpack_item(cursor.value()) if cursor.prev_dup() else None
        if following is not None and following.chunk != chunk:
            following = None
        if previous is not None and previous.chunk != chunk:
            previous = None
        return previous, record, following

    def all(self, first: int = 0) -> Iterator[Record]:
        """Every record from chunk ``first`` on."""
        found = self._cursor.set_range_dup(self._key, _prefix(first, 0))
        while found:
            yield unpack_item(self._cursor.value())
            found = self._cursor.next_dup()


class IndexWriter(IndexReader):
    """The tables in one write transaction."""

    def put_meta(self, value: JsonObject) -> None:
        self._put_record("meta", b"pool", value)

    def put_volume(self, volume: int, value: JsonObject) -> None:
        self._put_record("volumes", _U32.pack(volume), value)

    def _put_record(self, table: str, key: bytes, value: JsonObject) -> None:
        self._txn.put(key, encode_record(key, value), db=self._db[table])

    def delete_volume(self, volume: int) -> None:
        self._txn.delete(_U32.pack(volume), db=self._db["volumes"])

    def put_snapshot(self, volume: int, epoch: int, value: JsonObject) -> None:
        self._put_record("snapshots", SNAPSHOT_KEY.pack(volume, epoch), value)

    def delete_snapshot(self, volume: int, epoch: int) -> None:
        self._txn.delete(SNAPSHOT_KEY.pack(volume, epoch), db=self._db["snapshots"])

    def preserve(self, volume: int, records: NewRecords) -> None:
        """Put new records, and enter them into ``changed``."""
        cursor = self._txn.cursor(self._db["preserved"])
        key = _U32.pack(volume)
        epoch, pack = records.epoch, ITEM.pack
        items = [
            (key, pack(chunk >> 32, chunk & _LOW32, epoch, slot >> 32, slot & _LOW32, checksum))
            for chunk, slot, checksum in zip(records.chunks, records.slots, records.checksums, strict=True)
        ]
        cursor.putmulti(items, dupdata=True)
        changed = self._db["changed"]
        for block, numbers in _by_block(records.chunks).items():
            block_key = CHANGED_KEY.pack(volume, epoch, block)
            stored = bytes(self._txn.get(block_key, b"", db=changed))
            self._txn.put(block_key, chunkset.add(stored, numbers), db=changed)

    def delete_preserved(self, volume: int, record: Record) -> None:
        """Remove a record from ``preserved`` (``changed`` is the caller's to mend, a block at a time)."""
        item = _pack(record.chunk, record.epoch, record.slot, record.checksum)
        self._txn.delete(_U32.pack(volume), item, db=self._db["preserved"])

    def replace_preserved(self, volume: int, old: Record, new: Record) -> None:
        """Both of the same chunk and epoch."""
        self.delete_preserved(volume, old)
        item = _pack(new.chunk, new.epoch, new.slot, new.checksum)
        self._txn.put(_U32.pack(volume), item, db=self._db["preserved"])

    def put_changed(self, volume: int, epoch: int, block: int, members: int) -> None:
        self._put_set("changed", CHANGED_KEY.pack(volume, epoch, block), members)

    def change_slots(self, used: Iterable[int] = (), freed: Iterable[int] = ()) -> None:
        """Enter slots as in use, or take them out."""
        for block, numbers in _by_block(used).items():
            self._put_slots(block, self._slots_of(block) | chunkset.from_iterable(numbers))
        for block, numbers in _by_block(freed).items():
            self._put_slots(block, self._slots_of(block) & ~chunkset.from_iterable(numbers))

    def _slots_of(self, block: int) -> int:
        stored = self._txn.get(_U32.pack(block), db=self._db["slots"])
        return 0 if stored is None else _decode_set(stored, "slots")

    def _put_slots(self, block: int, members: int) -> None:
        self._put_set("slots", _U32.pack(block), members)

    def _put_set(self, table: str, key: bytes, members: int) -> None:
        if members:
            self._txn.put(key, chunkset.encode(members), db=self._db[table])
        else:
            self._txn.delete(key, db=self._db[table])

    def add_usage(self, volume: int, deltas: dict[tuple[int, int], int]) -> None:
        """Add to the counts of the intervals ``(previous, epoch)``."""
        table = self._db["usage"]
        for (previous, epoch), delta in deltas.items():
            if not delta:
                continue
            key = USAGE_KEY.pack(volume, previous, epoch)
            stored = self._txn.get(key, db=table)
            count = delta + (_U64.unpack(stored)[0] if stored else 0)
            if count < 0:
                raise CorruptionError("the index counts fewer slots than it holds", hint="run: nbdsnap check")
            if count:
                self._txn.put(key, _U64.pack(count), db=table)
            else:
                self._txn.delete(key, db=table)


def _by_block(numbers: Iterable[int]) -> dict[int, list[int]]:
    """Chunk or slot numbers, within their blocks."""
    mask = (1 << BLOCK_SHIFT) - 1
    blocks: dict[int, list[int]] = {}
    for number in numbers:
        block = number >> BLOCK_SHIFT
        if block in blocks:
            blocks[block].append(number & mask)
        else:
            blocks[block] = [number & mask]
    return blocks


class Index:
    """An LMDB environment with the tables, opened.

    LMDB believes what is in the file, and a damaged page may end the process: whoever opens a pool has looked at it
    before (:mod:`nbdsnap.store.pagesums`, :mod:`nbdsnap.store.structure`).
    """

    def __init__(self, path: Path, *, create: bool = False, map_size: int = INITIAL_MAP) -> None:
        self.path = path
        self._gate = _Gate()
        if not create and path.stat().st_size == 0:
            raise _damaged(path, "it is empty")
        try:
            self._env = lmdb.open(
                str(path),
                subdir=False,
                map_size=map_size,
                max_dbs=16,
                max_readers=MAX_READERS,
                metasync=True,
                sync=True,
            )
        except lmdb.DiskError as error:  # a map smaller than the file is widened by LMDB itself, so this is the disk
            raise DeviceError(f"the index {path} can't be opened: {error}") from None
        except lmdb.Error as error:
            raise _damaged(path, str(error)) from None
        try:
            self._env.reader_check()
            with _lmdb_errors(path):
                self.tables = {
                    name: self._env.open_db(name.encode(), dupsort=name == "preserved", dupfixed=name == "preserved")
                    for name in TABLES
                }
        except BaseException:
            self._env.close()
            raise

    def close(self) -> None:
        self._env.close()

    @property
    def file_bytes(self) -> int:
        return self.path.stat().st_blocks * 512

    @contextlib.contextmanager
    def read(self) -> Iterator[IndexReader]:
        """A read transaction.  Keep it short: what it sees can't be reused, and the map can't grow, while it is
        open."""
        with self._gate, _lmdb_errors(self.path), self._env.begin() as txn:
            yield IndexReader(self, txn)

    def update(self, change: Callable[[IndexWriter], T]) -> T:
        """Run ``change`` in a write transaction and commit it durably; nothing is changed where it raises.

        ``change`` may be run again, when the map had to grow.  Raises NoSpaceError where the disk is full.
        """
        while True:
            try:
                with self._gate, _lmdb_errors(self.path), self._env.begin(write=True) as txn:
                    return change(IndexWriter(self, txn))
            except lmdb.MapFullError:
                self._grow()

    def _grow(self) -> None:
        with self._gate.closed():
            self._env.set_mapsize(self._env.info()["map_size"] * 2)


class _Gate:
    """Counts open transactions; can be closed when there are none."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._open = 0
        self._closing = False

    def __enter__(self) -> None:
        with self._condition:
            while self._closing:
                self._condition.wait()
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._open -= 1
            if not self._open and self._closing:
                self._condition.notify_all()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        with self._condition:
            self._closing = True
            self._condition.wait_for(lambda: not self._open)
            try:
                yield
            finally:
                self._closing = False
                self._condition.notify_all()


def _decode_set(stored: Stored, table: str) -> int:
    try:
        return chunkset.decode(bytes(stored))
    except ValueError as error:
        raise CorruptionError(f"the index's table {table} is damaged: {error}", hint="run: nbdsnap check") from None


def _damaged(path: Path, why: str) -> CorruptionError:
    return CorruptionError(
        f"the index {path} is damaged: {why}",
        hint="the live data is in the origin files, unharmed; restore the pool from a backup, or begin a new one",
    )


@contextlib.contextmanager
def _lmdb_errors(path: Path) -> Iterator[None]:
    """LMDB's errors as ours; a full map passes, for :meth:`Index.update`."""
    try:
        yield
    except lmdb.MapFullError:
        raise
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError) as error:
        raise _damaged(path, str(error)) from None
    except lmdb.PanicError:
        raise DeviceError(
            f"the index {path} can't be changed since a write to it failed", hint="mend its disk, then restart"
        ) from None
    except lmdb.Error as error:
        if _is_full(path, getattr(error, "code", None)):
            raise NoSpaceError(f"no space left for the index {path}", hint="free some, or delete snapshots") from None
        raise DeviceError(f"the index {path}: {error}") from None


def _is_full(path: Path, code: int | None) -> bool:
    """LMDB calls a short write, which is how a full disk begins, an input/output error."""
    if code == errno.EIO:
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize < FULL_BYTES
    return code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_supported(meta: JsonObject) -> bool:
    return meta.get("format") == FORMAT_VERSION
