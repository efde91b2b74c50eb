"""The handshake, row by row of the protocol's table of options."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from nbdsnap.errors import InUseError, NotFoundError, OriginError, ProtocolError
from nbdsnap.nbd.negotiation import ExportInfo, NegotiationLimits, OptionRefusedError, State
from tests.support import nbdwire
from tests.support.nbdpair import SIZE, Exports, Pair
from tests.support.nbdwire import OptionReply, go, info, option

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)


# Hello and client flags


def test_hello_is_newstyle_with_fixed_newstyle_and_no_zeroes() -> None:
    server = Pair(flags=None).server
    assert server.state is State.CLIENT_FLAGS
    assert bytes.fromhex("4e42444d41474943 49484156454f5054 0003") == nbdwire.HELLO


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_known_client_flags_are_accepted(flags: int) -> None:
    assert Pair(flags=flags).in_step


@pytest.mark.parametrize("flags", [4, 7, 1 << 16, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_drop_the_connection(flags: int) -> None:
    pair = Pair(flags=None)
    with pytest.raises(ProtocolError, match="unknown client flags"):
        pair.server.receive(nbdwire.client_flags(flags))
    assert pair.server.state is State.CLOSED and "client flags" in pair.server.close_reason


# Options in general


def test_wrong_option_magic_drops_the_connection_at_its_eighth_byte() -> None:
    pair = Pair()
    pair.server.receive(b"IHAVEOP")
    with pytest.raises(ProtocolError, match="magic"):
        pair.server.receive(b"X")


def test_replies_that_precede_a_violation_can_still_be_sent() -> None:
    pair = Pair()
    with pytest.raises(ProtocolError):
        pair.server.receive(option(99) + b"GET / HTTP/1.1\r\n")
    assert nbdwire.split_option_replies(pair.read())[0].type == nbdwire.UNSUP


@pytest.mark.parametrize("number", [0, 4, 12, 99, 0xFFFFFFFF])
def test_unknown_option_is_unsup_with_a_text(number: int) -> None:
    pair = Pair()
    reply = pair.ask_one(option(number, b"whatever"))
    assert (reply.option, reply.type) == (number, nbdwire.UNSUP)
    assert str(number) in reply.data.decode()
    assert pair.in_step


def test_unknown_option_of_many_megabytes_is_skipped_not_stored() -> None:
    pair = Pair()
    pair.send(b"IHAVEOPT" + struct.pack(">II", 99, 100 << 20))
    for _ in range(100):
        assert pair.send(bytes(1 << 20)[:-1]) == b""
        assert pair.server.buffered == 0
    assert pair.ask_one(bytes(100)).type == nbdwire.UNSUP
    assert pair.in_step


def test_data_of_a_known_option_beyond_the_limit_is_too_big_and_in_step() -> None:
    pair = Pair(limits=NegotiationLimits(option_length=1000))
    assert pair.ask_one(option(nbdwire.GO, bytes(1001))).type == nbdwire.TOO_BIG
    assert pair.in_step


def test_a_client_in_a_loop_is_dropped_at_the_limit_of_options() -> None:
    pair = Pair(limits=NegotiationLimits(options=100))
    pair.send(option(99) * 100)
    with pytest.raises(ProtocolError, match="100 options"):
        pair.send(option(99))


def test_pipelined_options_wait_while_replies_are_unsent() -> None:
    exports = Exports(exports=[ExportInfo(f"volume{n}", SIZE, "x" * 100) for n in range(100)])
    pair = Pair(exports, limits=NegotiationLimits(output=10_000))
    one = len(pair.send(option(nbdwire.LIST)))
    pipelined = option(nbdwire.LIST) * 1000
    pair.server.receive(pipelined)
    assert pair.server.buffered <= len(pipelined) + 10_000 + one
    assert len(pair.read()) == 1000 * one
    assert pair.in_step


def test_a_violation_behind_waiting_options_is_raised_once_they_are_sent() -> None:
    pair = Pair(limits=NegotiationLimits(output=1))
    pair.server.receive(option(99) + option(98) + b"garbage!")
    assert len(nbdwire.split_option_replies(pair.server.data_to_send())) == 1
    assert len(nbdwire.split_option_replies(pair.server.data_to_send())) == 1
    with pytest.raises(ProtocolError):
        pair.server.data_to_send()


def test_after_the_end_more_data_is_ignored() -> None:
    pair = Pair()
    pair.send(option(nbdwire.ABORT) + b"garbage")
    assert pair.send(b"more garbage") == b"" and pair.server.state is State.CLOSED


# 1 EXPORT_NAME


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (2, 0), (1, 124), (0, 124)])
def test_export_name_answers_size_flags_and_zeroes_unless_no_zeroes(flags: int, padding: int) -> None:
    pair = Pair(flags=flags)
    answer = pair.send(option(nbdwire.EXPORT_NAME, b"vol"))
    assert answer == struct.pack(">QH", SIZE, 0b1101_0110_1101) + bytes(padding)
    assert pair.server.state is State.TRANSMISSION
    assert pair.server.session is not None and pair.server.session.handle == "handle of vol"
    assert pair.server.session.no_zeroes == (padding == 0)


@pytest.mark.parametrize("name", [b"other", b"v\0l", b"\xff", b"x" * 4096, b"x" * 4097])
def test_export_name_of_no_export_closes_without_an_answer(name: bytes) -> None:
    pair = Pair()
    assert pair.send(option(nbdwire.EXPORT_NAME, name)) == b""
    assert pair.server.state is State.CLOSED and pair.server.close_reason


def test_export_name_without_a_name_is_the_default_export() -> None:
    pair = Pair()
    assert len(pair.send(option(nbdwire.EXPORT_NAME))) == 10


def test_export_name_that_can_not_be_opened_closes() -> None:
    exports = Exports()
    exports.failure = OriginError("the origin is gone")
    pair = Pair(exports)
    assert pair.send(option(nbdwire.EXPORT_NAME, b"vol")) == b""
    assert pair.server.state is State.CLOSED and pair.server.close_reason == "the origin is gone"


def test_export_name_after_extended_headers_closes() -> None:
    pair = Pair()
    pair.ask(option(nbdwire.EXTENDED_HEADERS))
    assert pair.send(option(nbdwire.EXPORT_NAME, b"vol")) == b""
    assert pair.server.state is State.CLOSED and pair.exports.opened == []


# 2 ABORT


@pytest.mark.parametrize("data", [b"", b"why not", bytes(1 << 20)])
def test_abort_is_acknowledged_whatever_its_data(data: bytes) -> None:
    pair = Pair()
    assert pair.ask_one(option(nbdwire.ABORT, data)) == OptionReply(nbdwire.ABORT, nbdwire.ACK, b"")
    assert pair.server.state is State.CLOSED


# 3 LIST


def test_list_names_every_export_and_ends_with_ack() -> None:
    *exports, last = Pair().ask(option(nbdwire.LIST))
    assert [reply.type for reply in exports] == [nbdwire.SERVER] * 2
    assert [reply.data for reply in exports] == [
        nbdwire.string("vol") + b"a volume",
        nbdwire.string("vol@monday") + b"a snapshot",
    ]
    assert last == OptionReply(nbdwire.LIST, nbdwire.ACK, b"")


def test_list_with_data_is_invalid() -> None:
    pair = Pair()
    assert pair.ask_one(option(nbdwire.LIST, b"x")).type == nbdwire.INVALID
    assert pair.in_step


def test_list_that_the_source_refuses_is_an_error_alone() -> None:
    class Secretive(Exports):
        def list(self) -> list[ExportInfo]:
            raise OptionRefusedError("listing is not allowed")

    assert Pair(Secretive()).ask_one(option(nbdwire.LIST)).type == nbdwire.POLICY


# 6 INFO, 7 GO


def test_go_without_information_requests_gets_info_export_alone() -> None:
    pair = Pair()
    replies = pair.ask(go("vol"))
    assert [reply.type for reply in replies] == [nbdwire.INFO_REPLY, nbdwire.ACK]
    assert len(replies[0].data) == 12
    assert nbdwire.read_infos(replies) == nbdwire.Infos(SIZE, 0b1101_0110_1101)
    assert pair.server.state is State.TRANSMISSION and pair.exports.opened == ["vol"]


def test_go_never_pads_with_zeroes() -> None:
    assert len(Pair(flags=0).send(go("vol"))) == 20 + 12 + 20


def test_go_answers_all_that_was_asked_for_and_ignores_the_unknown() -> None:
    infos = nbdwire.read_infos(Pair().ask(go("", [INFO_BLOCK_SIZE, INFO_NAME, 999, INFO_DESCRIPTION, 0xFFFF])))
    assert (infos.name, infos.description) == ("vol", "a volume")
    assert infos.block_size == (1, 4096, 64 << 20)


def test_an_information_type_asked_for_twice_is_answered_once() -> None:
    nbdwire.read_infos(Pair().ask(go("vol", [INFO_BLOCK_SIZE, INFO_BLOCK_SIZE, INFO_EXPORT])))


def test_go_with_all_65535_information_requests_is_served() -> None:
    infos = nbdwire.read_infos(Pair().ask(go("vol", range(65535))))
    assert infos.block_size is not None


def test_equal_info_and_go_give_equal_answers() -> None:
    for structured in (False, True):
        pair = Pair()
        if structured:
            pair.ask(option(nbdwire.STRUCTURED_REPLY))
        asked = pair.ask(info("vol@monday", [1, 2, 3]))
        assert pair.server.state is State.OPTIONS and pair.exports.opened == []
        assert [(r.type, r.data) for r in asked] == [(r.type, r.data) for r in pair.ask(go("vol@monday", [1, 2, 3]))]


@pytest.mark.parametrize("number", [nbdwire.INFO, nbdwire.GO])
def test_info_and_go_of_no_export_are_unknown_without_information(number: int) -> None:
    pair = Pair()
    reply = pair.ask_one(info("other", [1, 2, 3], number))
    assert reply.type == nbdwire.UNKNOWN and b"other" in reply.data
    assert pair.server.state is State.OPTIONS and pair.exports.opened == [] and pair.in_step


@pytest.mark.parametrize(
    ("failure", "reply_type"),
    [
        (NotFoundError("gone"), nbdwire.UNKNOWN),
        (OriginError("gone"), nbdwire.UNKNOWN),
        (InUseError("being deleted"), nbdwire.POLICY),
        (OptionRefusedError("not for you"), nbdwire.POLICY),
        (OptionRefusedError("TLS, please", nbdwire.TLS_REQD), nbdwire.TLS_REQD),
    ],
)
def test_go_that_can_not_open_says_why_and_haggling_goes_on(failure: Exception, reply_type: int) -> None:
    exports = Exports()
    exports.failure = failure  # type: ignore[assignment]
    pair = Pair(exports)
    assert pair.ask_one(go("vol")) == OptionReply(nbdwire.GO, reply_type, str(failure).encode())
    exports.failure = None
    assert nbdwire.read_infos(pair.ask(go("vol"))).size == SIZE


def test_an_export_that_vanishes_between_find_and_open_is_unknown() -> None:
    class Vanishing(Exports):
        def open(self, name: str, contexts: Sequence[str]) -> str | None:
            return None

    assert Pair(Vanishing()).ask_one(go("vol")).type == nbdwire.UNKNOWN


MALFORMED_INFO = {
    "nothing": b"",
    "half a length": b"\0\0",
    "no room for the count": struct.pack(">I", 3) + b"vol",
    "name beyond the end": struct.pack(">I", 0xFFFFFFFF) + b"vol\0\0",
    "name longer than length - 6": struct.pack(">I", 5) + b"vol\0\0",
    "count beyond the end": nbdwire.string("vol") + b"\0\2\0\0",
    "a trailing byte": nbdwire.string("vol") + b"\0\0\0",
    "half a request": nbdwire.string("vol") + b"\0\1\0",
    "NUL in the name": nbdwire.string("v\0l") + b"\0\0",
    "not UTF-8": nbdwire.string(b"\xff\xfe") + b"\0\0",
    "a name of 4097 bytes": nbdwire.string("v" * 4097) + b"\0\0",
}


@pytest.mark.parametrize("number", [nbdwire.INFO, nbdwire.GO])
@pytest.mark.parametrize("case", MALFORMED_INFO)
def test_malformed_info_and_go_are_invalid_with_a_text(number: int, case: str) -> None:
    pair = Pair()
    reply = pair.ask_one(option(number, MALFORMED_INFO[case]))
    assert reply.type == nbdwire.INVALID and reply.data.decode()
    assert pair.in_step


def test_what_follows_go_is_left_over_for_transmission() -> None:
    pair = Pair()
    request = nbdwire.request(nbdwire.READ, 0, 4096)
    pair.send(go("vol") + request[:5])
    pair.server.receive(request[5:])
    assert pair.server.leftover() == request
    assert pair.server.leftover() == b""


# 8 STRUCTURED_REPLY, 11 EXTENDED_HEADERS


@pytest.mark.parametrize(
    ("options", "structured", "extended"),
    [((), False, False), ((8,), True, False), ((11,), True, True), ((8, 11), True, True), ((8, 8), True, False)],
)
def test_structured_replies_and_extended_headers(options: tuple[int, ...], structured: bool, extended: bool) -> None:
    pair = Pair()
    for number in options:
        assert pair.ask_one(option(number)) == OptionReply(number, nbdwire.ACK, b"")
    flags = nbdwire.read_infos(pair.ask(go("vol"))).flags
    session = pair.server.session
    assert session is not None
    assert (session.structured, session.extended) == (structured, extended)
    assert bool(flags & 1 << 7) == structured, "SEND_DF goes with structured replies"
    assert not flags & 1 << 12, "BLOCK_STATUS_PAYLOAD needs contexts"
    assert session.transmission_flags == flags


@pytest.mark.parametrize("number", [nbdwire.STRUCTURED_REPLY, nbdwire.EXTENDED_HEADERS])
def test_with_data_they_are_invalid_and_stay_off(number: int) -> None:
    pair = Pair()
    assert pair.ask_one(option(number, b"x")).type == nbdwire.INVALID
    pair.ask(go("vol"))
    assert pair.server.session is not None and not pair.server.session.structured


def test_structured_reply_after_extended_headers_is_ext_header_reqd() -> None:
    pair = Pair()
    pair.ask(option(nbdwire.EXTENDED_HEADERS))
    assert pair.ask_one(option(nbdwire.STRUCTURED_REPLY)).type == nbdwire.EXT_HEADER_REQD
    pair.ask(go("vol"))
    assert pair.server.session is not None and pair.server.session.extended


# Transmission flags


def test_transmission_flags_of_a_volume_and_of_a_snapshot() -> None:
    volume = nbdwire.read_infos(Pair().ask(go("vol"))).flags
    snapshot = nbdwire.read_infos(Pair().ask(go("vol@monday"))).flags
    has_flags, read_only, flush, fua, rotational, trim, zeroes, df, multi, resize, cache, fast = (
        1 << n for n in range(12)
    )
    assert volume == has_flags | flush | fua | trim | zeroes | multi | cache | fast
    assert snapshot == has_flags | read_only | flush | fua | multi | cache
    assert not (volume | snapshot) & (rotational | df | resize)


def test_rotational_is_advertised_where_it_is_true() -> None:
    exports = Exports(exports=[ExportInfo("vol", SIZE, rotational=True)])
    assert nbdwire.read_infos(Pair(exports).ask(go("vol"))).flags & 1 << 4


# Shutdown


def test_after_shutdown_options_get_shutdown_and_abort_still_ack() -> None:
    pair = Pair()
    pair.server.shutdown()
    for number in (nbdwire.LIST, nbdwire.GO, nbdwire.STRUCTURED_REPLY, nbdwire.STARTTLS, 99):
        assert pair.ask_one(option(number)).type == nbdwire.SHUTDOWN
    assert pair.ask_one(option(nbdwire.ABORT)).type == nbdwire.ACK


def test_after_shutdown_export_name_closes() -> None:
    pair = Pair()
    pair.server.shutdown()
    assert pair.send(option(nbdwire.EXPORT_NAME, b"vol")) == b""
    assert pair.server.state is State.CLOSED and "shutting down" in pair.server.close_reason
