"""Requests of the transmission phase: found in a buffer, then checked (proto.md, "Transmission").

Two steps, because they have two costs.  :class:`RequestParser` runs for every request and knows only where one ends; a
data path then accepts the common ones with a comparison or two, and asks :func:`check_request`, which knows all the
rules, about the rest.

The stream stays in step whatever a request asks for: a request is handed out with its payload, or after its payload was
thrown away, never before.  ``NO_PAYLOAD`` and ``DROPPED`` stand in place of the payload's position.
"""

from __future__ import annotations

import struct
from typing import Final

from nbdsnap.errors import ProtocolError
from nbdsnap.nbd.constants import (
    EXTENDED_REQUEST,
    MAX_PAYLOAD,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EOVERFLOW,
    NBD_EPERM,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_REQUEST_MAGIC,
    REQUEST,
)
from nbdsnap.nbd.session import AnySession

Request = tuple[int, int, int, int, int, int]
"""type, flags, cookie, offset, length, position of the payload (or NO_PAYLOAD, DROPPED)."""

Buffer = bytes | bytearray | memoryview

NO_PAYLOAD: Final = -1
DROPPED: Final = -2
"""The payload was larger than allowed and has been thrown away: answer the request with the error that
:func:`check_request` finds, or else with NBD_EINVAL."""

MAX_DROPPED_PAYLOAD: Final = 4 * MAX_PAYLOAD
"""Bytes of a payload that are thrown away to keep a client that merely asked for too much; beyond it, the connection is
dropped: receiving up to 4 GiB for nothing is not worth it."""

MAX_STATUS_PAYLOAD: Final = 8 + 4 * 1024
"""Bytes of a payload of anything but WRITE that are kept: an effect length and 1024 context ids."""


class RequestParser:
    """Finds the requests in one connection's stream.  The buffer is the caller's.

    ``needed``: after ``parse``, the bytes that the incomplete request at the returned position has in all, header
    and payload; a header's size where that is not known yet.  A buffer of that size can hold it.
    ``disconnected``: NBD_CMD_DISC was seen; nothing behind it is parsed.
    """

    __slots__ = ("_dropped", "_dropping", "disconnected", "extended", "header_size", "max_payload", "needed")

    def __init__(self, extended: bool = False, max_payload: int = MAX_PAYLOAD) -> None:
        self.extended = extended
        self.max_payload = max_payload
        self.header_size = EXTENDED_REQUEST.size if extended else REQUEST.size
        self.needed = self.header_size
        self.disconnected = False
        self._dropping = 0  # bytes of a refused payload still to come
        self._dropped: Request | None = None  # its request

    def parse(self, buf: Buffer, start: int, end: int, out: list[Request]) -> int:
        """Append every complete request of ``buf[start:end]`` to ``out``; return the position behind the last.

        Call it again with the bytes from there on, and more behind them.  Raises ProtocolError where the stream is
        lost; ``out`` then holds the requests before that point, which are good.
        """
        position = start
        while True:
            if self._dropping:
                position = self._drop(position, end, out)
            if self._dropping or self.disconnected:
                return end
            parse = self._parse_extended if self.extended else self._parse_compact
            position = parse(buf, position, end, out)
            if not self._dropping:
                return position

    def _parse_compact(self, buf: Buffer, start: int, end: int, out: list[Request]) -> int:
        """The hot loop: no call per request but the unpacking and the appending."""
        unpack = REQUEST.unpack_from
        append = out.append
        position = start
        last = end - 28
        while position <= last:
            magic, flags, command, cookie, offset, length = unpack(buf, position)
            if magic != 0x25609513:  # NBD_REQUEST_MAGIC
                raise _bad_magic(magic)
            if command == 1:  # NBD_CMD_WRITE
                payload = position + 28
                if length > self.max_payload:
                    self._begin_drop((command, flags, cookie, offset, length, DROPPED))
                    return payload
                if payload + length > end:
                    self.needed = 28 + length
                    return position
                append((1, flags, cookie, offset, length, payload))
                position = payload + length
                continue
            append((command, flags, cookie, offset, length, -1))
            position += 28
            if command == 2:  # NBD_CMD_DISC
                return self._disconnect(end)
        self.needed = 28
        if position < end:
            _check_partial(buf, position, end, NBD_REQUEST_MAGIC)
        return position

    def _parse_extended(self, buf: Buffer, start: int, end: int, out: list[Request]) -> int:
        """With extended headers, a flag and not the command says whether there is a payload."""
        unpack = EXTENDED_REQUEST.unpack_from
        append = out.append
        position = start
        last = end - 32
        while position <= last:
            magic, flags, command, cookie, offset, length = unpack(buf, position)
            if magic != 0x21E41C71:  # NBD_EXTENDED_REQUEST_MAGIC
                raise _bad_magic(magic)
            if flags & 32:  # NBD_CMD_FLAG_PAYLOAD_LEN
                payload = position + 32
                if length > (self.max_payload if command == 1 else MAX_STATUS_PAYLOAD):
                    self._begin_drop((command, flags, cookie, offset, length, DROPPED))
                    return payload
                if payload + length > end:
                    self.needed = 32 + length
                    return position
                append((command, flags, cookie, offset, length, payload))
                position = payload + length
            else:
                append((command, flags, cookie, offset, length, -1))
                position += 32
            if command == 2:  # NBD_CMD_DISC
                return self._disconnect(end)
        self.needed = 32
        if position < end:
            _check_partial(buf, position, end, NBD_EXTENDED_REQUEST_MAGIC)
        return position

    def _begin_drop(self, request: Request) -> None:
        """A payload is not wanted.  Extended headers ask for a disconnect where it exceeds the advertised maximum."""
        length = request[4]
        if length > (self.max_payload if self.extended else MAX_DROPPED_PAYLOAD):
            raise ProtocolError(f"a request with {length} bytes of payload; {self.max_payload} are allowed")
        self._dropping = length
        self._dropped = request

    def _drop(self, start: int, end: int, out: list[Request]) -> int:
        dropped = min(self._dropping, end - start)
        self._dropping -= dropped
        self.needed = self.header_size
        if not self._dropping:
            assert self._dropped is not None
            out.append(self._dropped)
            if self._dropped[0] == NBD_CMD_DISC:
                self.disconnected = True
            self._dropped = None
        return start + dropped

    def _disconnect(self, end: int) -> int:
        self.disconnected = True
        self.needed = self.header_size
        return end


