"""The layout of a delta stream: docs/delta-format.md in code.

A stream is a prologue and frames.  All integers are big-endian; a format change that an old reader would misread raises
VERSION.  Whatever is read here came from a peer or a disk: it is checked, and refused with an error, never asserted on.

=============  ===================================================================================================
prologue       MAGIC, version, 6 bytes of zero
HEADER         the first frame: what the stream holds
EXTENTS        a table of extents, then their stored data
CHECKPOINT     all below a position has been sent; the digest of the stream so far
END            the last frame: totals, and the digest of the stream so far
ABORT          instead of END: why the sender gave up
=============  ===================================================================================================

A frame's checksum covers its header and its body.  The header carries the frame's number, so a frame that is missing,
repeated or moved is noticed at once.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum

import xxhash

from nbdsnap.errors import CorruptionError, FormatError

Buffer = bytes | bytearray | memoryview

MAGIC = b"\x89nbdelta"
VERSION = 1

PROLOGUE = struct.Struct(">8sH6s")
FRAME = struct.Struct(">BB2xIQQ")
"""Type, flags (0), length of the body, number of the frame, checksum."""

FRAME_CHECKED = 16
"""Bytes of a frame's header that its checksum covers: all before the checksum itself."""

ENTRY = struct.Struct(">QQIBB2xQ")
"""Of one extent: offset, length, bytes stored, encoding, flags, checksum of the base's content."""

HAS_BASE = 1
"""Flag of an entry: its checksum of the base's content is there."""

CHECKPOINT_BODY = struct.Struct(">Q32s")
END_BODY = struct.Struct(">QQ32s")
HEADER_BODY = struct.Struct(">16s16s16sQQqQQ32sHHH")

DIGEST_SIZE = 32
NO_DIGEST = bytes(DIGEST_SIZE)

MAX_DATA = 1 << 20
"""Bytes of volume content that the extents of one frame may have in all, but for zeroes: what a reader has to hold."""

MAX_ENTRIES = 4096
MAX_BODY = MAX_DATA + MAX_ENTRIES * ENTRY.size + 4
MAX_NAME = 128
MAX_TEXT = 4096
"""Bytes of an ABORT's message."""

MAX_SIZE = 1 << 62
"""Bytes of a volume: offsets and lengths below it can be added without care."""

MAX_WINDOW = 1 << 22
"""Bytes that decompressing one extent may look back: the base's content and its own."""


class FrameType(IntEnum):
    HEADER = 1
    EXTENTS = 2
    CHECKPOINT = 3
    END = 4
    ABORT = 5


class Encoding(IntEnum):
    """How an extent's content is stored."""

    RAW = 0
    ZERO = 1
    """All zeroes: nothing is stored."""
    ZSTD = 2
    """One Zstandard frame."""
    DIFF = 3
    """One Zstandard frame, whose dictionary (raw content) is what the base holds in the extent's range."""


@dataclass(frozen=True)
class Point:
    """A snapshot, wherever it is: ``id`` says that two are the same."""

    id: uuid.UUID
    name: str
    size: int


@dataclass(frozen=True)
class Header:
    """What a stream holds.

    ``base``: the snapshot that the extents are to be applied to; None: nothing, so the extents cover all of ``to``.
    ``start``: extents below this offset were sent before, in a stream that was cut; ``resumed``: the digest of that
    stream at its checkpoint there.
    ``estimate``: bytes of the volume that will be looked at, for progress; 0 where it is not known.
    """

    volume_id: uuid.UUID
    volume: str
    to: Point
    created: datetime
    base: Point | None = None
    start: int = 0
    resumed: bytes = NO_DIGEST
    estimate: int = 0

    def pack(self) -> bytes:
        base_id, base_name, base_size = (self.base.id.bytes, self.base.name, self.base.size) if self.base else NO_POINT
        names = [name.encode("ascii") for name in (self.volume, self.to.name, base_name)]
        fixed = HEADER_BODY.pack(
            self.volume_id.bytes,
            self.to.id.bytes,
            base_id,
            self.to.size,
            base_size,
            (self.created - _EPOCH) // _MICROSECOND,
            self.start,
            self.estimate,
            self.resumed,
            *map(len, names),
        )
        return fixed + b"".join(names)

    @classmethod
    def unpack(cls, body: Buffer) -> Header:
        data = bytes(body)
        if len(data) < HEADER_BODY.size:
            raise damaged("its header is too short")
        volume_id, to_id, base_id, size, base_size, created, start, estimate, resumed, *lengths = (
            HEADER_BODY.unpack_from(data)
        )
        if len(data) != HEADER_BODY.size + sum(lengths) or max(lengths) > MAX_NAME:
            raise damaged("the names in its header have no valid length")
        names: list[str] = []
        position = HEADER_BODY.size
        for length in lengths:
            try:
                names.append(data[position : position + length].decode("ascii"))
            except UnicodeDecodeError:
                raise damaged("a name in its header is no name") from None
            position += length
        volume, to_name, base_name = names
        if not (0 < size < MAX_SIZE and base_size < MAX_SIZE and start <= size):
            raise damaged("a size in its header is out of range")
        try:
            when = _EPOCH + created * _MICROSECOND
        except OverflowError:
            raise damaged("the time in its header is out of range") from None
        base = None
        if base_id != NO_POINT[0]:
            base = Point(uuid.UUID(bytes=base_id), base_name, base_size)
        elif base_name or base_size:
            raise damaged("its header names a base without saying which")
        to = Point(uuid.UUID(bytes=to_id), to_name, size)
        return cls(uuid.UUID(bytes=volume_id), volume, to, when, base, start, resumed, estimate)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
NO_POINT = (bytes(16), "", 0)


def new_digest() -> hashlib._Hash:
    return hashlib.sha256(usedforsecurity=False)


def checksum(data: Buffer) -> int:
    """Of the base's content."""
    return xxhash.xxh3_64_intdigest(data)


def frame_checksum(start: Buffer, *body: Buffer) -> int:
    """``start``: the first FRAME_CHECKED bytes of the frame's header."""
    state = xxhash.xxh3_64(start)
    for part in body:
        state.update(part)
    return state.intdigest()


def pack_prologue() -> bytes:
    return PROLOGUE.pack(MAGIC, VERSION, bytes(6))


def check_prologue(data: Buffer) -> None:
    magic, version, rest = PROLOGUE.unpack(data)
    if magic != MAGIC:
        raise FormatError("this is no delta stream", hint="make one with `nbdsnap send`")
    if version > VERSION:
        raise FormatError(
            f"the delta stream has format {version}; this nbdsnap knows up to {VERSION}",
            hint="use the newer nbdsnap that made it",
        )
    if version == 0 or rest != bytes(6):
        raise damaged("its first 16 bytes are wrong")


def damaged(what: str) -> CorruptionError:
    return CorruptionError(f"the delta stream is damaged: {what}", hint="send it again")
