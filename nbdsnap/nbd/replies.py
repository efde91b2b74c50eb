"""Replies of the transmission phase, put together (proto.md, "Transmission").

A session speaks one of three dialects, chosen once by :func:`replies_for`; the data path asks one object and does not
branch:

============  ==================================  ===================================  ==========================
dialect       success without data                success and errors of READ           other errors
============  ==================================  ===================================  ==========================
simple        simple reply                        simple reply (data follows)          simple reply
structured    simple reply (allowed, and short)   chunks, never a simple reply         error chunk, with a text
extended      chunk NONE                          chunks                               error chunk, with a text
============  ==================================  ===================================  ==========================

``cookie`` is the request's, opaque.  ``at`` is the request's offset: extended chunks carry it, the others ignore it.
``done`` marks a reply's last chunk.  The data path may pack ``SIMPLE_REPLY``, ``OFFSET_DATA_CHUNK`` and
``EXTENDED_OFFSET_DATA_CHUNK`` (constants.py) itself for what it answers most.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from nbdsnap.nbd.constants import (
    BLOCK_STATUS,
    BLOCK_STATUS_EXT,
    CHUNK,
    ERROR,
    ERROR_OFFSET,
    EXTENDED_CHUNK,
    EXTENDED_OFFSET_DATA_CHUNK,
    MAX_STATUS_EXTENTS,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_MAX_STRING,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    OFFSET_DATA_CHUNK,
    OFFSET_DATA_OVERHEAD,
    OFFSET_HOLE,
    SIMPLE_REPLY,
)
from nbdsnap.nbd.session import AnySession

Extent = tuple[int, int]
"""Length in bytes and flags."""

MAX_HOLE: Final = 0xFFFFF000
"""Bytes that one OFFSET_HOLE or one 32-bit block status descriptor describes: what 32 bits hold, kept aligned."""


class Replies(Protocol):
    """One dialect.  Everything returns bytes ready to send; data is sent behind them by the caller."""

    def success(self, cookie: int, at: int) -> bytes:
        """A command without data is done (anything but READ and BLOCK_STATUS)."""

    def error(self, cookie: int, at: int, error: int, text: str = "", offset: int | None = None) -> bytes:
        """A request failed; ``offset``: where, known to lie in the request.  Ends the reply."""

    def read_data(self, cookie: int, at: int, offset: int, length: int, *, done: bool = True) -> bytes:
        """The header of ``length`` bytes of data, which follow.  A simple reply's data is the whole request's."""

    def read_hole(self, cookie: int, at: int, offset: int, length: int, *, done: bool = True) -> bytes:
        """``length`` bytes read as zeroes.  Not in simple replies, nor with NBD_CMD_FLAG_DF."""

    def read_done(self, cookie: int, at: int) -> bytes:
        """The end of a READ whose chunks were not marked done, or that has none (length 0)."""

    def block_status(self, cookie: int, at: int, context_id: int, extents: Sequence[Extent], *, done: bool) -> bytes:
        """One context's extents, as :func:`status_extents` prepares them."""


class SimpleReplies:
    """No structured replies: the Linux kernel's dialect."""

    def success(self, cookie: int, at: int) -> bytes:
        return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, at: int, error: int, text: str = "", offset: int | None = None) -> bytes:
        assert error
        return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie)

    def read_data(self, cookie: int, at: int, offset: int, length: int, *, done: bool = True) -> bytes:
        assert done and offset == at
        return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def read_hole(self, cookie: int, at: int, offset: int, length: int, *, done: bool = True) -> bytes:
        raise AssertionError("simple replies have no holes")

    def read_done(self, cookie: int, at: int) -> bytes:
        return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def block_status(self, cookie: int, at: int, context_id: int, extents: Sequence[Extent], *, done: bool) -> bytes:
        raise AssertionError("simple replies have no block status")


class _ChunkReplies:
    """What structured and extended replies share: chunks that differ in their header alone."""

    def chunk(self, cookie: int, at: int, chunk_type: int, length: int, done: bool) -> bytes:
        """A chunk's header, for ``length`` bytes of payload."""
        raise NotImplementedError

    def error(self, cookie: int, at: int, error: int, text: str = "", offset: int | None = None) -> bytes:
        assert error
        message = encode_text(text)
        payload = ERROR.pack(error, len(message)) + message
        chunk_type = NBD_REPLY_TYPE_ERROR
        if offset is not None:
            payload += ERROR_OFFSET.pack(offset)
            chunk_type = NBD_REPLY_TYPE_ERROR_OFFSET
        return self.chunk(cookie, at, chunk_type, len(payload), True) + payload

    def read_hole(self, cookie: int, at: int, offset: int, length: int, *, done: bool = True) -> bytes:
        assert 0 < length <= MAX_HOLE
        header = self.chunk(cookie, at, NBD_REPLY_TYPE_OFFSET_HOLE, OFFSET_HOLE.size, done)
        return header + OFFSET_HOLE.pack(offset, length)

    def read_done(self, cookie: int, at: int) -> bytes:
        return self.chunk(cookie, at, NBD_REPLY_TYPE_NONE, 0, True)


