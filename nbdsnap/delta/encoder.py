"""Writing a delta stream: extents in, bytes out.

The caller gives extents in ascending order, without overlap; where there is no base, without a gap.  It gets lists of
buffers, to be written one after the other.  Nothing is kept but the frame that is being filled, of at most MAX_BODY
bytes.

What costs time, choosing how an extent is stored (:mod:`nbdsnap.delta.choice`), is apart, so that it may run on other
threads than this.
"""

from __future__ import annotations

from nbdsnap.delta.choice import Content, Stored
from nbdsnap.delta.format import (
    CHECKPOINT_BODY,
    DIGEST_SIZE,
    END_BODY,
    ENTRY,
    FRAME,
    FRAME_CHECKED,
    HAS_BASE,
    MAX_DATA,
    MAX_ENTRIES,
    MAX_TEXT,
    FrameType,
    Header,
    frame_checksum,
    new_digest,
    pack_prologue,
)

Output = list[Content]


class Encoder:
    """One stream.  ``written``: bytes given out."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._digest = new_digest()
        self._number = 0
        self._entries: list[Stored] = []
        self._content = 0
        self._extents = 0
        self._confirmed = 0
        self._bytes = 0
        self._position = header.start
        self.written = 0

    def start(self) -> Output:
        prologue = pack_prologue()
        self._digest.update(prologue)
        self.written += len(prologue)
        return [prologue, *self._frame(FrameType.HEADER, [self._header.pack()])]

    def add(self, extent: Stored) -> Output:
        """The next extent; what is to be written now, often nothing."""
        end = extent.offset + extent.length
        assert self._position <= extent.offset < end <= self._header.to.size, (self._position, extent)
        assert self._header.base is not None or self._position == extent.offset, (self._position, extent)
        full = len(self._entries) == MAX_ENTRIES or self._content + extent.content_bytes > MAX_DATA
        output = self._flush() if full else []
        self._entries.append(extent)
        self._content += extent.content_bytes
        self._position = end
        self._extents += 1
        self._bytes += extent.length
        return output

    def checkpoint(self, position: int) -> Output:
        """All below ``position`` has been added: a stream that is cut can go on from there.

        Nothing where nothing was added since the last one.
        """
        assert self._position <= position
        if self._extents == self._confirmed:
            return []
        output = self._flush()
        self._position = position
        self._confirmed = self._extents
        return [*output, *self._frame(FrameType.CHECKPOINT, [CHECKPOINT_BODY.pack(position, self._digest.digest())])]

    def end(self) -> Output:
        output = self._flush()
        assert self._header.base is not None or self._position == self._header.to.size
        body = END_BODY.pack(self._extents, self._bytes, self._digest.digest())
        return [*output, *self._frame(FrameType.END, [body])]

    def abort(self, reason: str) -> Output:
        """Instead of the end.  What was added since the last frame is dropped."""
        return self._frame(FrameType.ABORT, [reason.encode()[:MAX_TEXT]])

    @property
    def digest(self) -> bytes:
        """Of the bytes so far; after :meth:`end`, of the whole stream."""
        digest = self._digest.digest()
        assert len(digest) == DIGEST_SIZE
        return digest

    def _flush(self) -> Output:
        entries, self._entries, self._content = self._entries, [], 0
        if not entries:
            return []
        table = bytearray(len(entries).to_bytes(4, "big"))
        for one in entries:
            flags = 0 if one.base is None else HAS_BASE
            table += ENTRY.pack(one.offset, one.length, len(one.data), one.encoding, flags, one.base or 0)
        return self._frame(FrameType.EXTENTS, [table, *(one.data for one in entries if one.data)])

    def _frame(self, kind: FrameType, body: Output) -> Output:
        head = FRAME.pack(kind, 0, sum(map(len, body)), self._number, 0)[:FRAME_CHECKED]
        head += frame_checksum(head, *body).to_bytes(FRAME.size - FRAME_CHECKED, "big")
        self._number += 1
        output: Output = [head, *body]
        for part in output:
            self._digest.update(part)
            self.written += len(part)
        return output
