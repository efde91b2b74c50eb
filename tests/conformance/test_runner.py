"""The runner believes nothing: each lie of a server, as bytes, is told from the truth."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from tests.conformance.connection import Connection, Failure
from tests.conformance.steps import run_case
from tests.conformance.table import Case
from tests.conformance.target import Target
from tests.support import nbdwire as wire

REPLY = 0x3E889045565A9


def answer(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", REPLY, option, kind, len(data)) + data


def chunk(kind: int, payload: bytes = b"", done: bool = True, cookie: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(payload)) + payload


def extended(kind: int, payload: bytes = b"", at: int = 0) -> bytes:
    return struct.pack(">IHHQQQ", 0x6E8A278C, 1, kind, 1, at, len(payload)) + payload


def simple(error: int = 0, data: bytes = b"", cookie: int = 1) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def content(offset: int, data: bytes, done: bool = True) -> bytes:
    return chunk(wire.OFFSET_DATA, struct.pack(">Q", offset) + data, done)


def status(context: int, *extents: tuple[int, int]) -> bytes:
    return chunk(wire.STATUS, struct.pack(">I", context) + b"".join(struct.pack(">II", *one) for one in extents))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Connection(ours, "vol", 5.0), theirs


OPTIONS: list[tuple[str, bytes]] = [
    ("a reply to option", answer(wire.LIST, wire.ACK)),
    ("no option reply", bytes(20)),
    ("an ACK with data", answer(wire.INFO, wire.ACK, b"x")),
    ("information of type 0 in 11 bytes", answer(wire.INFO, wire.INFO_REPLY, bytes(11))),
    ("information of type 3 in 12 bytes", answer(wire.INFO, wire.INFO_REPLY, b"\0\3" + bytes(10))),
    ("passes the end of its reply", answer(wire.INFO, wire.SERVER, b"\0\0\0\x09vol")),
    ("no UTF-8", answer(wire.INFO, wire.UNKNOWN, b"\xff")),
    ("a NUL byte", answer(wire.INFO, wire.UNKNOWN, b"no\0")),
    ("an error text of 5000 bytes", answer(wire.INFO, wire.UNKNOWN, b"x" * 5000)),
    ("without a name", answer(wire.INFO, wire.META_CONTEXT, bytes(4) + b"base")),
    ("the server closed the connection", b""),
]


@pytest.mark.parametrize(("failure", "said"), OPTIONS, ids=[failure for failure, _ in OPTIONS])
def test_lies_in_the_handshake(pair: tuple[Connection, socket.socket], failure: str, said: bytes) -> None:
    connection, server = pair
    connection.option(wire.INFO)
    server.sendall(said)
    server.shutdown(socket.SHUT_WR)
    with pytest.raises(Failure, match=failure):
        connection.answer()


READ = (wire.READ, 0, 1024, 0)
HALVES = content(0, bytes(512), False) + content(512, bytes(512))
OVERLAPPING = content(0, bytes(600), False) + content(512, bytes(512))
ERROR_AT_4096 = chunk(wire.ERROR_OFFSET, struct.pack(">IHQ", 5, 0, 4096))
READ_DF = (wire.READ, 0, 1024, wire.DF)
FLUSH = (wire.FLUSH, 0, 0, 0)
STATUS = (wire.BLOCK_STATUS, 0, 1024, 0)
STATUS_ONE = (wire.BLOCK_STATUS, 0, 1024, wire.REQ_ONE)
REQUESTS: list[tuple[str, str, str, tuple[int, int, int, int], bytes]] = [
    ("a simple reply to a READ", "structured", "a simple reply where", READ, simple(0, bytes(1024))),
    ("chunks without negotiation", "simple", "a structured reply where simple", READ, content(0, bytes(1024))),
    ("a cookie of nobody's", "structured", "not outstanding", READ, simple(22, cookie=9)),
    ("a magic number", "structured", "no reply", READ, bytes(16)),
    ("half a READ", "structured", "not with all its bytes", READ, content(0, bytes(512))),
    ("a byte twice", "structured", "content that comes twice", READ, OVERLAPPING),
    ("content before", "structured", "outside", (wire.READ, 512, 512, 0), content(0, bytes(512))),
    ("content behind", "structured", "outside", READ, content(1000, bytes(512))),
    ("DF in two chunks", "structured", "in spite of DF", READ_DF, HALVES),
    ("content of a FLUSH", "structured", "something other than a READ", FLUSH, content(0, b"x")),
    ("an empty chunk", "structured", "malformed", READ, chunk(wire.OFFSET_DATA, bytes(8))),
    ("NONE that is not the last", "structured", "malformed", READ, chunk(wire.NONE, b"", False)),
    ("an error of 0", "structured", "malformed", READ, chunk(wire.ERROR, bytes(6))),
    ("an error elsewhere", "structured", "an error's offset", READ, ERROR_AT_4096),
    ("no status at all", "structured", "0 status chunks for 1", STATUS, chunk(wire.NONE)),
    ("a simple status", "structured", "a simple reply to BLOCK_STATUS", STATUS, simple()),
    ("a context of nobody's", "structured", "not selected", STATUS, status(9, (1024, 0))),
    ("an extent of 0", "structured", "malformed", STATUS, status(1, (0, 0))),
    ("extents past the end", "structured", "more than the last extent", STATUS, status(1, (1024, 0), (512, 1))),
    ("two extents for REQ_ONE", "structured", "REQ_ONE", STATUS_ONE, status(1, (512, 0), (512, 1))),
    ("too long an extent for REQ_ONE", "structured", "REQ_ONE", STATUS_ONE, status(1, (2048, 0))),
    ("another offset", "extended", "with the offset 512", FLUSH, extended(wire.NONE, at=512)),
    ("a simple reply to extended headers", "extended", "extended ones were negotiated", FLUSH, simple()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dialect", "failure", "asked", "said"), [row[1:] for row in REQUESTS], ids=[row[0] for row in REQUESTS]
)
def test_lies_in_transmission(
    pair: tuple[Connection, socket.socket], dialect: str, failure: str, asked: tuple[int, int, int, int], said: bytes
) -> None:
    connection, server = pair
    connection.dialect = dialect
    connection.contexts = {"base:allocation": 1}
    connection.request(*asked)
    server.sendall(said)
    server.shutdown(socket.SHUT_WR)
    with pytest.raises(Failure, match=failure):
        connection.reply()


def test_the_truth_is_believed(pair: tuple[Connection, socket.socket]) -> None:
    connection, server = pair
    connection.dialect, connection.contexts = "structured", {"base:allocation": 1}
    hole = chunk(wire.OFFSET_HOLE, struct.pack(">QI", 512, 512), False)
    server.sendall(hole + content(0, b"\7" * 512, False) + chunk(wire.NONE))
    connection.request(*READ)
    assert connection.reply().data() == b"\7" * 512 + bytes(512)
    server.sendall(chunk(wire.STATUS, struct.pack(">IIIII", 1, 512, 0, 4096, 3), cookie=2))
    connection.request(*STATUS)
    assert connection.reply().error == 0


def test_a_server_that_is_not_there() -> None:
    case = Case("id", "section", "MUST", "says", ("hello",), "connected")
    outcome = run_case(case, Target("nbd+unix:///vol?socket=/nonexistent/nbd.sock"))
    assert (outcome.status, outcome.detail[:14]) == ("fail", "no connection:")
