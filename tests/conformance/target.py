"""Where the server under test is: its URI, how to connect to it, and what it can do.

Anything that the protocol leaves to the server (structured replies, TLS, a writable export…) is asked for once, by
:meth:`Target.probe`; a case that needs what is not there does not apply.
"""

from __future__ import annotations

import socket
import ssl
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.conformance import names
from tests.conformance.connection import Connection, Failure
from tests.support import nbdwire

DEFAULT_PORT = 10809


@dataclass
class Address:
    """One export of one server."""

    export: str
    place: tuple[str, int] | str
    """Host and port, or a unix socket's path."""
    tls: bool

    @classmethod
    def parse(cls, uri: str) -> Address:
        parts = urlsplit(uri)
        scheme, _, transport = parts.scheme.partition("+")
        if scheme not in ("nbd", "nbds") or transport not in ("", "unix"):
            raise ValueError(f"{uri!r} is no NBD URI")
        export = unquote(parts.path.removeprefix("/"))
        if transport == "unix":
            return cls(export, parse_qs(parts.query)["socket"][0], scheme == "nbds")
        return cls(export, (parts.hostname or "localhost", parts.port or DEFAULT_PORT), scheme == "nbds")

    def connect(self, timeout_s: float) -> socket.socket:
        if isinstance(self.place, tuple):
            sock = socket.create_connection(self.place, timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout_s)
        sock.connect(self.place)
        return sock


@dataclass
class Target:
    """``uri``: an export that may be overwritten.  ``read_only``: one that can't be, on this server or another.
    ``certificates``: a folder with ca-cert.pem and, for servers that ask for them, client-cert.pem and client-key.pem.
    """

    uri: str
    read_only: str = ""
    certificates: Path | None = None
    timeout_s: float = 5.0
    features: set[str] = field(default_factory=set)
    size: int = 0

    @property
    def address(self) -> Address:
        return Address.parse(self.uri)

    def connect(self, *, read_only: bool = False) -> Connection:
        """Connected; nothing read or sent."""
        address = Address.parse(self.read_only) if read_only else self.address
        try:
            sock = address.connect(self.timeout_s)
        except OSError as error:
            raise Failure(f"no connection: {error}") from None
        return Connection(sock, address.export, self.timeout_s)

    def second_export(self) -> str:
        """The read-only export's name, where both are the same server's; else ""."""
        if not self.read_only:
            return ""
        other = Address.parse(self.read_only)
        return other.export if other.place == self.address.place and other.export != self.address.export else ""

    def tls_context(self, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """A client's: it looks at no host name, since what is tested is the protocol."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if version is not None:
            with warnings.catch_warnings():  # that 1.0 and 1.1 should not be used: they are offered to be refused
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = context.maximum_version = version
            if version < ssl.TLSVersion.TLSv1_2:
                context.set_ciphers("ALL:@SECLEVEL=0")
        if self.certificates is not None:
            context.load_verify_locations(self.certificates / "ca-cert.pem")
            context.verify_mode = ssl.CERT_REQUIRED
            if (self.certificates / "client-cert.pem").exists():
                context.load_cert_chain(self.certificates / "client-cert.pem", self.certificates / "client-key.pem")
        return context

    def hello(self, connection: Connection, *, tls: bool | None = None) -> Connection:
        """Greeted, flags sent; over TLS where the URI says so."""
        connection.hello()
        connection.send(nbdwire.client_flags(3))
        if self.address.tls if tls is None else tls:
            connection.starttls(self.tls_context())
        return connection

    def probe(self) -> None:
        """Find out what the server offers."""
        found: set[str] = set()
        with self.connect() as one:
            self.hello(one, tls=False)
            one.option(nbdwire.STARTTLS)
            starttls = one.answer()[-1].type == nbdwire.ACK
        mode = "off"
        if starttls:
            with self.connect() as one:
                self.hello(one, tls=False)
                one.option(nbdwire.LIST)
                mode = "required" if one.answer()[-1].type == nbdwire.TLS_REQD else "optional"
            found.add("tls")
        found.add(f"tls={mode}")
        with self.connect() as one:
            self.hello(one)
            found |= self._probe_options(one)
        if self.read_only:
            found.add("read-only")
        if self.second_export():
            found.add("second")
        self.features = found

    def _probe_options(self, one: Connection) -> set[str]:
        found = set()
        if one.ask(nbdwire.EXTENDED_HEADERS):
            found.add("extended")
            with self.connect() as other:
                self.hello(other)
                if other.ask(nbdwire.STRUCTURED_REPLY):
                    found.add("structured")
        elif one.ask(nbdwire.STRUCTURED_REPLY):
            found.add("structured")
        if found:
            one.option(nbdwire.LIST_META_CONTEXT, nbdwire.string(one.export) + bytes(4))
            replies = one.answer()
            if any(reply.type == nbdwire.META_CONTEXT and reply.data[4:] == b"base:allocation" for reply in replies):
                found.add("contexts")
                one.select(one.export, ["base:allocation"])
        one.go([3])
        self.size = one.infos.size
        found |= {f"flag:{name}" for name, bit in names.TRANSMISSION_FLAGS.items() if one.infos.flags & bit}
        if not one.infos.flags & names.TRANSMISSION_FLAGS["READ_ONLY"]:
            found.add("writable")
        if one.infos.block_size is None or one.infos.block_size[0] == 1:
            found.add("byte-granularity")
        if one.infos.block_size is not None:
            found.add("block-size")
        return found
