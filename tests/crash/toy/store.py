"""A toy with the shape of the real thing, to test the harness on: cells in a data file, an intent log, snapshots in
LMDB.

A write goes to the log and is acknowledged; ``flush`` syncs the log.  A checkpoint preserves what a snapshot needs of
the old cells, writes the new ones in place, and empties the log.  Order of durability::

    old content in store < index record < data in place < log emptied < store slot reused

``bug`` plants a mistake of order; mistakes of missing syncs are planted by the explorer, which takes a sync for not
done.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import lmdb

CELL = 1024
"""Bytes: two sectors, so that a cell can be torn."""

CELLS = 16
LOG_CELLS = 8
"""What the log holds before a checkpoint must empty it."""

BUGS = ("overwrite-before-index", "index-before-store", "reuse-before-commit", "flush-before-log", "no-checksum")

_HEADER = struct.Struct(">Q")
_RECORD = struct.Struct(">QII")
_ENTRY = struct.Struct(">II")
_RECORD_BYTES = _RECORD.size + CELL
_LOG_START = 512


def _ignore_site(name: str) -> None:
    pass


class ToyStore:
    def __init__(self, folder: Path, bug: str = "", site: Callable[[str], None] = _ignore_site) -> None:
        self._bug = bug
        self._site = site
        self._lock = threading.Lock()
        folder.mkdir(exist_ok=True)
        self._data = os.open(folder / "data", os.O_RDWR | os.O_CREAT)
        self._store = os.open(folder / "store", os.O_RDWR | os.O_CREAT)
        self._log = os.open(folder / "log", os.O_RDWR | os.O_CREAT)
        self._env = self._open_index(folder)
        self._preserved = self._env.open_db(b"preserved")
        self._snapshots = self._env.open_db(b"snapshots")
        if os.fstat(self._data).st_size < CELL * CELLS:
            os.ftruncate(self._data, CELL * CELLS)
        for path in (folder, folder.parent):
            self._sync_directory(path)
        self._pending: dict[int, bytes] = {}
        self._sequence = 0
        self._appended = 0
        self._free: list[int] = []
        self._slots = 0
        self._recover()

    def _open_index(self, folder: Path) -> lmdb.Environment:
        """A new environment is made under another name, since LMDB does not make one atomically."""
        path, new = folder / "index.mdb", folder / "index.new"
        if not path.exists():
            new.unlink(missing_ok=True)
            with lmdb.open(str(new), subdir=False, lock=False) as env:
                self._site("create: index")
                env.sync(True)
            new.rename(path)
        return lmdb.open(str(path), subdir=False, map_size=1 << 24, max_dbs=2)

    def close(self) -> None:
        self._env.close()
        for fd in (self._data, self._store, self._log):
            os.close(fd)

    def _sync(self, fd: int, site: str) -> None:
        self._site(site)
        os.fdatasync(fd)

    def _sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        self._site("create: directory")
        os.fsync(fd)
        os.close(fd)

    def _recover(self) -> None:
        with self._env.begin(db=self._preserved) as txn:
            used = {_ENTRY.unpack(value)[0] for _, value in txn.cursor()}
        self._slots = max(used, default=-1) + 1
        self._free = sorted(set(range(self._slots)) - used)
        header = os.pread(self._log, _HEADER.size, 0)
        self._sequence = _HEADER.unpack(header)[0] if len(header) == _HEADER.size else 0
        for number in range(LOG_CELLS):
            record = os.pread(self._log, _RECORD_BYTES, _LOG_START + number * _RECORD_BYTES)
            if len(record) < _RECORD_BYTES:
                break
            sequence, cell, checksum = _RECORD.unpack_from(record)
            data = record[_RECORD.size :]
            whole = self._bug == "no-checksum" or _checksum(sequence, cell, data) == checksum
            if sequence != self._sequence or cell >= CELLS or not whole:
                break
            self._pending[cell] = data
            self._sequence += 1
            self._appended += 1
        self._checkpoint()

    # --- what a client does ---

    def write(self, cell: int, data: bytes) -> None:
        with self._lock:
            if self._appended == LOG_CELLS:
                self._checkpoint()
            record = _RECORD.pack(self._sequence, cell, _checksum(self._sequence, cell, data)) + data
            os.pwrite(self._log, record, _LOG_START + self._appended * _RECORD_BYTES)
            self._pending[cell] = data
            self._sequence += 1
            self._appended += 1

    def flush(self, acknowledge: Callable[[], None]) -> None:
        if self._bug == "flush-before-log":
            acknowledge()
        self._sync(self._log, "flush: log")
        if self._bug != "flush-before-log":
            acknowledge()

    def read(self, cell: int) -> bytes:
        with self._lock:
            return self._pending.get(cell) or os.pread(self._data, CELL, cell * CELL)

    def snapshots(self) -> list[int]:
        with self._env.begin(db=self._snapshots) as txn:
            return [int.from_bytes(key, "big") for key, _ in txn.cursor()]

    def snapshot_create(self, number: int) -> None:
        with self._lock:
            self._checkpoint()
            with self._env.begin(write=True, db=self._snapshots) as txn:
                txn.put(number.to_bytes(4, "big"), b"")

    def snapshot_read(self, number: int, cell: int) -> bytes:
        """Raises ValueError where the content is not what was preserved."""
        with self._lock, self._env.begin(db=self._preserved) as txn, txn.cursor() as cursor:
            if cursor.set_range(_key(cell, number)) and cursor.key()[:4] == _key(cell, 0)[:4]:
                slot, checksum = _ENTRY.unpack(cursor.value())
                data = os.pread(self._store, CELL, slot * CELL)
                if zlib.crc32(data) != checksum:
                    raise ValueError(f"cell {cell} of snapshot {number} is damaged")
                return data
        return os.pread(self._data, CELL, cell * CELL)

    def snapshot_delete(self, number: int) -> None:
        with self._lock:
            older = max((other for other in self.snapshots() if other < number), default=-1)
            with self._env.begin(write=True, db=self._preserved) as txn:
                txn.delete(number.to_bytes(4, "big"), db=self._snapshots)
                freed = []
                for cell in range(CELLS):  # a record of this epoch serves older snapshots, too, or nobody
                    value = txn.get(_key(cell, number))
                    if value is None:
                        continue
                    txn.delete(_key(cell, number))
                    if older >= 0 and txn.get(_key(cell, older)) is None:
                        txn.put(_key(cell, older), value)
                    else:
                        freed.append(_ENTRY.unpack(value)[0])
                if self._bug == "reuse-before-commit":
                    for slot in freed:
                        os.pwrite(self._store, bytes(CELL), slot * CELL)
            self._free += freed

    # --- the checkpoint ---

    def _checkpoint(self) -> None:
        newest = max(self.snapshots(), default=-1)
        with self._env.begin(db=self._preserved) as txn:
            needed = [cell for cell in self._pending if newest >= 0 and txn.get(_key(cell, newest)) is None]
        entries = []
        for cell in needed:
            old = os.pread(self._data, CELL, cell * CELL)
            slot = self._free.pop() if self._free else self._slots
            self._slots = max(self._slots, slot + 1)
            if self._bug != "index-before-store":
                os.pwrite(self._store, old, slot * CELL)
            entries.append((cell, slot, old))
        if entries and self._bug == "overwrite-before-index":
            self._write_in_place()
        if entries and self._bug != "index-before-store":
            self._sync(self._store, "checkpoint: store")
        if entries:
            with self._env.begin(write=True, db=self._preserved) as txn:
                for cell, slot, old in entries:
                    txn.put(_key(cell, newest), _ENTRY.pack(slot, zlib.crc32(old)))
        if self._bug == "index-before-store":
            for _, slot, old in entries:
                os.pwrite(self._store, old, slot * CELL)
            self._sync(self._store, "checkpoint: store")
        self._write_in_place()
        self._pending.clear()
        if self._appended:
            os.pwrite(self._log, _HEADER.pack(self._sequence), 0)
            self._sync(self._log, "checkpoint: log")  # or a replay of some old records would follow the loss of others
            self._appended = 0

    def _write_in_place(self) -> None:
        for cell, data in self._pending.items():
            os.pwrite(self._data, data, cell * CELL)
        if self._pending:
            self._sync(self._data, "checkpoint: data")


def _key(cell: int, number: int) -> bytes:
    return struct.pack(">II", cell, number)


def _checksum(sequence: int, cell: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack(">QI", sequence, cell)))
