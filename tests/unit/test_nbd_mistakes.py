"""Mistakes that real servers have made, where they are about the protocol's code; one test each, named after it.

The others of the list (lost replies at a disconnect, a reset that kills the server, timeouts, connection caps, caches,
flush errors) are about a running server: see tests/interop.
"""

from __future__ import annotations

import pytest

from nbdsnap.errors import ProtocolError
from nbdsnap.nbd.constants import MAX_PAYLOAD
from nbdsnap.nbd.negotiation import State, TlsMode
from nbdsnap.nbd.replies import replies_for, status_extents
from nbdsnap.nbd.session import ExportInfo, Session
from nbdsnap.nbd.transmission import Request, RequestParser, check_request
from tests.support import nbdwire
from tests.support.nbdpair import SIZE, Pair
from tests.support.nbdwire import contexts, go, option


def session(structured: bool = True, read_only: bool = False) -> Session[None]:
    export = ExportInfo("vol", SIZE, read_only=read_only)
    flags = export.transmission_flags(structured=structured)
    return Session(None, export, flags, structured, contexts=((1, "base:allocation"),) if structured else ())


def parse(data: bytes) -> list[Request]:
    out: list[Request] = []
    assert RequestParser().parse(data, 0, len(data), out) == len(data)
    return out


def test_abort_not_acknowledged() -> None:
    pair = Pair()
    assert pair.ask_one(option(nbdwire.ABORT)).type == nbdwire.ACK
    assert pair.server.state is State.CLOSED


def test_unknown_client_flags_accepted() -> None:
    with pytest.raises(ProtocolError):
        Pair(flags=None).server.receive(nbdwire.client_flags(0x80000003))


def test_a_malformed_go_loses_the_stream() -> None:
    pair = Pair()
    replies = pair.ask(option(nbdwire.GO, nbdwire.string("vol")) + option(nbdwire.GO, b"\xff" * 70_000) + go("vol"))
    assert [reply.type for reply in replies] == [nbdwire.INVALID, nbdwire.INVALID, nbdwire.INFO_REPLY, nbdwire.ACK]


def test_simple_error_to_a_read_after_structured_replies() -> None:
    (message,) = nbdwire.split_replies(replies_for(session()).error(1, 0, nbdwire.EINVAL, "a bad flag"))
    assert message.kind == "structured" and message.error == nbdwire.EINVAL


def test_inapplicable_flags_accepted() -> None:
    one = session()
    assert check_request(nbdwire.READ, nbdwire.NO_HOLE, 0, 512, SIZE, False, one) == nbdwire.EINVAL
    assert check_request(nbdwire.WRITE, nbdwire.REQ_ONE, 0, 512, SIZE, False, one) == nbdwire.EINVAL
    assert check_request(nbdwire.TRIM, nbdwire.DF, 0, 512, SIZE, False, one) == nbdwire.EINVAL


def test_enospc_and_eperm_flattened_to_einval() -> None:
    assert check_request(nbdwire.WRITE, 0, SIZE, 512, SIZE, False, session()) == nbdwire.ENOSPC
    read_only = session(read_only=True)
    assert check_request(nbdwire.WRITE, 0, 0, 512, SIZE, True, read_only) == nbdwire.EPERM


def test_disc_drops_outstanding_replies() -> None:
    """The parser's part: what preceded DISC is handed out with it, and what follows it can't spoil that."""
    data = nbdwire.request(nbdwire.READ, 0, 512) * 50 + nbdwire.request(nbdwire.DISC) + b"\xff" * 100
    assert [one[0] for one in parse(data)] == [nbdwire.READ] * 50 + [nbdwire.DISC]


def test_fast_zero_not_advertised_but_sent() -> None:
    read_only = session(read_only=True)
    assert not read_only.transmission_flags & 1 << 11
    error = check_request(nbdwire.WRITE_ZEROES, nbdwire.FAST_ZERO, 0, 512, SIZE, True, read_only)
    assert error == nbdwire.EINVAL


def test_a_budget_of_32_options() -> None:
    pair = Pair()
    replies = pair.ask(option(0x99, b"data") * 5000)
    assert len(replies) == 5000 and {reply.type for reply in replies} == {nbdwire.UNSUP}
    assert nbdwire.read_infos(pair.ask(go("vol"))).size == SIZE


