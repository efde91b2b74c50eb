"""The protocol's machines joined to a test without a socket, by drivers that do what a server does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nbdsnap.errors import NbdsnapError
from nbdsnap.nbd.negotiation import ExportInfo, Negotiation, NegotiationLimits, State, TlsMode
from nbdsnap.nbd.transmission import Request, RequestParser
from tests.support import nbdwire
from tests.support.nbdwire import OptionReply

SIZE = 10 << 20
CONTEXTS = ("base:allocation", "x-nbdsnap:changed:monday", "qemu:dirty-bitmap:monday", "qemu:allocation-depth")


class Exports:
    """Two exports: ``vol`` (also the default one) and the read-only ``vol@monday``.  Records what was asked."""

    def __init__(self, contexts: Sequence[str] = CONTEXTS, exports: Iterable[ExportInfo] = ()) -> None:
        self.infos = {
            export.name: export
            for export in exports
            or (
                ExportInfo("vol", SIZE, "a volume"),
                ExportInfo("vol@monday", SIZE // 2, "a snapshot", read_only=True),
            )
        }
        self.contexts = contexts
        self.opened: list[str] = []
        self.opened_contexts: list[tuple[str, ...]] = []
        self.failure: NbdsnapError | None = None
        """What ``open`` raises."""

    def list(self) -> Iterable[ExportInfo]:
        return self.infos.values()

    def find(self, name: str) -> ExportInfo | None:
        return self.infos.get(name or "vol")

    def open(self, name: str, contexts: Sequence[str]) -> str | None:
        self.opened.append(name)
        self.opened_contexts.append(tuple(contexts))
        if self.failure is not None:
            raise self.failure
        export = self.find(name)
        return None if export is None else f"handle of {export.name}"

    def meta_contexts(self, name: str) -> Sequence[str]:
        return self.contexts


class Pair:
    """A client's view of one handshake."""

    def __init__(
        self,
        exports: Exports | None = None,
        *,
        tls: TlsMode = TlsMode.OFF,
        limits: NegotiationLimits | None = None,
        flags: int | None = 3,
    ) -> None:
        self.exports = exports or Exports()
        self.server: Negotiation[str] = Negotiation(self.exports, tls=tls, limits=limits)
        self.server.start()
        assert self.read() == nbdwire.HELLO
        if flags is not None:
            assert self.send(nbdwire.client_flags(flags)) == b""

    def read(self) -> bytes:
        return b"".join(iter(self.server.data_to_send, b""))

    def send(self, data: bytes) -> bytes:
        self.server.receive(data)
        return self.read()

    def ask(self, data: bytes) -> list[OptionReply]:
        """Send options; what the server answers."""
        return nbdwire.split_option_replies(self.send(data))

    def ask_one(self, data: bytes) -> OptionReply:
        (reply,) = self.ask(data)
        return reply

    def start_tls(self) -> None:
        """STARTTLS and an upgrade that works."""
        assert self.ask_one(nbdwire.option(nbdwire.STARTTLS)).type == nbdwire.ACK
        assert self.server.state is State.STARTTLS
        self.server.tls_established()

    @property
    def in_step(self) -> bool:
        """The next option is understood."""
        return self.ask_one(nbdwire.option(0x4E4F5045)) == OptionReply(
            0x4E4F5045, nbdwire.UNSUP, b"option 1313820741 is not known here"
        )


class Stream:
    """A request parser with the buffer that a server keeps for it: only what is not yet a whole request."""

    def __init__(self, parser: RequestParser) -> None:
        self.parser = parser
        self.buffer = bytearray()
        self.requests: list[Request] = []
        """As the parser gave them; a payload's position means nothing any more."""
        self.payloads: list[bytes | None] = []
        """Of each request; None where it has none, or it was dropped."""

    def feed(self, data: bytes) -> None:
        self.buffer += data
        found: list[Request] = []
        position = 0
        try:
            position = self.parser.parse(self.buffer, 0, len(self.buffer), found)
        finally:
            self.requests += found
            self.payloads += [bytes(self.buffer[r[5] : r[5] + r[4]]) if r[5] >= 0 else None for r in found]
            del self.buffer[:position]
