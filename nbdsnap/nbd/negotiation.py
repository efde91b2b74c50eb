"""The handshake of fixed newstyle NBD, as a state machine without I/O (proto.md, "Handshake" and "TLS support").

::

    start() ──> CLIENT_FLAGS ──flags──> OPTIONS ──GO, EXPORT_NAME──> TRANSMISSION
                                        │  ▲  └──ABORT, refused EXPORT_NAME──> CLOSED
                                STARTTLS│  │tls_established()
                                        ▼  │
                                      STARTTLS

The driver's loop: hand what arrived to ``receive``; send what ``data_to_send`` returns, until it returns nothing; look
at ``state``.  Then read again: as long as the driver reads only after everything was sent, memory stays within
``NegotiationLimits`` plus one read, whatever the client does.

Rules that hold throughout:

* An option is refused only after its data has been consumed, so the stream stays in step.  Data that is of no use
  (unknown options, oversized ones, any before mandatory TLS) is skipped, never stored.
* How the bytes are split into ``receive`` calls makes no difference.
* Where the protocol knows no answer, ``receive`` raises ProtocolError (nothing it sent can be trusted to be in step) or
  the state becomes CLOSED (the protocol asks for it); ``close_reason`` says why, for the log.  What is left in
  ``data_to_send`` may still be sent.
* STARTTLS forgets what was negotiated before it, and plaintext behind it is never parsed: it ends the connection
  (CVE-2021-3716).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic

from nbdsnap.errors import ConflictError, NbdsnapError, ProtocolError
from nbdsnap.nbd.constants import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    HELLO,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_MAGIC,
    NBD_MAX_STRING,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_EXTENDED_HEADERS,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_OPTION_MAGIC,
    NBD_REP_ACK,
    NBD_REP_ERR_EXT_HEADER_REQD,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_TOO_BIG,
    NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP,
    NBD_REP_INFO,
    NBD_REP_MAGIC,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    OPTION,
    OPTION_NAMES,
    OPTION_REPLY,
)
from nbdsnap.nbd.options import (
    ContextRequest,
    InfoRequest,
    InvalidOptionError,
    decode_string,
    match_contexts,
    parse_contexts,
    parse_info,
    parse_nothing,
)
from nbdsnap.nbd.replies import encode_text
from nbdsnap.nbd.session import ExportInfo, ExportSource, Handle, OptionRefusedError, Session

__all__ = [
    "ExportInfo",
    "ExportSource",
    "Negotiation",
    "NegotiationLimits",
    "OptionRefusedError",
    "Session",
    "State",
    "TlsMode",
]


class TlsMode(Enum):
    """The document's NOTLS, SELECTIVETLS and FORCEDTLS."""

    OFF = "off"
    OPTIONAL = "optional"
    REQUIRED = "required"


class State(Enum):
    CLIENT_FLAGS = "client flags"
    OPTIONS = "options"
    STARTTLS = "starttls"
    """Send what is left, upgrade the connection, then call ``tls_established``; if the upgrade fails, close it."""
    TRANSMISSION = "transmission"
    CLOSED = "closed"
    """Send what is left and close the connection."""


@dataclass(frozen=True)
class NegotiationLimits:
    """Bounds of one handshake.  Its duration is the driver's to bound."""

    option_length: int = 256 << 10
    """Bytes of data of a known option.  A GO has at most 135 KiB: a name of 4096 bytes and 65,535 information types."""

    options: int = 1 << 20
    """Options in one handshake, far more than any client sends (there is no telling how many a new one tries, so
    not a few dozen); past it the client is in a loop, and is dropped."""

    contexts: int = 64
    """Metadata contexts that one client may select: each costs a walk over the range in every block status."""

    output: int = 1 << 20
    """Bytes of replies waiting to be sent; past it, options wait.  Without it, a pipelined series of LIST would make
    replies of thousands of times its own size."""


