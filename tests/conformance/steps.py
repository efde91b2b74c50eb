"""Carries out a case's steps.  README.md says what each of them means; this is the only place that knows how.

A step is one line: a word, then operands, quoted as a shell quotes them.  :func:`run_case` gives an :class:`Outcome`
and leaves nothing open.
"""

from __future__ import annotations

import re
import shlex
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from tests.conformance import names
from tests.conformance.connection import Connection, Failure, Sent
from tests.conformance.numbers import COMPARE, Numbers
from tests.conformance.table import DIALECTS, Case, TableError
from tests.conformance.target import Target
from tests.support import nbdwire
from tests.support.nbdwire import OptionReply

NO_EXPORT = "no such export"
IN_STEP_OPTION = 0x6E6F6E65
"""Nobody's: it must be refused, and says that the server understood where the options before it ended."""

TLS_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}


@dataclass(frozen=True)
class Outcome:
    """``status``: "pass", "fail", or "n/a" where the server has not what the case needs.  ``detail``: one line."""

    status: str
    detail: str = ""


def missing(case: Case, target: Target) -> str:
    """What the case needs and the server has not; "" where nothing is missing."""
    if "tls=required" in target.features and case.start in ("connected", "plain") and not _is_about_tls(case):
        return "plaintext"
    for need in case.needs:
        kind, _, value = need.partition(":")
        if kind == "size":
            if target.size < Numbers(target.size).number(value):
                return need
        elif need not in target.features:
            return need
    return ""


def _is_about_tls(case: Case) -> bool:
    return any(need.startswith("tls") for need in case.needs)


def run_case(case: Case, target: Target) -> Outcome:
    if need := missing(case, target):
        return Outcome("n/a", f"needs {need}")
    run = _Run(case, target)
    try:
        run.play()
    except Failure as failure:
        return Outcome("fail", f"{run.line}: {failure}" if run.line else str(failure))
    finally:
        run.close()
    return Outcome("pass")