def _check_partial(buf: Buffer, position: int, end: int, expected: int) -> None:
    """Drop a peer that talks something else without waiting for a whole header of it."""
    if end - position >= 4:
        magic = int.from_bytes(buf[position : position + 4], "big")
        if magic != expected:
            raise _bad_magic(magic)


def _bad_magic(magic: int) -> ProtocolError:
    return ProtocolError(f"the magic number of a request is wrong: 0x{magic:08x}")


_READ_ONLY_REFUSED: Final = frozenset((NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES))
_KNOWN: Final = frozenset(
    (
        NBD_CMD_READ,
        NBD_CMD_WRITE,
        NBD_CMD_FLUSH,
        NBD_CMD_TRIM,
        NBD_CMD_CACHE,
        NBD_CMD_WRITE_ZEROES,
        NBD_CMD_BLOCK_STATUS,
    )
)


def check_request(
    command: int, flags: int, offset: int, length: int, export_size: int, read_only: bool, session: AnySession
) -> int:
    """0, or the NBD error that a request gets once its payload is consumed (proto.md, "Error values").

    ``length`` is the effect length: of a BLOCK_STATUS with a payload, what :func:`status_query` returns.
    NBD_CMD_DISC is none of its business.  A length of 0 is no error.  The success of a BLOCK_STATUS needs an extent of
    at least one byte, though: one of length 0 has it behind its end, where there is something, unless REQ_ONE forbids.
    """
    if command not in _KNOWN or flags & ~session.allowed_flags[command]:
        return NBD_EINVAL
    if read_only and command in _READ_ONLY_REFUSED:
        return NBD_EPERM
    if command == NBD_CMD_FLUSH:
        return NBD_EINVAL if offset or length else 0
    if command == NBD_CMD_WRITE and session.extended and not flags & NBD_CMD_FLAG_PAYLOAD_LEN:
        return NBD_EINVAL
    if offset + length > export_size:
        return NBD_ENOSPC if command in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES) else NBD_EINVAL
    if command == NBD_CMD_WRITE and length > session.export.maximum_payload:
        return NBD_EINVAL
    if command == NBD_CMD_READ and length > session.export.maximum_payload:
        return NBD_EOVERFLOW if session.structured else NBD_EINVAL
    if command == NBD_CMD_BLOCK_STATUS:
        impossible = not length and (flags & NBD_CMD_FLAG_REQ_ONE or offset == export_size)
        return NBD_EINVAL if impossible or not session.contexts else 0
    return 0


def status_query(
    flags: int, length: int, payload: Buffer | None, session: AnySession
) -> tuple[int, tuple[tuple[int, str], ...]] | None:
    """The effect length of a BLOCK_STATUS and the contexts it is about; None: answer NBD_EINVAL.

    Without a payload these are the header's length and all selected contexts.  A payload (extended headers: u64 effect
    length, context ids) narrows them; ids that are unknown or repeated are an error.  ``payload`` is None where
    there is none or it was dropped.
    """
    if not flags & NBD_CMD_FLAG_PAYLOAD_LEN:
        return length, session.contexts
    if payload is None or len(payload) < 12 or len(payload) % 4:
        return None
    effect_length, *ids = struct.unpack(f">Q{(len(payload) - 8) // 4}I", payload)
    names = dict(session.contexts)
    if len(set(ids)) != len(ids) or not names.keys() >= set(ids):
        return None
    return effect_length, tuple((context_id, names[context_id]) for context_id in ids)
