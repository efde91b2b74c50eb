"""What holds for any bytes that a peer may send.  Each function raises AssertionError where it does not.

The invariants: the bytes parse or raise ProtocolError; how they are split into reads makes no difference to anything
that the other side, or the server, can see; memory is bounded by the limits plus one read, whatever lengths the bytes
announce.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from nbdsnap.errors import ProtocolError
from nbdsnap.nbd.negotiation import NegotiationLimits, State, TlsMode
from nbdsnap.nbd.options import InvalidOptionError, parse_contexts, parse_info
from nbdsnap.nbd.session import ExportInfo, Session
from nbdsnap.nbd.transmission import DROPPED, NO_PAYLOAD, RequestParser, check_request, status_query
from tests.support import nbdwire
from tests.support.nbdpair import SIZE, Pair, Stream

LIMITS = NegotiationLimits(option_length=2000, options=40, contexts=3, output=500)
LARGEST_REPLY = 2000
"""Bytes; above what one option is answered by the test's exports."""

MAX_PAYLOAD = 600


def pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    """``data`` cut at the given positions, whichever of them lie in it."""
    start = 0
    for cut in sorted(set(cuts)):
        if start < cut < len(data):
            yield data[start:cut]
            start = cut
    yield data[start:]


def _haggle(data: bytes, cuts: Iterable[int], tls: TlsMode) -> object:
    """One client's whole handshake in plaintext; what both sides saw of it."""
    pair = Pair(tls=tls, limits=LIMITS, flags=None)
    sent, violation = b"", ""
    try:
        for piece in pieces(data, cuts):
            pair.server.receive(piece)
            held = LIMITS.option_length + 16 + LIMITS.output + LARGEST_REPLY + len(piece)
            assert pair.server.buffered <= held or pair.server.state is State.TRANSMISSION
            while more := pair.server.data_to_send():
                sent += more
    except ProtocolError as error:
        violation = str(error)
        sent += pair.read()
    server = pair.server
    assert (server.session is not None) == (server.state is State.TRANSMISSION)
    assert (server.state is State.CLOSED) == bool(server.close_reason)
    assert len(pair.exports.opened) == 1 or server.state is not State.TRANSMISSION
    leftover = server.leftover() if server.state is State.TRANSMISSION else b""
    return sent, violation, server.state, server.session, leftover, pair.exports.opened


def negotiation(data: bytes, cuts: Iterable[int] = (), tls: TlsMode = TlsMode.OPTIONAL) -> None:
    whole = _haggle(data, (), tls)
    assert _haggle(data, cuts, tls) == whole
    assert _haggle(data, range(len(data)), tls) == whole


def _transmit(data: bytes, cuts: Iterable[int], extended: bool) -> object:
    stream = Stream(RequestParser(extended, max_payload=MAX_PAYLOAD))
    header, violation = stream.parser.header_size, ""
    for piece in pieces(data, cuts):
        try:
            stream.feed(piece)
        except ProtocolError as error:
            violation = str(error)
            break
        assert len(stream.buffer) < stream.parser.needed <= header + (8 + 4 * 1024 if extended else MAX_PAYLOAD)
    for request, payload in zip(stream.requests, stream.payloads, strict=True):
        if request[5] in (NO_PAYLOAD, DROPPED):
            assert payload is None
        else:
            assert payload is not None and len(payload) == request[4]
    requests = [(*request[:5], min(request[5], 0)) for request in stream.requests]
    return requests, stream.payloads, violation, stream.parser.disconnected


def transmission(data: bytes, cuts: Iterable[int] = (), extended: bool = False) -> None:
    whole = _transmit(data, (), extended)
    assert _transmit(data, cuts, extended) == whole
    assert _transmit(data, range(len(data)), extended) == whole


def checked_requests(data: bytes, *, extended: bool, read_only: bool, structured: bool) -> None:
    """What the parser hands out is accepted, and then lies within the export, or gets one documented error."""
    structured = structured or extended
    export = ExportInfo("vol", SIZE, read_only=read_only)
    contexts = ((1, "base:allocation"), (2, "x-nbdsnap:changed:monday")) if structured else ()
    flags = export.transmission_flags(structured=structured, status_payload=extended)
    session = Session(None, export, flags, structured, extended, contexts)
    stream = Stream(RequestParser(extended, max_payload=MAX_PAYLOAD))
    with contextlib.suppress(ProtocolError):
        stream.feed(data)
    for (command, flags, _, offset, length, _), payload in zip(stream.requests, stream.payloads, strict=True):
        if command == nbdwire.BLOCK_STATUS:
            query = status_query(flags, length, payload, session)
            if query is None:
                continue
            length = query[0]
            assert set(query[1]) <= set(contexts)
        error = check_request(command, flags, offset, length, SIZE, read_only, session)
        assert error in (0, nbdwire.EPERM, nbdwire.EINVAL, nbdwire.ENOSPC, nbdwire.EOVERFLOW) or command == nbdwire.DISC
        assert error or command == nbdwire.DISC or offset + length <= SIZE


def option_data(data: bytes) -> None:
    """What parses is exactly what its encoding gives: no byte is read twice or left out."""
    try:
        infos = parse_info(data)
    except InvalidOptionError:
        pass
    else:
        assert data.startswith(nbdwire.string(infos.name)) and len(data) >= 6 + 2 * len(infos.infos)
    try:
        contexts = parse_contexts(data)
    except InvalidOptionError:
        pass
    else:
        assert nbdwire.contexts(contexts.name, contexts.queries)[16:] == data