class _Run:
    """One case, on its connections."""

    def __init__(self, case: Case, target: Target) -> None:
        self.case = case
        self.target = target
        self.line = ""
        self.connections: dict[str, Connection] = {}
        self.names = Numbers(target.size)
        self.replies: list[OptionReply] = []
        self.sent = Sent(0, 0, 0, 0)
        self.saved: object = None

    @property
    def connection(self) -> Connection:
        return self.connections[self.current]

    def play(self) -> None:
        self._open("A")
        for line in self.case.steps:
            self.line = line
            self._step(line)

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()

    def _open(self, name: str) -> None:
        self.current = name
        if name in self.connections:
            return
        one = self.connections[name] = self.target.connect(read_only=self.case.read_only)
        start = self.case.start
        if start == "connected":
            return
        self.target.hello(one, tls=False if start == "plain" else None)
        if start not in DIALECTS:
            return
        if start != "simple":
            self._negotiate(start)
        if self.case.contexts:
            one.select(one.export, list(self.case.contexts))
        one.go([])
        self._note_infos()

    def _negotiate(self, dialect: str) -> None:
        one = self.connection
        one.must(nbdwire.EXTENDED_HEADERS if dialect == "extended" else nbdwire.STRUCTURED_REPLY)
        one.dialect = dialect

    def _step(self, line: str) -> None:
        word, *operands = shlex.split(line)
        method = getattr(self, "do_" + word.replace("-", "_"), None)
        if method is None:
            raise TableError(f"{self.case.id}: unknown step {word!r}")
        method(*operands)

    # Operands

    def number(self, text: str) -> int:
        return self.names.number(text)

    def text(self, text: str) -> str:
        for name, value in (("EXPORT", self.connection.export), ("NONE", NO_EXPORT)):
            text = text.replace(f"${name}", value)
        return text.replace("$SECOND", self.target.second_export())

    def bytes(self, words: tuple[str, ...] | list[str]) -> bytes:
        return b"".join(self._piece(word) for word in words)

    def _piece(self, word: str) -> bytes:
        kind, _, value = word.partition(":")
        if kind in ("u16", "u32", "u64"):
            return (self.number(value) & (1 << int(kind[1:])) - 1).to_bytes(int(kind[1:]) // 8, "big")
        if kind == "hex":
            return bytes.fromhex(value)
        if kind == "text":
            return self.text(value).encode()
        if kind == "string":
            return nbdwire.string(self.text(value))
        if kind == "fill":
            byte, _, count = value.partition("*")
            return bytes([int(byte, 0)]) * self.number(count)
        raise TableError(f"{self.case.id}: {word!r} are no bytes")

    # Steps: connections and bytes

    def do_on(self, name: str) -> None:
        """Go on with another connection, which begins as the first one did."""
        self._open(name)

    def do_hello(self) -> None:
        self.connection.hello()
        self.names.values["HANDSHAKE"] = self.connection.handshake_flags

    def do_flags(self, number: str) -> None:
        self.connection.send(nbdwire.client_flags(self.number(number)))

    def do_send(self, *words: str) -> None:
        self.connection.send(self.bytes(words))

    def do_slowly(self) -> None:
        self.connection.slowly = True

    def do_together(self) -> None:
        """What is sent from here on goes out in one piece, at ``apart``."""
        self.connection.held = bytearray()

    def do_apart(self) -> None:
        data, self.connection.held = self.connection.held, None
        self.connection.send(bytes(data or b""))

    def do_closed(self) -> None:
        self.connection.expect_closed()

    def do_closed_within(self, seconds: str) -> None:
        """The server gives up on a client that does nothing."""
        one = self.connection
        one.sock.settimeout(float(seconds))
        began = time.monotonic()
        try:
            one.expect_closed()
        except Failure:
            if time.monotonic() - began >= float(seconds):
                raise Failure(f"still open after {seconds} s") from None
            raise

    def do_reset(self) -> None:
        """Leave at once, throwing away what was not read."""
        sock = self.connection.sock
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def do_hang_up(self) -> None:
        """Send no more, but go on reading."""
        socket.socket.shutdown(self.connection.sock, socket.SHUT_WR)  # an SSLSocket's own would stop reading, too

    def do_repeat(self, count: str, *steps: str) -> None:
        """The rest of the line, over and over; ``;`` stands between its steps."""
        rounds = " ".join(shlex.quote(step) if step != ";" else ";" for step in steps).split(" ; ")
        for _ in range(self.number(count)):
            for step in rounds:
                self._step(step)

    def do_in_step(self) -> None:
        """The stream is where the client thinks it is: the next thing is understood."""
        one = self.connection
        if self.names.values.get("TRANSMISSION"):
            one.request(nbdwire.READ, 0, 512)
            while one.outstanding:
                sent = one.reply()
            if sent.error:
                raise Failure(f"out of step: a READ of 512 bytes fails with {_error(sent.error)}")
            return
        one.option(IN_STEP_OPTION, b"data")
        if not one.answer()[-1].failed:
            raise Failure("out of step: an unknown option is granted")

    # Steps: handshake

    def do_option(self, name: str, *words: str) -> None:
        self.connection.option(names.number(name, names.OPTIONS), self.bytes(words))

    def do_announce(self, name: str, length: str, *words: str) -> None:
        """An option's header with a length of its own, and what data there is."""
        number = names.number(name, names.OPTIONS)
        self.connection.unanswered.append(number)
        self.connection.send(b"IHAVEOPT" + struct.pack(">II", number, self.number(length)) + self.bytes(words))

    def do_answer(self, *pattern: str) -> None:
        """The replies to the oldest option without an answer, in order: ``TYPE``, ``TYPE*``, ``A|B``."""
        number = self.connection.unanswered[0]
        self.replies = self.connection.answer()
        got = [names.REPLY_NAMES.get(reply.type, str(reply.type - (1 << 31))) for reply in self.replies]
        expression = "".join(f"(?:(?:{word.rstrip('*+')}) ){word[len(word.rstrip('*+')) :]}" for word in pattern)
        if not re.fullmatch(expression.replace("ERR_ANY", r"ERR_\w+"), "".join(f"{name} " for name in got)):
            raise Failure("got " + " ".join(got[:4] + ["…"] * (len(got) > 4)))
        if number == nbdwire.SET_META_CONTEXT:
            self.connection.note_contexts(self.replies)
            self.names.values["SELECTED"] = len(self.connection.contexts)

    def do_answers_name(self, name: str) -> None:
        """One of the replies is about this export, or this metadata context."""
        wanted = self.text(name).encode()
        for reply in self.replies:
            if reply.type == nbdwire.SERVER and reply.data[4 : 4 + int.from_bytes(reply.data[:4], "big")] == wanted:
                return
            if reply.type == nbdwire.META_CONTEXT and reply.data[4:] == wanted:
                return
        raise Failure(f"{self.text(name)!r} is not among them")

    def do_answers_within(self, prefix: str) -> None:
        """All contexts are of this namespace."""
        for reply in self.replies:
            if reply.type == nbdwire.META_CONTEXT and not reply.data[4:].startswith(prefix.encode()):
                raise Failure(f"{reply.data[4:].decode()!r} is among them")

    def do_ids_are_zero(self) -> None:
        if any(reply.type == nbdwire.META_CONTEXT and any(reply.data[:4]) for reply in self.replies):
            raise Failure("an id that is not zero")

    def do_select_all(self) -> None:
        """Select every context that the last answer has listed, but for wildcards."""
        found = [reply.data[4:].decode() for reply in self.replies if reply.type == nbdwire.META_CONTEXT]
        found = [name for name in found if not name.endswith(":")]
        self.connection.select(self.connection.export, found)
        self.names.values["SELECTED"] = len(self.connection.contexts)
        self.names.values["LISTED"] = len(found)

    def do_structured(self) -> None:
        self._negotiate("structured")

    def do_extended(self) -> None:
        self._negotiate("extended")

    def do_contexts(self, *queries: str) -> None:
        self.connection.select(self.connection.export, list(queries))
        self.names.values["SELECTED"] = len(self.connection.contexts)

    def do_info(self, *types: str) -> None:
        self.connection.go([self.number(one) for one in types], nbdwire.INFO)
        self._note_infos(transmission=False)

    def do_go(self, *types: str) -> None:
        self.connection.go([self.number(one) for one in types])
        self._note_infos()

    def do_exported(self, padding: str) -> None:
        """The answer to EXPORT_NAME: size, flags, and so many zeroes."""
        one = self.connection
        size, flags = struct.unpack(">QH", one.take(10))
        if any(one.take(self.number(padding))):
            raise Failure("the padding is not zero")
        one.unanswered.popleft()
        one.infos = nbdwire.Infos(size, flags)
        self._note_infos()

    def _note_infos(self, transmission: bool = True) -> None:
        infos = self.connection.infos
        values = self.names.values
        values["FLAGS"], values["SIZE"] = infos.flags, infos.size
        values["TRANSMISSION"] = int(transmission)
        values["NAMED"] = int(infos.name is not None)
        if infos.block_size is not None:
            values["MINIMUM"], values["PREFERRED"], values["MAXIMUM"] = infos.block_size
        elif "MAXIMUM" in values:
            del values["MAXIMUM"], values["MINIMUM"], values["PREFERRED"]

    def do_save_infos(self) -> None:
        self.saved = self.connection.infos

    def do_same_infos(self) -> None:
        if self.connection.infos != self.saved:
            raise Failure(f"{self.connection.infos} after {self.saved}")

    # Steps: TLS

    def do_starttls(self, version: str = "") -> None:
        """Upgrade; with a version, offer only that."""
        self.connection.starttls(self.target.tls_context(TLS_VERSIONS[version] if version else None))

    def do_no_tls(self, version: str) -> None:
        """The server does not agree to this version."""
        try:
            self.do_starttls(version)
        except Failure as failure:
            if str(failure).startswith("no TLS"):
                return
            raise
        raise Failure(f"TLS {version} is agreed to")

    def do_no_plaintext(self) -> None:
        """After STARTTLS with plaintext behind it: nothing but its ACK, and TLS, ever comes back."""
        data, _ = self.connection.rest(1.0)
        granted = struct.pack(">QIII", 0x3E889045565A9, nbdwire.STARTTLS, nbdwire.ACK, 0)
        if data.removeprefix(granted).startswith(granted[:8]):
            raise Failure("an option in plaintext behind STARTTLS is answered")

    def do_closed_by_tls(self) -> None:
        """The connection ends, at most with an alert before."""
        data, ended = self.connection.rest(self.target.timeout_s)
        if not ended:
            raise Failure("the server goes on after a failed TLS handshake")
        if data and data[0] != 0x15:
            raise Failure(f"the server goes on: {data[:20].hex()}")

    # Steps: transmission

    def do_request(self, command: str, offset: str, length: str, *options: str) -> None:
        """``request READ 0 512 [flags=FUA|DF] [cookie=N] [BYTES…]``: the bytes are the payload."""
        flags, cookie, payload = 0, None, []
        for option in options:
            key, _, value = option.partition("=")
            if key == "flags":
                flags = names.number(value, names.COMMAND_FLAGS)
            elif key == "cookie":
                cookie = self.number(value)
            else:
                payload.append(option)
        if self.connection.dialect == "extended" and command == "WRITE" and payload:
            flags |= nbdwire.PAYLOAD_LEN
        code = names.number(command, names.COMMANDS)
        self.connection.request(code, self.number(offset), self.number(length), flags, self.bytes(payload), cookie)

    def do_ok(self) -> None:
        self._take_reply()
        if self.sent.error:
            raise Failure(f"{_error(self.sent.error)} {self.sent.text!r}")

    def do_error(self, wanted: str) -> None:
        self._take_reply()
        allowed = [names.ERRORS[name] for name in wanted.split("|")]
        if self.sent.error not in allowed:
            raise Failure(f"{_error(self.sent.error)}, not {wanted}")

    def do_replied(self) -> None:
        """Success or an error, but a reply."""
        self._take_reply()

    def _take_reply(self) -> None:
        sent = self.sent = self.connection.reply()
        values = self.names.values
        values["CONTENT"] = len(sent.content)
        values["HOLES"] = sum(one.type == nbdwire.OFFSET_HOLE for one in sent.messages)
        values["ODD"] = sum(
            (start + sent.offset) % 512 != 0 or (end + sent.offset) % 512 != 0 for start, end in sent.covered
        )
        values["CHUNKS"] = sum(one.kind != "simple" for one in sent.messages)
        values["TEXT"] = len(sent.text)
        statuses = [one for one in sent.messages if one.context_id is not None]
        values["STATUSES"] = len(statuses)
        if statuses:
            extents = statuses[0].extents
            values["EXTENTS"] = len(extents)
            values["COVERED"] = sum(length for length, _ in extents)
            values["FIRST"], values["STATE"] = extents[0]
            values["STATES"] = 0
            for _, state in extents:
                values["STATES"] |= state
            values["REPEATED"] = sum(a[1] == b[1] for a, b in pairwise(extents))
            values["STATUS_TYPE"] = statuses[0].type

    def do_ok_or_error(self, allowed: str) -> None:
        self._take_reply()
        if self.sent.error and _error(self.sent.error) not in allowed.split("|"):
            raise Failure(_error(self.sent.error))

    def do_data(self, byte: str) -> None:
        """What was read is this byte, over and over."""
        wanted = int(byte, 0)
        data = self.sent.data()
        if data.strip(bytes([wanted])):
            raise Failure(f"read {data[:8].hex()}…, not {wanted:02x}")

    def do_read_unless_ok(self, offset: str, length: str, byte: str) -> None:
        """Where the last request failed, the data is still this byte."""
        if self.sent.error:
            self.do_read(offset, length, byte)

    def do_read_if_ok(self, offset: str, length: str, byte: str) -> None:
        """Where the last request succeeded, this is its result."""
        if not self.sent.error:
            self.do_read(offset, length, byte)

    def do_read_any(self, offset: str, length: str) -> None:
        self.do_request("READ", offset, length)
        self.do_ok()

    def do_write(self, offset: str, length: str, byte: str, *options: str) -> None:
        self.do_request("WRITE", offset, length, f"fill:{byte}*{length}", *options)
        self.do_ok()

    def do_read(self, offset: str, length: str, byte: str, *options: str) -> None:
        self.do_request("READ", offset, length, *options)
        self.do_ok()
        self.do_data(byte)

    def do_zero(self, offset: str, length: str, *options: str) -> None:
        self.do_request("WRITE_ZEROES", offset, length, *options)
        self.do_ok()

    def do_trim(self, offset: str, length: str, *options: str) -> None:
        self.do_request("TRIM", offset, length, *options)
        self.do_ok()

    def do_flush(self, *options: str) -> None:
        self.do_request("FLUSH", "0", "0", *options)
        self.do_ok()

    def do_all_replied(self) -> None:
        """Every request without a reply gets one, in whatever order."""
        while self.connection.outstanding:
            self._take_reply()

    def do_disconnect(self) -> None:
        self.do_request("DISC", "0", "0")

    def _extents(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Offset, length and state of the extents of the first context, asked for until they reach ``end``."""
        while start < end:
            length = min(end - start, 1 << 30)
            self.connection.request(nbdwire.BLOCK_STATUS, start, length)
            self.do_ok()
            for size, state in next(one.extents for one in self.sent.messages if one.context_id is not None):
                yield start, size, state
                start += size

    def do_walk_status(self) -> None:
        """Block status, asked for from where the last answer ended, reaches the end and does not pass it."""
        end = 0
        for start, size, _ in self._extents(0, self.number("SIZE")):
            end = start + size
        if end != self.number("SIZE"):
            raise Failure(f"the extents end at {end}, the export at {self.number('SIZE')}")

    def do_zeroes_read_as_zeroes(self, offset: str, length: str) -> None:
        start, end = self.number(offset), self.number(offset) + self.number(length)
        for at, size, state in self._extents(start, end):
            size = min(size, end - at)
            if state & 2:
                self.connection.request(nbdwire.READ, at, size)
                self.do_ok()
                self.do_data("0")

    def do_id(self, name: str) -> None:
        """``ID`` becomes the id of a selected context."""
        self.names.values["ID"] = self.connection.contexts[name]

    def do_check(self, left: str, comparison: str, right: str) -> None:
        a, b = self.number(left), self.number(right)
        if not COMPARE[comparison](a, b):
            raise Failure(f"{left} is {a:#x}" if comparison in ("has", "lacks") else f"{left} is {a}")

    def do_check_power_of_2(self, name: str) -> None:
        value = self.number(name)
        if value < 1 or value & (value - 1):
            raise Failure(f"{name} is {value}")


def _error(number: int) -> str:
    return names.ERROR_NAMES.get(number, str(number)) if number else "success"
