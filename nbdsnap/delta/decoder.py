"""Reading a delta stream: bytes in, events out, and nothing believed.

The decoder says where the next bytes belong (:meth:`Decoder.wanted`), the caller puts them there, from a pipe, a socket
or a file, and says how many (:meth:`Decoder.filled`), and takes the event that they completed, if they did.  So the
content of an extent is read where it stays.  :meth:`Decoder.feed` does the same from bytes that are there already.

What holds for every event: its frame's checksum was right, its number was the next, its extents lie in the volume,
ascend, do not overlap, and leave no gap where there is no base.  What does not hold before the :class:`End`: that all
is there, and that nobody forged it.  Each extent's content is checked again when it is asked for.

Memory: one frame, MAX_BODY bytes, and what its extents unpack to, MAX_DATA bytes, whatever the stream says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

import zstandard

from nbdsnap.delta.format import (
    CHECKPOINT_BODY,
    DIGEST_SIZE,
    END_BODY,
    ENTRY,
    FRAME,
    FRAME_CHECKED,
    HAS_BASE,
    MAX_BODY,
    MAX_DATA,
    MAX_ENTRIES,
    MAX_TEXT,
    MAX_WINDOW,
    PROLOGUE,
    Buffer,
    Encoding,
    FrameType,
    Header,
    check_prologue,
    checksum,
    damaged,
    frame_checksum,
    new_digest,
)
from nbdsnap.errors import DeltaCutError, WrongBaseError


@dataclass(frozen=True)
class Extent:
    """``base``: the checksum of what the base holds there; None where the stream does not say."""

    offset: int
    length: int
    encoding: Encoding
    stored: memoryview
    base: int | None

    def content(self, base: Buffer | None = None) -> Buffer | None:
        """What belongs there; None for zeroes.  ``base``: what is there now, needed for a difference.

        Raises WrongBaseError where ``base`` is given and is not what it was, CorruptionError for bad data.
        """
        if base is not None and self.base is not None and checksum(base) != self.base:
            raise WrongBaseError(
                f"the content at offset {self.offset} is not what the delta was made from",
                hint="apply it to what its header names as its base",
            )
        match self.encoding:
            case Encoding.RAW:
                return self.stored
            case Encoding.ZERO:
                return None
            case Encoding.ZSTD:
                return self._unpack(None)
            case Encoding.DIFF:
                assert base is not None
                return self._unpack(bytes(base))

    def _unpack(self, base: bytes | None) -> bytes:
        dictionary = None
        if base is not None:
            dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        try:
            parameters = zstandard.get_frame_parameters(self.stored)
            if parameters.content_size != self.length:
                raise damaged(f"the extent at offset {self.offset} unpacks to another length than it says")
            reader = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=MAX_WINDOW)
            content: bytes = reader.decompress(self.stored, max_output_size=self.length, allow_extra_data=False)
        except zstandard.ZstdError:
            raise damaged(f"the extent at offset {self.offset} does not unpack") from None
        if len(content) != self.length:
            raise damaged(f"the extent at offset {self.offset} unpacks to another length than it says")
        return content


@dataclass(frozen=True)
class Extents:
    """Valid until the caller is done with it: its memory is its own."""

    extents: list[Extent]


@dataclass(frozen=True)
class Checkpoint:
    """All below ``position`` has come, and is as it was sent."""

    position: int
    digest: bytes


@dataclass(frozen=True)
class End:
    """All has come, and is as it was sent."""

    extents: int
    covered: int
    """Bytes of the volume that the extents cover."""
    digest: bytes


Event = Header | Extents | Checkpoint | End


class _State(Enum):
    PROLOGUE = auto()
    FRAME = auto()
    BODY = auto()
    ENDED = auto()


class Decoder:
    """One stream.  ``received``: bytes of it so far.  After an error it must not be used any more."""

    def __init__(self) -> None:
        self._digest = new_digest()
        self._header: Header | None = None
        self._number = 0
        self._position = 0
        self._extents = 0
        self._bytes = 0
        self._idle = True
        self._kind = FrameType.HEADER
        self._frame = b""
        self.received = 0
        self._want(_State.PROLOGUE, PROLOGUE.size)

    def _want(self, state: _State, count: int) -> None:
        self._state = state
        self._buffer = memoryview(bytearray(count))
        self._done = 0

    @property
    def ended(self) -> bool:
        return self._state is _State.ENDED

    def wanted(self) -> memoryview:
        """Where the next bytes go; empty after the end."""
        return self._buffer[self._done :]

    def filled(self, count: int) -> Event | None:
        """``count`` bytes have been put into :meth:`wanted`: what they completed."""
        self._done += count
        self.received += count
        if self._done < len(self._buffer) or self.ended:
            return None
        match self._state:
            case _State.PROLOGUE:
                check_prologue(self._buffer)
                self._digest.update(self._buffer)
                self._want(_State.FRAME, FRAME.size)
            case _State.FRAME:
                return self._begin_frame()
            case _State.BODY:
                return self._end_frame()
        return None

    def feed(self, data: Buffer) -> Iterator[Event]:
        """Events of ``data``.  CorruptionError for bytes after the end."""
        view = memoryview(data).cast("B")
        while view:
            place = self.wanted()
            if not place:
                raise damaged("it goes on after its end")
            count = min(len(place), len(view))
            place[:count] = view[:count]
            event = self.filled(count)
            view = view[count:]
            if event is not None:
                yield event

    def close(self) -> None:
        """No more bytes come.  DeltaCutError where some are missing."""
        if self.ended:
            return
        if self.received == 0:
            raise DeltaCutError("there is no delta stream: nothing came", hint="look at what its sender says")
        raise DeltaCutError(
            f"the delta stream was cut after {self.received} bytes", hint="send it again, or what is missing of it"
        )

    # Frames

    def _begin_frame(self) -> Event | None:
        kind, flags, length, number, _ = FRAME.unpack(self._buffer)
        if kind not in _KINDS or flags:
            raise damaged(f"there is no frame of type {kind} and flags {flags}")
        if number != self._number:
            raise damaged(f"frame {number} came where frame {self._number} belongs")
        self._kind = FrameType(kind)
        if (self._kind is FrameType.HEADER) != (self._header is None):
            raise damaged("its first frame is not its header" if self._header is None else "it has two headers")
        if length > MAX_BODY:
            raise damaged(f"frame {number} is longer than a frame may be")
        self._frame = bytes(self._buffer)
        self._want(_State.BODY, length)
        return None if length else self._end_frame()

    def _end_frame(self) -> Event:
        body, before = self._buffer, self._digest.digest() if self._kind in _WITH_DIGEST else b""
        expected = int.from_bytes(self._frame[FRAME_CHECKED:], "big")
        if frame_checksum(self._frame[:FRAME_CHECKED], body) != expected:
            raise damaged(f"the checksum of frame {self._number} is wrong")
        self._digest.update(self._frame)
        self._digest.update(body)
        self._number += 1
        self._want(_State.FRAME, FRAME.size)
        match self._kind:
            case FrameType.HEADER:
                self._header = Header.unpack(body)
                self._position = self._header.start
                return self._header
            case FrameType.EXTENTS:
                return self._read_extents(body)
            case FrameType.CHECKPOINT:
                return self._read_checkpoint(body, before)
            case FrameType.END:
                return self._read_end(body, before)
            case FrameType.ABORT:
                text = bytes(body[:MAX_TEXT]).decode(errors="replace")
                raise DeltaCutError("the sender of the delta stream gave up: " + " ".join(text.split()))

    def _read_extents(self, body: memoryview) -> Extents:
        assert self._header is not None
        count = int.from_bytes(body[:4], "big")
        position = 4 + count * ENTRY.size
        if not 0 < count <= MAX_ENTRIES or position > len(body):
            raise damaged("the table of a frame does not fit into it")
        found: list[Extent] = []
        content = 0
        for offset, length, stored, encoding, flags, base in ENTRY.iter_unpack(body[4:position]):
            if encoding not in _ENCODINGS or flags & ~HAS_BASE:
                raise damaged(f"the extent at offset {offset} has an unknown encoding")
            extent = Extent(
                offset,
                length,
                Encoding(encoding),
                body[position : position + stored],
                base if flags & HAS_BASE else None,
            )
            self._check_extent(extent, stored)
            if extent.encoding is not Encoding.ZERO:
                content += length
            position += stored
            found.append(extent)
        if content > MAX_DATA or position != len(body):
            raise damaged("the extents of a frame do not fit into it")
        self._extents += count
        self._idle = False
        return Extents(found)

    def _check_extent(self, extent: Extent, stored: int) -> None:
        assert self._header is not None
        offset, length = extent.offset, extent.length
        size = self._header.to.size
        if offset < self._position or not 0 < length <= size or offset + length > size:
            raise damaged(f"the extent at offset {offset} lies before the one before it, or beyond the volume")
        if self._header.base is None and (offset != self._position or extent.encoding is Encoding.DIFF):
            raise damaged(f"the extent at offset {offset} needs a base, and there is none")
        if extent.base is not None and self._header.base is None:
            raise damaged(f"the extent at offset {offset} needs a base, and there is none")
        if stored != {Encoding.RAW: length, Encoding.ZERO: 0}.get(extent.encoding, stored):
            raise damaged(f"the extent at offset {offset} has another length than its data")
        self._position = offset + length
        self._bytes += length

    def _read_checkpoint(self, body: memoryview, before: bytes) -> Checkpoint:
        assert self._header is not None
        if len(body) != CHECKPOINT_BODY.size:
            raise damaged("a checkpoint has no valid length")
        position, digest = CHECKPOINT_BODY.unpack(body)
        _check_digest(digest, before)
        if not self._position <= position <= self._header.to.size:
            raise damaged("a checkpoint lies before what it confirms")
        if self._header.base is None and position != self._position:
            raise damaged("a checkpoint confirms what never came")
        if self._idle:
            raise damaged("two checkpoints have nothing between them")
        self._idle = True
        self._position = position
        return Checkpoint(position, digest)

    def _read_end(self, body: memoryview, before: bytes) -> End:
        assert self._header is not None
        if len(body) != END_BODY.size:
            raise damaged("its end has no valid length")
        extents, content, digest = END_BODY.unpack(body)
        _check_digest(digest, before)
        if (extents, content) != (self._extents, self._bytes):
            raise damaged("its end counts other extents than came")
        if self._header.base is None and self._position != self._header.to.size:
            raise damaged("it ends before the volume does")
        self._want(_State.ENDED, 0)
        return End(extents, content, self._digest.digest())


_KINDS = frozenset(map(int, FrameType))
_ENCODINGS = frozenset(map(int, Encoding))
_WITH_DIGEST = (FrameType.CHECKPOINT, FrameType.END)


def _check_digest(found: bytes, expected: bytes) -> None:
    assert len(expected) == DIGEST_SIZE
    if found != expected:
        raise damaged("its cryptographic checksum is wrong")
