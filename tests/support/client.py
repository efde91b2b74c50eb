"""A synchronous NBD client, for tests: every reply style, pipelining, and whatever a server must refuse.

It checks what every reply must satisfy: a cookie that is outstanding, the style that was negotiated, each byte of a
READ exactly once.

::

    client = Client(socket)              # greeted
    client.structured()
    client.go("vol")
    client.write(0, b"data")             # one request, one reply
    cookie = client.send(READ, 0, 4)     # or pipelined
    reply = client.receive()             # to any request; client.wait(cookie) for a certain one
"""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import nbdwire
from tests.support.nbdwire import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    FLUSH,
    PAYLOAD_LEN,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Message,
)

TIMEOUT_S = 30.0
"""A reply that takes longer is a failure."""


class NbdError(Exception):
    """A reply with an error."""

    def __init__(self, error: int, text: str) -> None:
        super().__init__(f"NBD error {error}: {text}")
        self.error = error
        self.text = text


class RefusedError(Exception):
    """An option reply with an error."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(f"option refused: {reply - (1 << 31)}: {text}")
        self.reply = reply
        self.text = text


class DisconnectedError(Exception):
    """The server has closed the connection."""


@dataclass
class Sent:
    """A request on its way to its reply."""

    command: int
    offset: int
    length: int
    messages: list[Message] = field(default_factory=list)


@dataclass
class Reply:
    """``extents``: (length, flags), by context id."""

    cookie: int
    command: int
    messages: list[Message]
    error: int = 0
    text: str = ""
    data: bytes = b""
    extents: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def check(self) -> Reply:
        if self.error:
            raise NbdError(self.error, self.text)
        return self


class Client:
    """``size`` and ``flags`` are the export's, once in transmission.  ``outstanding``: requests without reply, by
    cookie."""

    def __init__(self, sock: socket.socket, *, client_flags: int = 3) -> None:
        sock.settimeout(TIMEOUT_S)
        self.sock = sock
        self.size = 0
        self.flags = 0
        self.kind = "simple"
        self.outstanding: dict[int, Sent] = {}
        self._cookie = 0
        assert self.take(len(nbdwire.HELLO)) == nbdwire.HELLO
        sock.sendall(nbdwire.client_flags(client_flags))

    @classmethod
    def connect(cls, address: Path | tuple[str, int]) -> Client:
        if isinstance(address, tuple):
            return cls(socket.create_connection(address, TIMEOUT_S))
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(address))
        return cls(sock)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, count: int) -> bytes:
        """Exactly ``count`` bytes; DisconnectedError where the stream ends before."""
        parts: list[bytes] = []
        while count:
            part = self.sock.recv(min(count, 1 << 20))
            if not part:
                raise DisconnectedError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    # Handshake

    def option(self, request: bytes) -> list[nbdwire.OptionReply]:
        """Send an option; its replies, the ACK included.  RefusedError where there is an error instead."""
        self.sock.sendall(request)
        replies: list[nbdwire.OptionReply] = []
        while not replies or replies[-1].type != nbdwire.ACK:
            header = self.take(20)
            replies += nbdwire.split_option_replies(header + self.take(struct.unpack_from(">I", header, 16)[0]))
            if replies[-1].failed:
                raise RefusedError(replies[-1].type, replies[-1].data.decode())
        return replies

    def start_tls(self, context: ssl.SSLContext, hostname: str | None = None) -> Client:
        """STARTTLS and its handshake."""
        self.option(nbdwire.option(nbdwire.STARTTLS))
        self.sock = context.wrap_socket(self.sock, server_hostname=hostname, suppress_ragged_eofs=False)
        return self

    def structured(self) -> Client:
        self.option(nbdwire.option(nbdwire.STRUCTURED_REPLY))
        self.kind = "structured"
        return self

    def extended(self) -> Client:
        self.option(nbdwire.option(nbdwire.EXTENDED_HEADERS))
        self.kind = "extended"
        return self

    def list(self) -> list[str]:
        *replies, _ = self.option(nbdwire.option(nbdwire.LIST))
        return [reply.data[4 : 4 + struct.unpack_from(">I", reply.data)[0]].decode() for reply in replies]

    def set_contexts(self, export: str, *queries: str) -> dict[str, int]:
        """The ids of the selected contexts, by name."""
        *replies, _ = self.option(nbdwire.contexts(export, queries))
        return {reply.data[4:].decode(): int.from_bytes(reply.data[:4], "big") for reply in replies}

    def go(self, export: str = "") -> Client:
        infos = nbdwire.read_infos(self.option(nbdwire.go(export)))
        self.size, self.flags = infos.size, infos.flags
        return self

    # Requests

    def request(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
        """The bytes of a request, which counts as outstanding from now on."""
        self._cookie += 1
        if command != DISC:
            self.outstanding[self._cookie] = Sent(command, offset, length)
        extended = self.kind == "extended"
        if extended and payload:
            flags |= PAYLOAD_LEN
        return nbdwire.request(
            command, offset, length, flags=flags, cookie=self._cookie, payload=payload, extended=extended
        )

    def send(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request; its cookie."""
        self.sock.sendall(self.request(command, offset, length, flags, payload))
        return self._cookie

    # Replies

    def receive(self) -> Reply:
        """The next reply that is complete, to whichever request."""
        while True:
            message = self._message()
            sent = self.outstanding[message.cookie]
            assert message.at in (None, sent.offset)
            sent.messages.append(message)
            if message.done:
                del self.outstanding[message.cookie]
                return _assemble(message.cookie, sent)

    def wait(self, cookie: int) -> Reply:
        """The reply to a request; no other may be complete before it."""
        reply = self.receive()
        assert reply.cookie == cookie, (reply, cookie)
        return reply

    def receive_all(self) -> dict[int, Reply]:
        """The replies to everything outstanding, by cookie."""
        replies: dict[int, Reply] = {}
        while self.outstanding:
            reply = self.receive()
            replies[reply.cookie] = reply
        return replies

    def _message(self) -> Message:
        data = self.take(16)
        reads: dict[int, int] = {}
        if data.startswith(b"\x67\x44\x66\x98"):
            _, error, cookie = struct.unpack(">IIQ", data)
            sent = self.outstanding[cookie]
            assert not sent.messages, "a simple reply amid chunks"
            if sent.command == READ and not error:
                reads[cookie] = sent.length
                data += self.take(sent.length)
        elif self.kind == "extended":
            data += self.take(16)
            data += self.take(struct.unpack_from(">Q", data, 24)[0])
        else:
            data += self.take(4)
            data += self.take(struct.unpack_from(">I", data, 16)[0])
        (message,) = nbdwire.split_replies(data, reads)
        if message.kind != self.kind:
            command = self.outstanding[message.cookie].command
            assert (self.kind, message.kind) == ("structured", "simple"), "a style that was not negotiated"
            assert command not in (READ, BLOCK_STATUS), "a simple reply where it has to be structured"
        return message

    # One request, one reply

    def call(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Reply:
        return self.wait(self.send(command, offset, length, flags, payload)).check()

    def error(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """The error that the request gets; 0 if none."""
        return self.wait(self.send(command, offset, length, flags, payload)).error

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        return self.call(READ, offset, length, flags).data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.call(WRITE, offset, len(data), flags, data)

    def flush(self) -> None:
        self.call(FLUSH)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(TRIM, offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(WRITE_ZEROES, offset, length, flags)

    def cache(self, offset: int, length: int) -> None:
        self.call(CACHE, offset, length)

    def status(self, offset: int, length: int, flags: int = 0) -> tuple[tuple[int, int], ...]:
        """The extents of the only context: (length, flags)."""
        (extents,) = self.call(BLOCK_STATUS, offset, length, flags).extents.values()
        return extents

    def disconnect(self) -> None:
        """DISC; then the server must close, with nothing left to say."""
        self.sock.sendall(self.request(DISC))
        self.expect_end()
        self.close()

    def expect_end(self) -> None:
        """The server closes, and sends nothing before."""
        try:
            assert self.sock.recv(1) == b""
        except ConnectionResetError:
            return


def _assemble(cookie: int, sent: Sent) -> Reply:
    reply = Reply(cookie, sent.command, sent.messages)
    is_read = sent.command == READ and not any(message.error for message in sent.messages)
    data = bytearray(sent.length if is_read else 0)
    covered: list[tuple[int, int]] = []
    for message in sent.messages:
        if message.error:
            reply.error, reply.text = message.error, message.text
        if message.kind == "simple":
            data[:] = message.data
            covered.append((0, len(message.data)))
        elif message.type == nbdwire.OFFSET_DATA:
            assert message.offset is not None
            start = message.offset - sent.offset
            end = start + len(message.data)
            assert 0 <= start < end <= sent.length
            data[start:end] = message.data
            covered.append((start, end))
        elif message.type == nbdwire.OFFSET_HOLE:
            assert message.offset is not None
            covered.append((message.offset - sent.offset, message.offset - sent.offset + message.length))
        elif message.context_id is not None:
            assert message.context_id not in reply.extents
            reply.extents[message.context_id] = message.extents
    if is_read:
        _check_cover(covered, sent.length)
        reply.data = bytes(data)
    return reply


def _check_cover(covered: list[tuple[int, int]], length: int) -> None:
    position = 0
    for start, end in sorted(covered):
        assert start == position, "a byte of a READ is missing, or comes twice"
        position = end
    assert position == length, "a READ is incomplete"
