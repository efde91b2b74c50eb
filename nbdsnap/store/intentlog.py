"""The intent log: acknowledged first overwrites, from before their old content is preserved until they are durable in
place.

A preallocated file: one page of header, then a ring.  Positions count bytes since the log was made and never wrap; a
position's place in the ring is its remainder.  All integers big-endian.

Header (rewritten in place; one sector, which a disk writes whole or not at all)::

    magic "NBDSNLOG"   u32 version   u32 clean  u64 life   u64 ring bytes   u64 tail position   u64 tail sequence
    u64 XXH3-64 of all before

Record, at a multiple of 8, never across the ring's end::

    u32 magic   u32 length   u64 life   u64 sequence   u64 synced   u64 offset   u32 volume   u32 zero   u64 checksum
    payload, padded with zeroes to a multiple of 8

* *Valid* is a record of the header's life, whose sequence is the one expected at its position, and whose checksum is
  right (XXH3-64 of the payload, seeded with XXH3-64 of the header before it).  Replay begins at the tail and ends at
  the first record that is not valid: what a power cut left behind it was not flushed, because a flush syncs all before
  it.
* ``synced`` is the last sequence known to be durable when the record was written.  A record that is not valid, though
  a later one says that it was durable, is damage and not the end: it is reported.
* ``life`` begins anew with each opening, once everything was replayed.  So a record that an earlier life left behind
  in the ring, unsynced and never replayed, can't be taken for a new one's successor.
* ``clean`` is 1 while no process has the log open and nothing is in it: then there is nothing to look for.
* A record of volume 0 is padding up to the ring's end.
* Appends write whole pages (the last one padded; its beginning is kept in memory: :class:`_Stage`), so that the kernel
  never has to read a page before it changes it: an append does not wait for the disk.  One call writes all records of
  one :meth:`IntentLog.append`.
* The tail moves by :meth:`IntentLog.retire`, durably, when all before it is durable in place.  Only then may these
  chunks be written past the log; else a replay would put old data over newer.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

from nbdsnap.errors import CorruptionError, DeviceError, FormatError
from nbdsnap.store.batchio import address_of
from nbdsnap.store.fileio import Buffer, FileIO
from nbdsnap.store.layout import DEFAULT_LOG_SIZE

log = logging.getLogger(__name__)

PAGE = 4096
VERSION = 1
MIN_SIZE = 64 << 10

MAX_PAYLOAD = 256 << 10
"""Bytes: a longer write waits for its preservation instead, which costs it little and saves copying it twice."""

_MAGIC = b"NBDSNLOG"
_RECORD_MAGIC = 0x4E424C52
_HEADER = struct.Struct(">8sIIQQQQ")
_RECORD = struct.Struct(">IIQQQQII")
_U64 = struct.Struct(">Q")
RECORD_BYTES = _RECORD.size + _U64.size

_ZEROES = bytes(PAGE)


STAGE = 512 << 10
"""Bytes of the log's end that are kept in memory in one piece: twice the longest record."""

SPARE_STAGES = 4
"""Pieces of memory that are kept for later when nothing in them is needed any more."""


class Intent:
    """A write that was acknowledged: ``data`` belongs at ``offset`` of the volume number ``volume``.

    ``end``: the log's position after it.  ``address``: where ``data`` lies in memory, if that is known.  Never changed;
    a plain class, since one is made for every such write.
    """

    __slots__ = ("address", "data", "end", "offset", "sequence", "volume")

    def __init__(
        self, sequence: int, volume: int, offset: int, data: memoryview, end: int, address: int | None = None
    ) -> None:
        self.address = address
        self.sequence = sequence
        self.volume = volume
        self.offset = offset
        self.data = data
        self.end = end


class _Stage:
    """The log's end in memory: its bytes from ``base``, a multiple of PAGE, on.

    Records are built here, and written from here; a write that begins in the middle of a page finds the page's
    beginning before it.  An intent's data is a part of it, too, so its memory is used again only when no part is left:
    a bytearray that has views can't be resized, which is how that is known (:func:`_is_free`).
    """

    def __init__(self, memory: bytearray, base: int) -> None:
        self.memory = memory
        self.base = base
        self.view = memoryview(memory)
        self.address = address_of(memory)


def _is_free(memory: bytearray) -> bool:
    """Whether no view of ``memory`` is left."""
    try:
        del memory[-1:]
    except BufferError:
        return False
    memory.append(0)
    return True


