"""One connection to the server under test: says anything, and believes nothing.

Whatever a server sends is held to what the protocol asks of every message, whichever case is running: magic numbers, an
option and a cookie that were sent, the style that was negotiated, the lengths of each kind of reply, each byte of a
READ once and within its range, one status chunk for each selected context.  Where it is not so, :class:`Failure` says
what was seen, in one line.
"""

from __future__ import annotations

import socket
import ssl
import struct
import traceback
from collections import deque
from dataclasses import dataclass, field

from tests.conformance import names
from tests.support import nbdwire
from tests.support.nbdwire import Message, OptionReply

MAX_REPLY = 80 << 20
"""Bytes of one reply; a longer one is an error of the server's, or of this runner's understanding of it."""

MAX_EXTENTS = 1 << 20


class Failure(Exception):  # noqa: N818 (what a case ends with; nobody's error but the server's)
    """The server did not do what the case asks."""


@dataclass
class Sent:
    """A request, and what has come back of it."""

    command: int
    offset: int
    length: int
    flags: int
    messages: list[Message] = field(default_factory=list)
    covered: list[tuple[int, int]] = field(default_factory=list)
    """Content, as ranges relative to the request's offset."""
    done: bool = False

    @property
    def error(self) -> int:
        return next((message.error for message in self.messages if message.error), 0)

    @property
    def text(self) -> str:
        return next((message.text for message in self.messages if message.error), "")

    @property
    def content(self) -> list[Message]:
        return [one for one in self.messages if one.type in (nbdwire.OFFSET_DATA, nbdwire.OFFSET_HOLE) or one.data]

    def data(self) -> bytes:
        """Of a READ that succeeded."""
        data = bytearray(self.length)
        for message in self.messages:
            if message.kind == "simple":
                data[:] = message.data
            elif message.type == nbdwire.OFFSET_DATA and message.offset is not None:
                start = message.offset - self.offset
                data[start : start + len(message.data)] = message.data
        return bytes(data)