class Negotiation(Generic[Handle]):
    """One connection's handshake.  ``state``, ``session`` and ``close_reason`` are there to be read."""

    def __init__(
        self,
        exports: ExportSource[Handle],
        *,
        tls: TlsMode = TlsMode.OFF,
        limits: NegotiationLimits | None = None,
    ) -> None:
        self._exports = exports
        self._tls_mode = tls
        self._limits = limits or NegotiationLimits()
        self._input = bytearray()
        self._output = bytearray()
        self._skip = 0  # bytes of the current option's data still to be thrown away
        self._after_skip: tuple[int, int, str] | None = None  # option, error, text: the reply once they are
        self._options_seen = 0
        self._client_flags = 0
        self._shutting_down = False
        self._tls = False
        self._structured = False
        self._extended = False
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._contexts_of = ""  # the export that they were selected for, by the name the client used
        self.state = State.CLIENT_FLAGS
        self.session: Session[Handle] | None = None
        self.close_reason = ""

    # Driver's side

    def start(self) -> None:
        """Queue the server's greeting."""
        self._output += HELLO.pack(NBD_MAGIC, NBD_OPTION_MAGIC, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take what arrived.  Raises ProtocolError when the connection has to be dropped."""
        if self.state is State.CLOSED:
            return
        self._input += data
        self._advance()

    def data_to_send(self) -> bytes:
        """What to send now; call it until it returns nothing.

        Once all is sent it goes on with options that had to wait, and so raises what ``receive`` raises.
        """
        if not self._output:
            self._advance()
        data = bytes(self._output)
        self._output.clear()
        return data

    @property
    def buffered(self) -> int:
        """Bytes of memory held: received and not consumed, and replies not sent."""
        return len(self._input) + len(self._output)

    def leftover(self) -> bytes:
        """In TRANSMISSION: the bytes received behind the handshake, once."""
        data = bytes(self._input)
        self._input.clear()
        return data

    def tls_established(self) -> None:
        """The connection has been upgraded: go on, with nothing negotiated."""
        assert self.state is State.STARTTLS and not self._output
        self._tls = True
        self._forget()
        self.state = State.OPTIONS

    def shutdown(self) -> None:
        """The server is going down: from now on options are answered NBD_REP_ERR_SHUTDOWN."""
        self._shutting_down = True

    # The stream

    def _advance(self) -> None:
        while len(self._output) < self._limits.output and self._step():
            pass

    def _step(self) -> bool:
        """Consume one element of the input; False where it is not there yet."""
        if self._skip:
            return self._skip_data()
        if self.state is State.OPTIONS:
            return self._next_option()
        if self.state is State.CLIENT_FLAGS:
            return self._receive_client_flags()
        if self.state is State.STARTTLS and self._input:
            raise self._violation("the client sent data behind NBD_OPT_STARTTLS, before the answer")
        if self.state is State.CLOSED:
            self._input.clear()
        return False

    def _receive_client_flags(self) -> bool:
        if len(self._input) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack(self._take(CLIENT_FLAGS.size))
        if flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
            raise self._violation(f"unknown client flags 0x{flags:x}")
        self._client_flags = flags
        self.state = State.OPTIONS
        return True

    def _next_option(self) -> bool:
        if len(self._input) < 8:
            return False
        if int.from_bytes(self._input[:8], "big") != NBD_OPTION_MAGIC:
            raise self._violation("the magic number of an option is wrong")
        if len(self._input) < OPTION.size:
            return False
        _, option, length = OPTION.unpack_from(self._input)
        refusal = self._refuse(option, length)
        if refusal is None and len(self._input) < OPTION.size + length:
            return False
        self._take(OPTION.size)
        self._options_seen += 1
        if self._options_seen > self._limits.options:
            raise self._violation(f"more than {self._limits.options} options in one handshake")
        if refusal is None:
            self._handle(option, self._take(length))
        elif option == NBD_OPT_EXPORT_NAME:
            self._close(refusal[1])  # the one option that has no error reply
        else:
            self._skip = length
            self._after_skip = (option, *refusal)
            self._skip_data()
        return True

    def _refuse(self, option: int, length: int) -> tuple[int, str] | None:
        """The error that an option gets whatever its data, which is then skipped; None: it needs its data."""
        if option == NBD_OPT_ABORT:
            return NBD_REP_ACK, ""
        if self._tls_mode is TlsMode.REQUIRED and not self._tls and option != NBD_OPT_STARTTLS:
            return NBD_REP_ERR_TLS_REQD, "this server talks to clients over TLS only"
        if self._shutting_down:
            return NBD_REP_ERR_SHUTDOWN, "the server is shutting down"
        if option not in _HANDLERS:
            return NBD_REP_ERR_UNSUP, f"option {option} is not known here"
        if option == NBD_OPT_EXPORT_NAME:
            return (NBD_REP_ERR_INVALID, "the export name is too long") if length > NBD_MAX_STRING else None
        if length > self._limits.option_length:
            name = OPTION_NAMES[option]
            return NBD_REP_ERR_TOO_BIG, f"{name} with {length} bytes of data; {self._limits.option_length} are allowed"
        return None

    def _skip_data(self) -> bool:
        """Throw data away; at its end, answer."""
        skipped = min(self._skip, len(self._input))
        del self._input[:skipped]
        self._skip -= skipped
        if self._skip:
            return False
        assert self._after_skip is not None
        option, reply, text = self._after_skip
        self._after_skip = None
        self._reply(option, reply, encode_text(text))
        if option == NBD_OPT_ABORT:
            self._close("the client ended the handshake")
        return True

    def _handle(self, option: int, data: bytes) -> None:
        """Execute one option; what it raises becomes its answer."""
        try:
            _HANDLERS[option](self, option, data)
            return
        except InvalidOptionError as error:
            reply, text = NBD_REP_ERR_INVALID, str(error)
        except OptionRefusedError as error:
            reply, text = error.reply, str(error)
        except ConflictError as error:
            reply, text = NBD_REP_ERR_POLICY, str(error)
        except NbdsnapError as error:
            reply, text = NBD_REP_ERR_UNKNOWN, str(error)
        if option == NBD_OPT_EXPORT_NAME:
            self._close(text)
        else:
            self._reply(option, reply, encode_text(text))

    # Options

    def _option_export_name(self, option: int, data: bytes) -> None:
        name = decode_string(data, "the export name")
        if self._extended:
            raise InvalidOptionError("NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")
        export = self._find(name)
        flags = self._transmission_flags(name, export)
        self._enter(name, export)
        self._output += EXPORT_NAME_REPLY.pack(export.size, flags)
        if not self._client_flags & NBD_FLAG_C_NO_ZEROES:
            self._output += EXPORT_NAME_PADDING

    def _option_list(self, option: int, data: bytes) -> None:
        parse_nothing(data)
        for export in list(self._exports.list()):
            name = export.name.encode()
            self._reply(option, NBD_REP_SERVER, len(name).to_bytes(4, "big") + name + export.description.encode())
        self._reply(option, NBD_REP_ACK)

    def _option_starttls(self, option: int, data: bytes) -> None:
        parse_nothing(data)
        if self._tls:
            raise InvalidOptionError("TLS is established already")
        if self._tls_mode is TlsMode.OFF:
            raise OptionRefusedError("TLS is not enabled here", NBD_REP_ERR_POLICY)
        if not self._client_flags & NBD_FLAG_C_FIXED_NEWSTYLE:
            raise OptionRefusedError("TLS needs NBD_FLAG_C_FIXED_NEWSTYLE", NBD_REP_ERR_POLICY)
        self._reply(option, NBD_REP_ACK)
        self.state = State.STARTTLS

    def _option_info(self, option: int, data: bytes) -> None:
        request = parse_info(data)
        export = self._find(request.name)
        infos = self._infos(request, export)
        if option == NBD_OPT_GO:
            self._enter(request.name, export)
        for info in infos:
            self._reply(option, NBD_REP_INFO, info)
        self._reply(option, NBD_REP_ACK)

    def _option_structured_reply(self, option: int, data: bytes) -> None:
        parse_nothing(data)
        if self._extended:
            text = "extended headers are negotiated and take precedence"
            raise OptionRefusedError(text, NBD_REP_ERR_EXT_HEADER_REQD)
        self._structured = True
        self._reply(option, NBD_REP_ACK)

    def _option_extended_headers(self, option: int, data: bytes) -> None:
        parse_nothing(data)
        self._structured = self._extended = True
        self._reply(option, NBD_REP_ACK)

    def _option_list_meta_context(self, option: int, data: bytes) -> None:
        request, available = self._meta_contexts(data)
        names = match_contexts(available, request.queries, wildcards=True) if request.queries else list(available)
        for name in names:
            self._reply(option, NBD_REP_META_CONTEXT, bytes(4) + name.encode())
        self._reply(option, NBD_REP_ACK)

    def _option_set_meta_context(self, option: int, data: bytes) -> None:
        self._contexts = ()
        request, available = self._meta_contexts(data)
        names = match_contexts(available, request.queries, wildcards=False)
        if len(names) > self._limits.contexts:
            text = f"{len(names)} metadata contexts; {self._limits.contexts} may be selected"
            raise OptionRefusedError(text, NBD_REP_ERR_TOO_BIG)
        self._contexts = tuple(enumerate(names, 1))
        self._contexts_of = request.name
        for context_id, name in self._contexts:
            self._reply(option, NBD_REP_META_CONTEXT, context_id.to_bytes(4, "big") + name.encode())
        self._reply(option, NBD_REP_ACK)

    # Parts of options

    def _meta_contexts(self, data: bytes) -> tuple[ContextRequest, tuple[str, ...]]:
        request = parse_contexts(data)
        if not self._structured:
            raise InvalidOptionError("metadata contexts need structured replies or extended headers first")
        self._find(request.name)
        return request, tuple(dict.fromkeys(self._exports.meta_contexts(request.name)))

    def _find(self, name: str) -> ExportInfo:
        export = self._exports.find(name)
        if export is None:
            raise OptionRefusedError(f"no export {name!r}" if name else "no default export", NBD_REP_ERR_UNKNOWN)
        return export

    def _infos(self, request: InfoRequest, export: ExportInfo) -> list[bytes]:
        """NBD_INFO_EXPORT, and of the others what was asked for and is known."""
        infos = [INFO_EXPORT.pack(NBD_INFO_EXPORT, export.size, self._transmission_flags(request.name, export))]
        if NBD_INFO_NAME in request.infos:
            infos.append(NBD_INFO_NAME.to_bytes(2, "big") + export.name.encode())
        if NBD_INFO_DESCRIPTION in request.infos and export.description:
            infos.append(NBD_INFO_DESCRIPTION.to_bytes(2, "big") + export.description.encode())
        if NBD_INFO_BLOCK_SIZE in request.infos:
            sizes = (export.minimum_block, export.preferred_block, export.maximum_payload)
            infos.append(INFO_BLOCK_SIZE.pack(NBD_INFO_BLOCK_SIZE, *sizes))
        return infos

    def _contexts_for(self, name: str) -> tuple[tuple[int, str], ...]:
        """The selected contexts, where they were selected for the export of that very name."""
        return self._contexts if name == self._contexts_of else ()

    def _transmission_flags(self, name: str, export: ExportInfo) -> int:
        status_payload = self._extended and bool(self._contexts_for(name))
        return export.transmission_flags(structured=self._structured, status_payload=status_payload)

    def _enter(self, name: str, export: ExportInfo) -> None:
        """Open the export and begin transmission; raises, with nothing changed, where it can't be opened."""
        contexts = self._contexts_for(name)
        handle = self._exports.open(name, [context for _, context in contexts])
        if handle is None:
            raise OptionRefusedError(f"no export {name!r}", NBD_REP_ERR_UNKNOWN)
        self.session = Session(
            handle=handle,
            export=export,
            transmission_flags=self._transmission_flags(name, export),
            structured=self._structured,
            extended=self._extended,
            contexts=contexts,
            no_zeroes=bool(self._client_flags & NBD_FLAG_C_NO_ZEROES),
            tls=self._tls,
        )
        self.state = State.TRANSMISSION

    # Small things

    def _forget(self) -> None:
        self._structured = False
        self._extended = False
        self._contexts = ()
        self._contexts_of = ""

    def _take(self, length: int) -> bytes:
        data = bytes(self._input[:length])
        del self._input[:length]
        return data

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._output += OPTION_REPLY.pack(NBD_REP_MAGIC, option, reply, len(data))
        self._output += data

    def _close(self, reason: str) -> None:
        self.state = State.CLOSED
        self.close_reason = reason

    def _violation(self, reason: str) -> ProtocolError:
        self._close(reason)
        return ProtocolError(reason)


_HANDLERS: Final[dict[int, Callable[[Negotiation[Any], int, bytes], None]]] = {
    NBD_OPT_EXPORT_NAME: Negotiation._option_export_name,
    NBD_OPT_LIST: Negotiation._option_list,
    NBD_OPT_STARTTLS: Negotiation._option_starttls,
    NBD_OPT_INFO: Negotiation._option_info,
    NBD_OPT_GO: Negotiation._option_info,
    NBD_OPT_STRUCTURED_REPLY: Negotiation._option_structured_reply,
    NBD_OPT_LIST_META_CONTEXT: Negotiation._option_list_meta_context,
    NBD_OPT_SET_META_CONTEXT: Negotiation._option_set_meta_context,
    NBD_OPT_EXTENDED_HEADERS: Negotiation._option_extended_headers,
}
"""Every option that is executed; NBD_OPT_ABORT is answered in ``_refuse``, ahead of TLS and shutdown."""