class IntentLog:
    """Opened.  Calls of :meth:`append` are serialised by the owner, those of :meth:`sync` and :meth:`retire` in
    here."""

    def __init__(self, io: FileIO, path: Path, size: int = DEFAULT_LOG_SIZE) -> None:
        self._io = io
        self._wanted_size = max(size, MIN_SIZE) // PAGE * PAGE
        self.path = path
        self.fd = io.open(path, os.O_RDWR | os.O_CREAT)
        self._sync_lock = threading.Lock()
        self.failure: str | None = None
        """Why the log takes nothing any more: a sync of it failed."""
        try:
            if io.size(self.fd) < PAGE or io.pread(self.fd, _HEADER.size, 0) == bytes(_HEADER.size):
                self._create()
            self._load()
        except OSError as error:
            io.close(self.fd)
            raise DeviceError(f"the intent log {path} can't be used: {error.strerror}") from None
        except BaseException:
            io.close(self.fd)
            raise
        self._head: int = self.tail
        self._stage: _Stage | None = None
        self._spare: deque[bytearray] = deque()
        self.next_sequence: int = self.tail_sequence
        self.synced_sequence = self.tail_sequence - 1

    def close(self) -> None:
        """Where the log is empty, say so, for a quick start.  If that fails, the next start finds out by reading."""
        try:
            if not self._clean and self.failure is None and self.tail_sequence == self.next_sequence:
                self._write_header(self._head, self.next_sequence, clean=True)
        except OSError as error:
            log.warning("the intent log %s could not be marked as empty, which it is: %s", self.path, error)
        finally:
            self._io.close(self.fd)

    def _create(self) -> None:
        self._make_ring()
        self.life, self.size, self.next_sequence = 1, self._wanted_size, 1
        self._write_header(0, 1)
        self._io.fsync_directory(self.path.parent)

    def _make_ring(self) -> None:
        """Written, not only allocated: a sync then has no metadata to write, which halves its time and more.

        And dropped from the page cache, where such writes leave large folios: in those, a short write costs ten times
        as much.
        """
        block = memoryview(bytes(1 << 20))
        end = PAGE + self._wanted_size
        for offset in range(PAGE, end, len(block)):
            self._io.write_all(self.fd, [block[: end - offset]], offset)
        self._io.truncate(self.fd, end)
        self._io.fdatasync(self.fd)
        self._io.drop_cached(self.fd)

    def _load(self) -> None:
        stored = self._io.pread(self.fd, _HEADER.size + _U64.size, 0)
        magic, version, clean, life, size, tail, sequence = _HEADER.unpack(stored[: _HEADER.size])
        if magic == _MAGIC and version > VERSION:
            raise FormatError(f"the intent log {self.path} has version {version}; this nbdsnap knows up to {VERSION}")
        if magic != _MAGIC or xxhash.xxh3_64_digest(stored[: _HEADER.size]) != stored[_HEADER.size :]:
            raise CorruptionError(
                f"the header of the intent log {self.path} is damaged",
                hint="writes that were acknowledged shortly before the last stop may be in it: see docs/durability.md",
            )
        self.life, self.size, self.tail, self.tail_sequence = life, size, tail, sequence
        self._clean = clean == 1

    # Writing

    def append(self, volume: int, writes: Sequence[tuple[int, memoryview]]) -> list[Intent]:
        """Put writes, each ``(offset, data)``, into the log (the page cache, not yet the disk).

        Returns the intents of as many, from the first on, as there is room for.
        """
        intents: list[Intent] = []
        if self._clean or self.failure is not None:
            return intents
        head = start = self._head
        sequence = self.next_sequence
        size, limit = self.size, self.tail + self.size - PAGE
        stage = self._stage
        hash64 = xxhash.xxh3_64_intdigest
        written = 0
        try:
            for offset, data in writes:
                length = len(data)
                needed = RECORD_BYTES + ((length + 7) & ~7)
                to_end = size - head % size
                if length > MAX_PAYLOAD or head + needed + (to_end if to_end < needed else 0) > limit:
                    break
                if (
                    stage is None
                    or to_end < needed
                    or (to_end == size and head != stage.base)  # the record before ended where the ring does
                    or head + needed - stage.base > STAGE - PAGE
                ):
                    if head > start:
                        assert stage is not None
                        self._write(stage, start, head, sequence)
                        written = len(intents)
                    if to_end < needed:
                        self._pad(to_end)
                        head, sequence = self._head, self.next_sequence
                    stage, start = self._next_stage(), head
                place = head - stage.base
                view = stage.view
                _RECORD.pack_into(
                    view, place, _RECORD_MAGIC, length, self.life, sequence, self.synced_sequence, offset, volume, 0
                )
                checksum = hash64(data, hash64(view[place : place + _RECORD.size]))
                _U64.pack_into(view, place + _RECORD.size, checksum)
                begin = place + RECORD_BYTES
                kept = view[begin : begin + length]
                kept[:] = data
                if length & 7:
                    view[begin + length : place + needed] = _ZEROES[: -length & 7]
                head += needed
                intents.append(Intent(sequence, volume, offset, kept, head, stage.address + begin))
                sequence += 1
            if head > start:
                assert stage is not None
                self._write(stage, start, head, sequence)
                written = len(intents)
        except OSError:
            pass  # what was written of it is overwritten by the next ones, or is not valid
        del intents[written:]
        return intents

    @property
    def is_half_full(self) -> bool:
        return bool(self._head - self.tail > self.size // 2)

    def _pad(self, count: int) -> None:
        """Fill the ring up to its end."""
        filler = bytearray(count)
        sequence = self.next_sequence
        if count >= RECORD_BYTES:
            header = _RECORD.pack(
                _RECORD_MAGIC, count - RECORD_BYTES, self.life, sequence, self.synced_sequence, 0, 0, 0
            )
            filler[: _RECORD.size] = header
            _U64.pack_into(filler, _RECORD.size, xxhash.xxh3_64_intdigest(b"", xxhash.xxh3_64_intdigest(header)))
            sequence += 1
        page = self._page_so_far()
        self._io.write_all(self.fd, [page, filler], PAGE + self._head % self.size - len(page))
        self._head += count
        self.next_sequence = sequence

    def _page_so_far(self) -> bytes:
        """The beginning of the page that the head is in."""
        count = self._head % PAGE
        if self._stage is None or not count:
            return b""
        place = self._head - self._stage.base
        return bytes(self._stage.view[place - count : place])

    def _next_stage(self) -> _Stage:
        """Memory for what comes from the head on."""
        page = self._page_so_far()
        self._forget_stage()
        spare = self._spare
        memory = spare.popleft() if spare and _is_free(spare[0]) else bytearray(STAGE)
        while len(spare) > SPARE_STAGES and _is_free(spare[0]):
            spare.popleft()
        self._stage = _Stage(memory, self._head - len(page))
        self._stage.view[: len(page)] = page
        return self._stage

    def _write(self, stage: _Stage, start: int, end: int, sequence: int) -> None:
        """Write the staged records of [start, end), which end before ``sequence``, as whole pages."""
        low = (start - stage.base) & -PAGE
        place = end - stage.base
        high = (place + PAGE - 1) & -PAGE
        stage.view[place:high] = _ZEROES[: high - place]
        data = stage.view[low:high]
        offset = PAGE + (stage.base + low) % self.size
        count = self._io.pwrite(self.fd, data, offset)
        if count != len(data):
            self._io.write_all(self.fd, [data[count:]], offset + count)
        self._head = end
        self.next_sequence = sequence

    def _forget_stage(self) -> None:
        """The head is at the beginning of a page, and what comes has nothing to do with what was."""
        if self._stage is not None:
            self._spare.append(self._stage.memory)
            self._stage.view.release()
            self._stage = None

    def sync(self) -> None:
        """Make durable all that was appended before this call.  A failed sync is final: the log takes nothing any
        more."""
        last = self.next_sequence - 1
        with self._sync_lock:
            if self.failure is not None:
                raise DeviceError(self.failure)
            if self.synced_sequence < last:
                self._sync_now()

    def retire(self, position: int, sequence: int) -> None:
        """All before ``position`` is durable in place; ``sequence`` is the next record's.  Durable on return."""
        with self._sync_lock:
            if self.failure is not None:
                raise DeviceError(self.failure)
            self._write_header(position, sequence)

    def begin_life(self) -> None:
        """After the replay, when all of it is durable in place: an empty log, in which nothing older is valid.

        A log that was left empty begins when it is first needed (:meth:`wake`): an opening alone changes nothing.
        """
        if not self._clean:
            with self._sync_lock:
                self._new_life()
                self._write_header(self._head, self.next_sequence)

    def wake(self) -> None:
        """Make a log that was left empty take records; until then :meth:`append` takes none.

        The header need not be durable before the records, whose first sync takes it along: until then the old one says
        that the log is empty, which is as true as it was, and no later life is taken for this one.
        """
        if self._clean and self.failure is None:
            with self._sync_lock:
                self._new_life()
                self._put_header(self._head, self.next_sequence)
                self.tail, self.tail_sequence = self._head, self.next_sequence
                self._clean = False

    def _new_life(self) -> None:
        self.life = max(self.life + 1, time.time_ns())  # unlike any before, even if that one's header was lost
        self._head = -(-self._head // PAGE) * PAGE
        if self.size != self._wanted_size:
            self._make_ring()
            self.size = self._wanted_size
        self._forget_stage()

    def renew(self) -> None:
        """Begin again in a new file, after a failure.  All that was appended is durable elsewhere; no append is made
        meanwhile."""
        with self._sync_lock:
            new, old = self.path.with_name(f"{self.path.name}.new"), self.fd
            self.fd = self._io.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                self._make_ring()
                self.size = self._wanted_size
                self.life += 1
                self._head = -(-self._head // PAGE) * PAGE
                self._forget_stage()
                self._write_header(self._head, self.next_sequence)
                self._io.rename(new, self.path)
                self._io.fsync_directory(self.path.parent)
            except OSError:
                self._io.close(self.fd)
                self.fd = old
                raise
            self._io.close(old)
            self.failure = None

    def _write_header(self, tail: int, sequence: int, *, clean: bool = False) -> None:
        self._put_header(tail, sequence, clean=clean)
        self._sync_now()
        self.tail, self.tail_sequence = tail, sequence  # not before: append() reuses what lies before the tail

    def _put_header(self, tail: int, sequence: int, *, clean: bool = False) -> None:
        header = _HEADER.pack(_MAGIC, VERSION, int(clean), self.life, self.size, tail, sequence)
        try:
            self._io.write_all(self.fd, [header + xxhash.xxh3_64_digest(header)], 0)
        except OSError as error:
            self._fail(error)
            raise

    def _sync_now(self) -> None:
        last = self.next_sequence - 1
        try:
            self._io.fdatasync(self.fd)
        except OSError as error:
            self._fail(error)
            raise
        self.synced_sequence = last

    def _fail(self, error: OSError) -> None:
        self.failure = f"the intent log {self.path} failed ({error.strerror}): writes since its last sync may be lost"

    # Reading

    def replay(self) -> Iterator[Intent]:
        """The valid records from the tail on; afterwards the log goes on behind them.  Raises CorruptionError for
        damage."""
        if self._clean:
            return
        ring = self._read_ring()
        position, sequence = self.tail, self.tail_sequence
        for intent in self._parse_all(ring, position, sequence):
            if intent.volume:
                yield intent
            position, sequence = intent.end, intent.sequence + 1
        self._head, self.next_sequence, self.synced_sequence = position, sequence, sequence - 1
        self._check_end(ring, sequence)

    def live(self) -> list[Intent]:
        """What was appended before this call and is not retired.  From where no call of :meth:`retire` is made
        meanwhile."""
        end = self.next_sequence
        found = self._parse_all(self._read_ring(), self.tail, self.tail_sequence)
        intents = [intent for intent in found if intent.sequence < end]
        if self.tail_sequence + len(intents) != end:
            raise CorruptionError(f"the intent log {self.path} does not read back as it was written")
        return [intent for intent in intents if intent.volume]

    def _read_ring(self) -> memoryview:
        ring = memoryview(bytearray(self.size))
        self._io.read_into(self.fd, ring, PAGE)
        return ring

    def _parse_all(self, ring: memoryview, position: int, sequence: int) -> Iterator[Intent]:
        """Valid records from there on, padding too."""
        end = position + self.size
        while position < end:
            to_end = self.size - position % self.size
            if to_end < RECORD_BYTES:
                position += to_end
                continue
            intent = self._parse(ring, position, sequence)
            if intent is None:
                return
            yield intent
            position, sequence = intent.end, sequence + 1

    def _parse(self, ring: memoryview, position: int, sequence: int) -> Intent | None:
        start = position % self.size
        stored = ring[start : start + RECORD_BYTES]
        magic, length, life, number, _, offset, volume, _ = _RECORD.unpack(stored[: _RECORD.size])
        if magic != _RECORD_MAGIC or life != self.life or number != sequence:
            return None
        end = start + RECORD_BYTES + ((length + 7) & ~7)
        if end > self.size:
            return None
        data = ring[start + RECORD_BYTES : start + RECORD_BYTES + length]
        seed = xxhash.xxh3_64_intdigest(stored[: _RECORD.size])
        covered = data if volume else b""
        if xxhash.xxh3_64_digest(covered, seed) != stored[_RECORD.size :]:
            return None
        return Intent(number, volume, offset, data, position + end - start)

    def _check_end(self, ring: memoryview, sequence: int) -> None:
        """No valid record behind the end may say that ``sequence`` was durable.

        A power cut may have torn what was not: what such a record says means nothing.
        """
        pattern = struct.pack(">I", _RECORD_MAGIC)
        content = ring.obj
        assert isinstance(content, bytearray)
        place = content.find(pattern)
        while place >= 0 and place + RECORD_BYTES <= self.size:
            _, _, life, number, synced, _, _, _ = _RECORD.unpack(ring[place : place + _RECORD.size])
            says_so = life == self.life and number > sequence and synced >= sequence
            if says_so and self._parse(ring, place, number) is not None:
                raise CorruptionError(
                    f"the intent log {self.path} is damaged at record {sequence}, which was durable",
                    hint="writes that were acknowledged shortly before the last stop are in it: see docs/durability.md",
                )
            place = content.find(pattern, place + 1)


def save_intents(io: FileIO, path: Path, intents: Iterable[Intent]) -> None:
    """Make a file of intents, durably and whole, in place of the one that may be there."""
    new = path.with_name(f"{path.name}.new")
    fd = io.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        records: list[Buffer] = []
        for intent in intents:
            header = _RECORD.pack(_RECORD_MAGIC, len(intent.data), 0, 0, 0, intent.offset, intent.volume, 0)
            checksum = xxhash.xxh3_64_digest(intent.data, xxhash.xxh3_64_intdigest(header))
            records += (header, checksum, intent.data)
        io.write_all(fd, records, 0)
        io.fdatasync(fd)
    finally:
        io.close(fd)
    io.rename(new, path)
    io.fsync_directory(path.parent)


def load_intents(io: FileIO, path: Path) -> list[Intent]:
    """What :func:`save_intents` wrote, in order; CorruptionError where it is damaged or cut."""
    intents, damage = read_intents(io, path)
    if damage is not None:
        raise CorruptionError(damage, hint="see: nbdsnap check")
    return intents


def read_intents(io: FileIO, path: Path) -> tuple[list[Intent], str | None]:
    """What :func:`save_intents` wrote, in order, as far as it can be read; and what is wrong behind that."""
    fd = io.open(path, os.O_RDONLY)
    try:
        content = memoryview(bytearray(io.size(fd)))
        io.read_into(fd, content, 0)
    finally:
        io.close(fd)
    intents: list[Intent] = []
    place = 0
    while place < len(content):
        header = content[place : place + _RECORD.size]
        start = place + RECORD_BYTES
        if len(header) < _RECORD.size:
            return intents, f"{path} is cut short"
        magic, length, _, _, _, offset, volume, _ = _RECORD.unpack(header)
        data = content[start : start + length]
        seed = xxhash.xxh3_64_intdigest(header)
        if magic != _RECORD_MAGIC or xxhash.xxh3_64_digest(data, seed) != content[place + _RECORD.size : start]:
            return intents, f"{path} is damaged at byte {place}"
        intents.append(Intent(0, volume, offset, data, 0))
        place = start + length
    return intents, None


def scan(io: FileIO, path: Path) -> list[tuple[int, Intent]]:
    """Every whole record that lies anywhere in a log file, with its life, ascending by life and sequence.

    For a log whose header or chain is damaged: which of them were retired already can't be told from this.
    """
    fd = io.open(path, os.O_RDONLY)
    try:
        content = bytearray(io.size(fd))
        io.read_into(fd, memoryview(content), 0)
    finally:
        io.close(fd)
    view = memoryview(content)
    found: list[tuple[int, Intent]] = []
    pattern = struct.pack(">I", _RECORD_MAGIC)
    place = content.find(pattern, PAGE)
    while 0 <= place <= len(content) - RECORD_BYTES:
        header = view[place : place + _RECORD.size]
        _, length, life, sequence, _, offset, volume, _ = _RECORD.unpack(header)
        data = view[place + RECORD_BYTES : place + RECORD_BYTES + length]
        checksum = xxhash.xxh3_64_digest(data, xxhash.xxh3_64_intdigest(header))
        if volume and len(data) == length and checksum == view[place + _RECORD.size : place + RECORD_BYTES]:
            found.append((life, Intent(sequence, volume, offset, data, 0)))
        place = content.find(pattern, place + 8)
    return sorted(found, key=lambda one: (one[0], one[1].sequence))