class Connection:
    """``dialect``: of the replies.  ``contexts``: ids of what was selected, by name."""

    def __init__(self, sock: socket.socket, export: str, timeout_s: float) -> None:
        sock.settimeout(timeout_s)
        self.sock = sock
        self.export = export
        self.dialect = "simple"
        self.handshake_flags = 0
        self.contexts: dict[str, int] = {}
        self.infos = nbdwire.Infos(0, 0)
        self.unanswered: deque[int] = deque()
        self.outstanding: deque[tuple[int, Sent]] = deque()
        """Cookie and request, in the order they were sent."""
        self.slowly = False
        """Send byte by byte."""
        self.held: bytearray | None = None
        """What is sent later, together."""
        self._timeout_s = timeout_s
        self._next_cookie = 1

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Bytes

    def send(self, data: bytes) -> None:
        """What the server does not want to read any more is its own affair: what it says next decides."""
        if self.held is not None:
            self.held += data
            return
        try:
            if self.slowly:
                for start in range(len(data)):
                    self.sock.sendall(data[start : start + 1])
            else:
                self.sock.sendall(data)
        except TimeoutError:
            raise Failure("the server stopped reading") from None
        except OSError:
            return

    def take(self, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        parts: list[bytes] = []
        while count:
            part = self._receive(min(count, 1 << 20))
            if not part:
                raise Failure("the server closed the connection")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _receive(self, count: int) -> bytes:
        """Empty at the end of the stream, however it came about."""
        try:
            return self.sock.recv(count)
        except TimeoutError:
            raise Failure(f"no answer within {self._timeout_s:g} s") from None
        except OSError:
            return b""

    def expect_closed(self) -> None:
        if data := self._receive(64):
            raise Failure(f"the server goes on: {data[:20].hex()}")

    def rest(self, seconds: float) -> tuple[bytes, bool]:
        """All that still comes, and whether the connection has ended then."""
        self.sock.settimeout(seconds)
        data = b""
        while True:
            try:
                part = self._receive(1 << 16)
            except Failure:
                return data, False
            if not part:
                return data, True
            data += part

    # Handshake

    def hello(self) -> None:
        magic, option_magic, self.handshake_flags = struct.unpack(">8s8sH", self.take(18))
        if magic != b"NBDMAGIC" or option_magic != b"IHAVEOPT":
            raise Failure(f"the greeting is {magic + option_magic!r}")

    def option(self, number: int, data: bytes = b"") -> None:
        self.unanswered.append(number)
        self.send(nbdwire.option(number, data))

    def answer(self) -> list[OptionReply]:
        """All replies to the oldest option without an answer; the last is final."""
        number = self.unanswered.popleft()
        replies: list[OptionReply] = []
        while True:
            header = self.take(20)
            magic, option, kind, length = struct.unpack(">QIII", header)
            if magic != 0x3E889045565A9:
                raise Failure(f"no option reply: {header.hex()}")
            if option != number:
                raise Failure(f"a reply to option {option}, not {number}")
            if length > MAX_REPLY:
                raise Failure(f"an option reply of {length} bytes")
            reply = OptionReply(option, kind, self.take(length))
            check_option_reply(reply)
            replies.append(reply)
            if reply.type == nbdwire.ACK or reply.failed:
                return replies

    def ask(self, number: int, data: bytes = b"") -> bool:
        """Whether the server says ACK."""
        self.option(number, data)
        return self.answer()[-1].type == nbdwire.ACK

    def must(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """An option that a case begins with."""
        self.option(number, data)
        replies = self.answer()
        if replies[-1].failed:
            raise Failure(f"option {number} is refused: {names.REPLY_NAMES.get(replies[-1].type, replies[-1].type)}")
        return replies

    def starttls(self, context: ssl.SSLContext) -> None:
        self.must(nbdwire.STARTTLS)
        self.upgrade(context)

    def upgrade(self, context: ssl.SSLContext) -> None:
        """The server has acknowledged STARTTLS."""
        try:
            self.sock = context.wrap_socket(self.sock)
        except OSError as error:
            raise Failure(f"no TLS: {error}") from None
        self.dialect = "simple"
        self.contexts = {}

    def select(self, export: str, queries: list[str]) -> None:
        replies = self.must(nbdwire.SET_META_CONTEXT, nbdwire.contexts(export, queries)[16:])
        self.note_contexts(replies)

    def note_contexts(self, replies: list[OptionReply]) -> None:
        """The answer to a SET_META_CONTEXT; an error leaves none."""
        chosen = [reply for reply in replies if reply.type == nbdwire.META_CONTEXT and not replies[-1].failed]
        ids = [int.from_bytes(reply.data[:4], "big") for reply in chosen]
        if len(set(ids)) != len(ids):
            raise Failure("two contexts with one id")
        self.contexts = {reply.data[4:].decode(): one for reply, one in zip(chosen, ids, strict=True)}
        if len(self.contexts) != len(ids):
            raise Failure("one context with two ids")

    def go(self, types: list[int], number: int = nbdwire.GO) -> None:
        """INFO or GO, which must be granted; ``infos`` is what the server said."""
        replies = self.must(number, nbdwire.info(self.export, types)[16:])
        try:
            self.infos = nbdwire.read_infos([one for one in replies if one.type != nbdwire.INFO_REPLY or _known(one)])
        except (AssertionError, KeyError) as error:
            raise Failure(f"malformed information: {_why(error)}") from None

    # Transmission

    def request(
        self, command: int, offset: int, length: int, flags: int = 0, payload: bytes = b"", cookie: int | None = None
    ) -> None:
        if cookie is None:
            cookie, self._next_cookie = self._next_cookie, self._next_cookie + 1
        if command != nbdwire.DISC:
            self.outstanding.append((cookie, Sent(command, offset, length, flags)))
        extended = self.dialect == "extended"
        self.send(
            nbdwire.request(command, offset, length, flags=flags, cookie=cookie, payload=payload, extended=extended)
        )

    def reply(self) -> Sent:
        """The whole reply to the oldest request without one; others may come before."""
        _, wanted = self.outstanding[0]
        while not wanted.done:
            self._take_message()
        self.outstanding.popleft()
        return wanted

    def _take_message(self) -> None:
        header = self.take(16)
        magic = header[:4]
        reads: dict[int, int] = {}
        if magic == b"\x67\x44\x66\x98":
            _, error, cookie = struct.unpack(">IIQ", header)
            sent = self._sent(cookie)
            if sent.command == nbdwire.READ and not error:
                reads[cookie] = sent.length
                header += self.take(sent.length)
        elif magic == b"\x66\x8e\x33\xef":
            header += self.take(4)
            header += self._payload(struct.unpack_from(">I", header, 16)[0])
        elif magic == b"\x6e\x8a\x27\x8c":
            header += self.take(16)
            header += self._payload(struct.unpack_from(">Q", header, 24)[0])
        else:
            raise Failure(f"no reply: {header.hex()}")
        try:
            (message,) = nbdwire.split_replies(header, reads)
        except (AssertionError, ValueError, struct.error) as error:
            raise Failure(f"a malformed reply: {_why(error)}") from None
        sent = self._sent(message.cookie)
        self._check_style(sent, message)
        _check_message(sent, message)
        sent.messages.append(message)
        sent.done = message.done
        if sent.done and not sent.error:
            self._check_whole(sent)

    def _payload(self, length: int) -> bytes:
        if length > MAX_REPLY:
            raise Failure(f"a chunk of {length} bytes")
        return self.take(length)

    def _sent(self, cookie: int) -> Sent:
        for one, sent in self.outstanding:
            if one == cookie and not sent.done:
                return sent
        raise Failure(f"a reply with cookie {cookie:#x}, which is not outstanding")

    def _check_style(self, sent: Sent, message: Message) -> None:
        if message.kind != self.dialect:
            if (self.dialect, message.kind) != ("structured", "simple"):
                raise Failure(f"a {message.kind} reply where {self.dialect} ones were negotiated")
            if sent.command == nbdwire.READ or sent.messages:
                raise Failure("a simple reply where a structured one is due")
        if message.at not in (None, sent.offset):
            raise Failure(f"an extended reply with the offset {message.at}, not {sent.offset}")

    def _check_whole(self, sent: Sent) -> None:
        if sent.command == nbdwire.READ and sent.messages[0].kind != "simple":
            covered = sum(end - start for start, end in sent.covered)
            if covered != sent.length:
                raise Failure("a READ that succeeds, but not with all its bytes")
        if sent.command == nbdwire.BLOCK_STATUS:
            if sent.messages[0].kind == "simple":
                raise Failure("a simple reply to BLOCK_STATUS")
            ids = [one.context_id for one in sent.messages if one.context_id is not None]
            if len(set(ids)) != len(ids):
                raise Failure("two status chunks for one context")
            if not set(ids) <= set(self.contexts.values()):
                raise Failure("a status chunk for a context that was not selected")
            if not sent.flags & nbdwire.PAYLOAD_LEN and len(ids) != len(self.contexts):
                raise Failure(f"{len(ids)} status chunks for {len(self.contexts)} contexts")


def check_option_reply(reply: OptionReply) -> None:
    """What each type of reply has to look like."""
    if reply.failed:
        if len(reply.data) > 4096:
            raise Failure(f"an error text of {len(reply.data)} bytes")
        if b"\0" in reply.data:
            raise Failure("an error text with a NUL byte")
        _utf8(reply.data, "an error text")
    elif reply.type == nbdwire.ACK and reply.data:
        raise Failure("an ACK with data")
    elif reply.type == nbdwire.SERVER:
        length = int.from_bytes(reply.data[:4], "big")
        if len(reply.data) < 4 or length > len(reply.data) - 4 or length > 4096:
            raise Failure("a name that passes the end of its reply")
        _utf8(reply.data[4:], "an export's name and description")
    elif reply.type == nbdwire.INFO_REPLY:
        kind = int.from_bytes(reply.data[:2], "big")
        exact = {0: 12, 3: 14}.get(kind, len(reply.data))
        if len(reply.data) < 2 or len(reply.data) != exact:
            raise Failure(f"information of type {kind} in {len(reply.data)} bytes")
        if kind in (1, 2):
            _utf8(reply.data[2:], "a name or description")
    elif reply.type == nbdwire.META_CONTEXT:
        if len(reply.data) < 7 or b":" not in reply.data[4:]:
            raise Failure("a metadata context without a name")
        _utf8(reply.data[4:], "a metadata context's name")


def _check_message(sent: Sent, message: Message) -> None:
    """One chunk by itself, and beside those before it."""
    if message.type in (nbdwire.OFFSET_DATA, nbdwire.OFFSET_HOLE):
        if sent.command != nbdwire.READ:
            raise Failure("content in a reply to something other than a READ")
        start = (message.offset or 0) - sent.offset
        end = start + (len(message.data) or message.length)
        if not 0 <= start < end <= sent.length:
            raise Failure("content outside of what was asked for")
        if any(start < other_end and other_start < end for other_start, other_end in sent.covered):
            raise Failure("content that comes twice")
        if sent.covered and sent.flags & nbdwire.DF:
            raise Failure("two content chunks in spite of DF")
        sent.covered.append((start, end))
    elif message.context_id is not None:
        if sent.command != nbdwire.BLOCK_STATUS:
            raise Failure("block status in a reply to something else")
        _check_extents(sent, message)
    elif message.type == nbdwire.ERROR_OFFSET and not sent.flags & nbdwire.PAYLOAD_LEN:
        at = -1 if message.offset is None else message.offset - sent.offset
        if not 0 <= at < max(sent.length, 1):
            raise Failure("an error's offset outside of what was asked for")


def _check_extents(sent: Sent, message: Message) -> None:
    lengths = [length for length, _ in message.extents]
    if len(lengths) > MAX_EXTENTS:
        raise Failure(f"{len(lengths)} extents in one chunk")
    if sent.flags & nbdwire.PAYLOAD_LEN:
        return  # the effect length is in the payload
    if sent.flags & nbdwire.REQ_ONE and (len(lengths) != 1 or lengths[0] > sent.length):
        raise Failure(f"extents {lengths[:3]} in spite of REQ_ONE")
    if sum(lengths[:-1]) >= sent.length > 0:
        raise Failure("more than the last extent passes the end of what was asked for")


def _known(reply: OptionReply) -> bool:
    return int.from_bytes(reply.data[:2], "big") in range(4)


def _utf8(data: bytes, what: str) -> None:
    try:
        data.decode()
    except UnicodeDecodeError:
        raise Failure(f"{what} that is no UTF-8") from None


def _why(error: Exception) -> str:
    """An assertion's own words, else its source."""
    return str(error) or (traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__)
