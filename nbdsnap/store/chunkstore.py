"""The exception store: preserved chunks, in slots of one raw file.

Invariants
----------
* A slot is *free*, *reserved* (handed out, its record not yet committed) or *used* (a committed record points at it).
* The set of used slots lies in the index's table ``slots`` and changes in the transaction that adds or removes the
  records.  In memory, reserved slots count as taken.
* A slot that a transaction frees may be written again only after that transaction is durable: :meth:`free` is called
then.
* Free space is given back to the file system by punching holes.  A crash before that leaves space taken, and no harm:
  the slot is free all the same.

The owner serialises all calls but those that read, :meth:`sync` and :meth:`write_inside`, which any thread may make.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nbdsnap.errors import CorruptionError, NoSpaceError
from nbdsnap.store import chunkset
from nbdsnap.store.fileio import Buffer, FileIO
from nbdsnap.store.layout import BLOCK, BLOCK_SHIFT, CHUNK, CHUNK_SHIFT, MAX_SLOTS

log = logging.getLogger(__name__)

INDEX_RESERVE = 16 << 20
"""Bytes of the file system (or a 16th of it, if that is less) that preserved data leaves free."""

PROBES = 8
"""Slots that are tried to find out whether a disk still answers."""

Run = tuple[int, int]
"""``(first slot, count)``."""


class ChunkStore:
    """``used``: ``(block, set)`` of the slots in use, from the index.  ``limit``: bytes, or None.

    The file is made where nothing is in use.  ``read_only``: never; only the reading methods work then.
    CorruptionError where it is not there, and should be.
    """

    def __init__(
        self,
        io: FileIO,
        path: Path,
        used: Iterable[tuple[int, int]] = (),
        limit: int | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        self._io = io
        self.path = path
        self.limit = limit
        self._taken: dict[int, int] = dict(used)
        """Block -> set of slots that are reserved or used."""
        try:
            self.fd = io.open(path, os.O_RDONLY if read_only else os.O_RDWR | (0 if self._taken else os.O_CREAT))
        except FileNotFoundError:
            raise CorruptionError(
                f"{path} is missing: it holds what snapshots have preserved",
                hint="restore it from a backup of the pool; or see: nbdsnap check --repair --dry-run",
            ) from None
        self._direct_fd = None if read_only else _open_direct(io, path)
        self.used_slots = sum(taken.bit_count() for taken in self._taken.values())
        """Reserved slots included."""
        self._end_block = max(self._taken, default=-1) + 1
        self._holes = sorted(
            (b for b in range(self._end_block) if self._taken.get(b, 0) != chunkset.FULL), reverse=True
        )
        """Stack of blocks below the end that may have free slots, the lowest on top."""
        self._queued = set(self._holes)
        self._sync_lock = threading.Lock()
        self.failed_syncs = 0

    def close(self) -> None:
        self._close_direct()
        self._io.close(self.fd)

    def _close_direct(self) -> None:
        fd, self._direct_fd = self._direct_fd, None
        if fd is not None:
            self._io.close(fd)

    def reserve(self, count: int) -> list[Run]:
        """``count`` free slots, in as few runs as come cheaply.  NoSpaceError where limit or disk do not allow them."""
        if self.limit is not None and (self.used_slots + count) * CHUNK > self.limit:
            raise NoSpaceError(
                f"the exception store is at its limit of {self.limit} bytes",
                hint="delete snapshots, or raise store_limit",
            )
        if count << CHUNK_SHIFT > self.free_disk_bytes:
            raise NoSpaceError(f"the file system of {self.path} is full", hint="free some space, or delete snapshots")
        if (self._end_block << BLOCK_SHIFT) + count > MAX_SLOTS:
            raise NoSpaceError("the exception store is as large as its format allows")
        runs: list[Run] = []
        left = count
        while left:
            block = self._block_with_room()
            taken = self._taken.get(block, 0)
            for first, end in chunkset.runs(~taken & chunkset.FULL):
                length = min(end - first, left)
                taken |= chunkset.span(first, first + length)
                _append_run(runs, (block << BLOCK_SHIFT) + first, length)
                left -= length
                if not left:
                    break
            self._taken[block] = taken
        self.used_slots += count
        return runs

    def _block_with_room(self) -> int:
        while self._holes:
            block = self._holes[-1]
            if self._taken.get(block, 0) != chunkset.FULL:
                return block
            self._queued.discard(self._holes.pop())
        self._holes.append(self._end_block)
        self._queued.add(self._end_block)
        self._end_block += 1
        return self._holes[-1]

    def release(self, runs: Iterable[Run]) -> None:
        """Give back slots that were reserved and never committed, or freed by a durable transaction."""
        for first, count in runs:
            self.used_slots -= count
            for block, low, high in _by_block(first, count):
                self._taken[block] = self._taken.get(block, 0) & ~chunkset.span(low, high)
                if block not in self._queued:
                    self._queued.add(block)
                    self._holes.append(block)

    def free(self, slots: list[int]) -> None:
        """Slots of a durable transaction's removed records: make them free and give their space back."""
        runs = list(coalesce(sorted(slots)))
        try:
            for first, count in runs:
                self._io.punch_hole(self.fd, first << CHUNK_SHIFT, count << CHUNK_SHIFT)
        except OSError as error:  # they are free all the same, and may be written again
            log.warning("the space of %d slots of %s can't be given back now: %s", len(slots), self.path, error)
        self.release(runs)

    def write(self, runs: Sequence[Run], buffers: Sequence[Buffer], *, aligned: bool = False) -> None:
        """Write the chunks in ``buffers`` (whole chunks, in order) to the slots of ``runs``.

        ``aligned``: each begins at a page's border in memory.  They are then written past the page cache, where that is
        possible: what is preserved is seldom read soon, and is synced at once.
        """
        position, offset_in = 0, 0
        for first, count in runs:
            batch: list[Buffer] = []
            need = count << CHUNK_SHIFT
            while need:
                view = memoryview(buffers[position])[offset_in:]
                part = view[:need]
                batch.append(part)
                need -= len(part)
                offset_in += len(part)
                if len(part) == len(view):
                    position, offset_in = position + 1, 0
            if not (aligned and self._write_direct(batch, first << CHUNK_SHIFT)):
                self._io.write_all(self.fd, batch, first << CHUNK_SHIFT)

    def _write_direct(self, buffers: Sequence[Buffer], offset: int) -> bool:
        if self._direct_fd is None:
            return False
        try:
            self._io.write_all(self._direct_fd, buffers, offset)
            return True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        log.info("%s can't be written past the page cache", self.path)  # or it was, in part, and can't go on there
        self._close_direct()
        return False

    def sync(self, failed_before: int | None = None) -> None:
        """Make durable what was written before this call.

        ``failed_before``: ``failed_syncs`` when the writing began.  The kernel tells an error of writing back only
        once, and may have told it to another thread's sync meanwhile: then this one fails, too.
        """
        with self._sync_lock:
            try:
                self._io.fdatasync(self.fd)
            except OSError:
                self.failed_syncs += 1
                raise
            if failed_before is not None and self.failed_syncs != failed_before:
                raise OSError(errno.EIO, "an earlier sync of it failed", str(self.path))

    def read_into(self, buffer: memoryview, slot: int, inside: int = 0) -> None:
        """Fill ``buffer`` from byte ``inside`` of ``slot`` on, and from the slots after it."""
        self._io.read_into(self.fd, buffer, (slot << CHUNK_SHIFT) + inside)

    def read_again(self, buffer: memoryview, slot: int) -> set[int]:
        """Read slot by slot what could not be read as a whole; the positions of those that can't be.

        Raises the error where the disk does not answer at all.
        """
        failures: dict[int, OSError] = {}
        for position in range(len(buffer) >> CHUNK_SHIFT):
            try:
                self.read_into(buffer[position << CHUNK_SHIFT : (position + 1) << CHUNK_SHIFT], slot + position)
            except OSError as error:
                failures[position] = error
        if failures and not self._answers({slot + position for position in failures}):
            raise failures[min(failures)]
        return set(failures)

    def _answers(self, bad: set[int]) -> bool:
        """Whether the disk takes a sync, and gives back another used slot near these; where there is none, the sync
        decides."""
        self.sync()
        block = min(bad) >> BLOCK_SHIFT
        others = [(block << BLOCK_SHIFT) + number for number in chunkset.iterate(self._taken.get(block, 0))]
        others = sorted(set(others) - bad, key=lambda other: abs(other - min(bad)))[:PROBES]
        probe = memoryview(bytearray(CHUNK))
        for other in others:
            try:
                self._io.drop_cached(self.fd, other << CHUNK_SHIFT, CHUNK)
                self.read_into(probe, other)
                return True
            except OSError:
                continue
        return not others

    def read_now(self, buffer: memoryview, slot: int, inside: int = 0) -> bool:
        """The same from the page cache only; False where the disk would be waited for."""
        try:
            return self._io.preadv(self.fd, [buffer], (slot << CHUNK_SHIFT) + inside, os.RWF_NOWAIT) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return False
            raise

    def write_inside(self, slot: int, inside: int, data: Buffer) -> None:
        """Write ``data`` from byte ``inside`` of ``slot`` on.  Any thread may, for a slot whose owner it is."""
        self._io.write_all(self.fd, [data], (slot << CHUNK_SHIFT) + inside)

    def will_need(self, slot: int, count: int = 1) -> None:
        self._io.will_need(self.fd, slot << CHUNK_SHIFT, count << CHUNK_SHIFT)

    @property
    def file_slots(self) -> int:
        """Slots that lie in the file, the last one perhaps in part."""
        return (self._io.size(self.fd) + CHUNK - 1) >> CHUNK_SHIFT

    @property
    def used_bytes(self) -> int:
        return self.used_slots * CHUNK

    @property
    def slots_within_limit(self) -> int | None:
        """As many as the limit allows."""
        return None if self.limit is None else self.limit // CHUNK

    @property
    def free_disk_bytes(self) -> int:
        """What the store's file system can still take, less what is kept for the index: without it, nothing could be
        deleted on a full disk."""
        free, size = self._io.free_bytes(self.fd)
        return max(0, free - min(INDEX_RESERVE, size // 16))

    @property
    def allocated_bytes(self) -> int:
        return self._io.allocated_bytes(self.fd)


def _open_direct(io: FileIO, path: Path) -> int | None:
    """The file, opened for writes past the page cache; None where its file system has no such thing."""
    try:
        return io.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


def coalesce(slots: Iterable[int]) -> Iterator[Run]:
    """Ascending slots as maximal runs."""
    first = count = 0
    for slot in slots:
        if count and slot == first + count:
            count += 1
        else:
            if count:
                yield first, count
            first, count = slot, 1
    if count:
        yield first, count


def _append_run(runs: list[Run], first: int, count: int) -> None:
    if runs and sum(runs[-1]) == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((first, count))


def _by_block(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """A run of slots cut at block borders: ``(block, low, high)`` with slots [low, high) of the block."""
    end = first + count
    while first < end:
        block = first >> BLOCK_SHIFT
        stop = min(end, (block + 1) << BLOCK_SHIFT)
        yield block, first & (BLOCK - 1), stop - (block << BLOCK_SHIFT)
        first = stop