class StructuredReplies(_ChunkReplies):
    """NBD_OPT_STRUCTURED_REPLY."""

    def chunk(self, cookie: int, at: int, chunk_type: int, length: int, done: bool) -> bytes:
        flags = NBD_REPLY_FLAG_DONE if done else 0
        return CHUNK.pack(NBD_STRUCTURED_REPLY_MAGIC, flags, chunk_type, cookie, length)

    def success(self, cookie: int, at: int) -> bytes:
        return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def read_data(self, cookie: int, at: int, offset: int, length: int, *, done: bool = True) -> bytes:
        assert length > 0
        flags = NBD_REPLY_FLAG_DONE if done else 0
        payload = length + OFFSET_DATA_OVERHEAD
        return OFFSET_DATA_CHUNK.pack(
            NBD_STRUCTURED_REPLY_MAGIC, flags, NBD_REPLY_TYPE_OFFSET_DATA, cookie, payload, offset
        )

    def block_status(self, cookie: int, at: int, context_id: int, extents: Sequence[Extent], *, done: bool) -> bytes:
        payload = BLOCK_STATUS.pack(context_id) + _descriptors("I", extents)
        return self.chunk(cookie, at, NBD_REPLY_TYPE_BLOCK_STATUS, len(payload), done) + payload


class ExtendedReplies(_ChunkReplies):
    """NBD_OPT_EXTENDED_HEADERS: every reply is a chunk of 32 bytes or more, with the request's offset."""

    def chunk(self, cookie: int, at: int, chunk_type: int, length: int, done: bool) -> bytes:
        flags = NBD_REPLY_FLAG_DONE if done else 0
        return EXTENDED_CHUNK.pack(NBD_EXTENDED_REPLY_MAGIC, flags, chunk_type, cookie, at, length)

    def success(self, cookie: int, at: int) -> bytes:
        return self.chunk(cookie, at, NBD_REPLY_TYPE_NONE, 0, True)

    def read_data(self, cookie: int, at: int, offset: int, length: int, *, done: bool = True) -> bytes:
        assert length > 0
        flags = NBD_REPLY_FLAG_DONE if done else 0
        payload = length + OFFSET_DATA_OVERHEAD
        return EXTENDED_OFFSET_DATA_CHUNK.pack(
            NBD_EXTENDED_REPLY_MAGIC, flags, NBD_REPLY_TYPE_OFFSET_DATA, cookie, at, payload, offset
        )

    def block_status(self, cookie: int, at: int, context_id: int, extents: Sequence[Extent], *, done: bool) -> bytes:
        payload = BLOCK_STATUS_EXT.pack(context_id, len(extents)) + _descriptors("Q", extents)
        return self.chunk(cookie, at, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, len(payload), done) + payload


_SIMPLE = SimpleReplies()
_STRUCTURED = StructuredReplies()
_EXTENDED = ExtendedReplies()


def replies_for(session: AnySession) -> Replies:
    """The dialect that the handshake agreed on."""
    if session.extended:
        return _EXTENDED
    return _STRUCTURED if session.structured else _SIMPLE


def _descriptors(code: str, extents: Sequence[Extent]) -> bytes:
    assert 0 < len(extents) <= MAX_STATUS_EXTENTS
    return struct.pack(f">{2 * len(extents)}{code}", *(number for extent in extents for number in extent))


def encode_text(text: str) -> bytes:
    """A message for a person, as long as the protocol allows, cut between characters."""
    data = text.replace("\0", "").encode(errors="replace")
    return data if len(data) <= NBD_MAX_STRING else data[:NBD_MAX_STRING].decode(errors="ignore").encode()


def status_extents(
    extents: Iterable[Extent], length: int, *, req_one: bool = False, extended: bool = False
) -> list[Extent]:
    """What one block status chunk says of ``extents``, which follow each other from the request's offset.

    Neighbours of equal flags are merged.  Only the last extent passes the request's end; with ``req_one`` there is
    one, within the request.  Descriptors of 32 bits say less rather than overflow.  Takes no more of ``extents``
    than it needs; a prefix of the answer is an answer.
    """
    widest = None if extended else MAX_HOLE
    result: list[Extent] = []
    position = current = flags = 0
    for more, more_flags in extents:
        assert more > 0
        if current and more_flags != flags:
            result.append((current, flags))
            current = 0
            if req_one or len(result) == MAX_STATUS_EXTENTS:
                break
        flags = more_flags
        current += more
        position += more
        if widest is not None and current > widest:
            current = widest
            break
        if position >= length:
            break
    if current:
        result.append((current, flags))
    assert result
    if req_one and result[0][0] > length:
        return [(length, result[0][1])]
    return result