def test_any_export_name_accepted() -> None:
    for name in ("other", "VOL", "vol ", "vol@", "vol@tuesday", "@", "../vol"):
        assert Pair().ask_one(go(name)).type == nbdwire.UNKNOWN
        pair = Pair()
        assert pair.send(option(nbdwire.EXPORT_NAME, name.encode())) == b"" and pair.server.state is State.CLOSED


def test_one_context_twice_gives_two_ids() -> None:
    pair = Pair()
    pair.ask(option(nbdwire.STRUCTURED_REPLY))
    replies = pair.ask(contexts("vol", ["base:allocation"] * 3))
    assert [reply.type for reply in replies] == [nbdwire.META_CONTEXT, nbdwire.ACK]


def test_state_kept_across_starttls() -> None:
    """CVE-2021-3716."""
    pair = Pair(tls=TlsMode.OPTIONAL)
    pair.ask(option(nbdwire.STRUCTURED_REPLY) + contexts("vol", ["base:allocation"]))
    pair.start_tls()
    pair.ask(go("vol"))
    negotiated = pair.server.session
    assert negotiated is not None and not negotiated.structured and not negotiated.contexts


def test_plaintext_injected_behind_starttls() -> None:
    """CVE-2021-3716 again: what was buffered before TLS must not be taken for what came through it."""
    pair = Pair(tls=TlsMode.REQUIRED)
    with pytest.raises(ProtocolError):
        pair.server.receive(option(nbdwire.STARTTLS) + go("vol"))
    assert pair.exports.opened == []


def test_32_bit_overflows_in_block_status() -> None:
    """CVE-2025-47711."""
    extents = status_extents([(2**32 - 512, 1), (2**32, 1), (4096, 0)], 2**32 - 1)
    assert extents == [(0xFFFFF000, 1)]
    nbdwire.split_replies(replies_for(session()).block_status(1, 0, 1, extents, done=True))


def test_offset_plus_length_wraps_around() -> None:
    for command in (nbdwire.READ, nbdwire.WRITE, nbdwire.TRIM, nbdwire.BLOCK_STATUS):
        assert check_request(command, 0, 2**64 - 512, 1024, SIZE, False, session()) != 0


def test_zeroes_silently_cut_to_64_mib() -> None:
    size = 8 << 30
    for command in (nbdwire.WRITE_ZEROES, nbdwire.TRIM):
        assert check_request(command, 0, 0, 2**32 - 1, size, False, session()) == 0
        (one,) = parse(nbdwire.request(command, 0, 2**32 - 1))
        assert one[4] == 2**32 - 1


@pytest.mark.parametrize("length", [512, MAX_PAYLOAD + 1])
def test_a_writes_payload_left_in_the_stream_after_an_error(length: int) -> None:
    """A request that will be refused (bad flags, read-only, past the end, too long) is parsed with its payload."""
    bad = nbdwire.request(nbdwire.WRITE, 2**60, flags=0xFFC0, cookie=1, payload=b"\x25\x60\x95\x13" * (length // 4 + 1))
    out = parse(bad + nbdwire.request(nbdwire.READ, 0, 512, cookie=2))
    assert [one[2] for one in out] == [1, 2]


def test_a_whole_connection_dropped_for_one_write_error() -> None:
    """Every error short of a lost stream is a reply, never an exception."""
    for command in range(300):
        for flags in (0, 0x3F, 0xFFFF):
            for offset in (0, SIZE, 2**64 - 1):
                assert check_request(command, flags, offset, 512, SIZE, False, session()) in (0, 1, 22, 28)


def test_cookies_are_deduplicated_or_interpreted() -> None:
    for cookie in (0, 1, 2**63, 2**64 - 1):
        data = nbdwire.request(nbdwire.READ, 0, 512, cookie=cookie) * 3
        assert [one[2] for one in parse(data)] == [cookie] * 3
        (message,) = nbdwire.split_replies(replies_for(session(structured=False)).success(cookie, 0))
        assert message.cookie == cookie


def test_the_client_must_ask_for_block_sizes() -> None:
    """The Linux client never does."""
    assert nbdwire.read_infos(Pair().ask(go("vol"))).block_size is None
