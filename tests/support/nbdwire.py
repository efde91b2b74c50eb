"""The client's side of NBD, without I/O: makes what a client sends, and takes apart what a server sends.

Written from the protocol document with numbers of its own, not with those of nbdsnap.nbd: a wrong constant there must
not be wrong here too.  Knows extended headers, which Debian's libnbd does not.  It believes nothing: whatever is
malformed in a server's bytes is an AssertionError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

HELLO = b"NBDMAGICIHAVEOPT" + b"\x00\x03"

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT = (
    1, 2, 3, 5, 6, 7, 8, 9, 10,
)  # fmt: skip
EXTENDED_HEADERS = 11

ACK, SERVER, INFO_REPLY, META_CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG, EXT_HEADER_REQD = (
    (1 << 31) + n for n in range(1, 11)
)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << n for n in range(6))
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108

NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002


# The handshake


def client_flags(flags: int = 3) -> bytes:
    return struct.pack(">I", flags)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def info(name: str | bytes = "", infos: Sequence[int] = (), number: int = INFO) -> bytes:
    return option(number, string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def go(name: str | bytes = "", infos: Sequence[int] = ()) -> bytes:
    return info(name, infos, GO)


def contexts(name: str, queries: Sequence[str | bytes] = (), number: int = SET_META_CONTEXT) -> bytes:
    return option(number, string(name) + struct.pack(">I", len(queries)) + b"".join(string(q) for q in queries))


@dataclass(frozen=True)
class OptionReply:
    option: int
    type: int
    data: bytes

    @property
    def failed(self) -> bool:
        return bool(self.type & 1 << 31)


def split_option_replies(data: bytes) -> list[OptionReply]:
    """All of ``data`` as option replies."""
    replies = []
    while data:
        magic, number, reply_type, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9, data[:20]
        assert len(data) >= 20 + length, data
        replies.append(OptionReply(number, reply_type, data[20 : 20 + length]))
        data = data[20 + length :]
    return replies


@dataclass(frozen=True)
class Infos:
    """The NBD_REP_INFO replies to one option."""

    size: int
    flags: int
    name: str | None = None
    description: str | None = None
    block_size: tuple[int, int, int] | None = None


def read_infos(replies: Iterable[OptionReply]) -> Infos:
    """Information replies closed by an ACK, each type at most once."""
    *informed, last = replies
    assert last.type == ACK and last.data == b""
    found: dict[int, bytes] = {}
    for reply in informed:
        assert reply.type == INFO_REPLY
        (kind,) = struct.unpack_from(">H", reply.data)
        assert kind not in found
        found[kind] = reply.data[2:]
    assert len(found[0]) == 10
    size, flags = struct.unpack(">QH", found.pop(0))
    name, description, sizes = found.pop(1, None), found.pop(2, None), found.pop(3, None)
    assert not found
    return Infos(
        size,
        flags,
        None if name is None else name.decode(),
        None if description is None else description.decode(),
        None if sizes is None else struct.unpack(">III", sizes),
    )


# Transmission


def request(
    command: int,
    offset: int = 0,
    length: int | None = None,
    *,
    flags: int = 0,
    cookie: int = 1,
    payload: bytes = b"",
    extended: bool = False,
) -> bytes:
    """A request; its length is the payload's unless given.  PAYLOAD_LEN is the caller's to set."""
    length = len(payload) if length is None else length
    if extended:
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + payload
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


@dataclass(frozen=True)
class Message:
    """One simple reply (``kind`` "simple") or one chunk ("structured", "extended")."""

    kind: str
    cookie: int
    done: bool = True
    type: int = NONE
    error: int = 0
    text: str = ""
    offset: int | None = None
    """Where data, a hole or an error lies."""
    at: int | None = None
    """The request's offset, in an extended chunk."""
    data: bytes = b""
    length: int = 0
    """Of a hole."""
    context_id: int | None = None
    extents: tuple[tuple[int, int], ...] = field(default=())


def split_replies(data: bytes, reads: Mapping[int, int] | None = None) -> list[Message]:
    """All of ``data`` as replies.  ``reads``: cookie to length, for the data behind simple replies to READ."""
    messages = []
    while data:
        (magic,) = struct.unpack_from(">I", data)
        if magic == 0x67446698:
            _, error, cookie = struct.unpack_from(">IIQ", data)
            length = 0 if error else (reads or {}).get(cookie, 0)
            assert len(data) >= 16 + length
            messages.append(Message("simple", cookie, error=error, data=data[16 : 16 + length]))
            data = data[16 + length :]
            continue
        at = None
        if magic == 0x668E33EF:
            _, flags, chunk_type, cookie, length = struct.unpack_from(">IHHQI", data)
            kind, header = "structured", 20
        else:
            assert magic == 0x6E8A278C, f"{magic:x}"
            _, flags, chunk_type, cookie, at, length = struct.unpack_from(">IHHQQQ", data)
            kind, header = "extended", 32
        assert flags in (0, 1)
        assert len(data) >= header + length
        payload = data[header : header + length]
        messages.append(_chunk(kind, cookie, bool(flags), chunk_type, at, payload))
        data = data[header + length :]
    return messages


def _chunk(kind: str, cookie: int, done: bool, chunk_type: int, at: int | None, payload: bytes) -> Message:
    if chunk_type == NONE:
        assert done and not payload
        return Message(kind, cookie, done, chunk_type, at=at)
    if chunk_type == OFFSET_DATA:
        assert len(payload) >= 9
        (offset,) = struct.unpack_from(">Q", payload)
        return Message(kind, cookie, done, chunk_type, at=at, offset=offset, data=payload[8:])
    if chunk_type == OFFSET_HOLE:
        offset, length = struct.unpack(">QI", payload)
        assert length > 0
        return Message(kind, cookie, done, chunk_type, at=at, offset=offset, length=length)
    if chunk_type in (STATUS, STATUS_EXT):
        assert (chunk_type == STATUS_EXT) == (kind == "extended")
        return _status(kind, cookie, done, chunk_type, at, payload)
    assert chunk_type in (ERROR, ERROR_OFFSET)
    error, length = struct.unpack_from(">IH", payload)
    assert error and length <= 4096
    text, rest = payload[6 : 6 + length].decode(), payload[6 + length :]
    where = struct.unpack(">Q", rest)[0] if chunk_type == ERROR_OFFSET else None
    assert chunk_type == ERROR_OFFSET or not rest
    return Message(kind, cookie, done, chunk_type, error, text, where, at)


def _status(kind: str, cookie: int, done: bool, chunk_type: int, at: int | None, payload: bytes) -> Message:
    if chunk_type == STATUS:
        context_id, *numbers = struct.unpack(f">{len(payload) // 4}I", payload)
    else:
        context_id, count = struct.unpack_from(">II", payload)
        numbers = list(struct.unpack(f">{(len(payload) - 8) // 8}Q", payload[8:]))
        assert len(numbers) == 2 * count
    assert numbers and len(numbers) % 2 == 0
    extents = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    assert all(length > 0 for length, _ in extents)
    return Message(kind, cookie, done, chunk_type, at=at, context_id=context_id, extents=extents)
