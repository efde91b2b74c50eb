"""Option 5 STARTTLS, and the modes off, optional and required (proto.md: NOTLS, SELECTIVETLS, FORCEDTLS)."""

from __future__ import annotations

import pytest

from nbdsnap.errors import ProtocolError
from nbdsnap.nbd.negotiation import State, TlsMode
from tests.support import nbdwire
from tests.support.nbdpair import Pair
from tests.support.nbdwire import contexts, go, info, option

STARTTLS = option(nbdwire.STARTTLS)
WITH_TLS = pytest.mark.parametrize("mode", [TlsMode.OPTIONAL, TlsMode.REQUIRED])


def test_off_starttls_is_policy_and_haggling_goes_on() -> None:
    pair = Pair()
    assert pair.ask_one(STARTTLS).type == nbdwire.POLICY
    assert pair.server.state is State.OPTIONS
    assert nbdwire.read_infos(pair.ask(go("vol")))


@pytest.mark.parametrize("mode", TlsMode)
def test_with_data_it_is_invalid(mode: TlsMode) -> None:
    pair = Pair(tls=mode)
    assert pair.ask_one(option(nbdwire.STARTTLS, b"x")).type == nbdwire.INVALID
    assert pair.server.state is State.OPTIONS


@WITH_TLS
def test_acknowledged_then_the_driver_upgrades(mode: TlsMode) -> None:
    pair = Pair(tls=mode)
    pair.start_tls()
    assert pair.server.state is State.OPTIONS
    assert nbdwire.read_infos(pair.ask(go("vol")))
    assert pair.server.session is not None and pair.server.session.tls


@WITH_TLS
def test_twice_is_invalid(mode: TlsMode) -> None:
    pair = Pair(tls=mode)
    pair.start_tls()
    assert pair.ask_one(STARTTLS).type == nbdwire.INVALID
    assert pair.server.state is State.OPTIONS


@WITH_TLS
def test_a_client_without_fixed_newstyle_gets_no_tls(mode: TlsMode) -> None:
    assert Pair(tls=mode, flags=0).ask_one(STARTTLS).type == nbdwire.POLICY


@WITH_TLS
@pytest.mark.parametrize("cut", [0, 1, 20])
def test_plaintext_behind_starttls_is_never_parsed(mode: TlsMode, cut: int) -> None:
    pair = Pair(tls=mode)
    stream = STARTTLS + option(nbdwire.STRUCTURED_REPLY) + go("vol")
    with pytest.raises(ProtocolError, match="behind NBD_OPT_STARTTLS"):
        pair.server.receive(stream[: 16 + cut])
        pair.server.receive(stream[16 + cut :])
    assert pair.server.state is State.CLOSED and pair.exports.opened == []
    assert [reply.option for reply in nbdwire.split_option_replies(pair.read())] == [nbdwire.STARTTLS]


def test_state_is_forgotten_across_starttls() -> None:
    for number in (nbdwire.STRUCTURED_REPLY, nbdwire.EXTENDED_HEADERS):
        pair = Pair(tls=TlsMode.OPTIONAL)
        pair.ask(option(number) + contexts("vol", ["base:allocation"]))
        pair.start_tls()
        assert pair.ask_one(contexts("vol", ["base:allocation"])).type == nbdwire.INVALID
        pair.ask(go("vol"))
        session = pair.server.session
        assert session is not None
        assert (session.structured, session.extended, session.contexts) == (False, False, ())


def test_optional_serves_without_tls_too() -> None:
    pair = Pair(tls=TlsMode.OPTIONAL)
    assert nbdwire.read_infos(pair.ask(go("vol")))
    assert pair.server.session is not None and not pair.server.session.tls


def test_required_refuses_everything_after_consuming_its_data() -> None:
    pair = Pair(tls=TlsMode.REQUIRED)
    before = (
        option(nbdwire.LIST),
        option(nbdwire.LIST, b"with data"),
        info("vol"),
        go("vol", [3]),
        go("no such export"),
        option(nbdwire.GO, b"malformed"),
        option(nbdwire.GO, bytes(1 << 20)),
        option(nbdwire.STRUCTURED_REPLY),
        option(nbdwire.EXTENDED_HEADERS),
        contexts("vol"),
        option(99, bytes(100_000)),
    )
    for data in before:
        assert pair.ask_one(data).type == nbdwire.TLS_REQD
    assert pair.exports.opened == []
    pair.start_tls()
    assert nbdwire.read_infos(pair.ask(go("vol")))


def test_required_export_name_closes() -> None:
    pair = Pair(tls=TlsMode.REQUIRED)
    assert pair.send(option(nbdwire.EXPORT_NAME, b"vol")) == b""
    assert pair.server.state is State.CLOSED and pair.exports.opened == []


def test_required_abort_is_acknowledged() -> None:
    assert Pair(tls=TlsMode.REQUIRED).ask_one(option(nbdwire.ABORT)).type == nbdwire.ACK


def test_never_tls_reqd_once_tls_is_established() -> None:
    pair = Pair(tls=TlsMode.REQUIRED)
    pair.start_tls()
    replies = pair.ask(option(99) + option(nbdwire.LIST) + go("other") + go("vol"))
    assert nbdwire.TLS_REQD not in {reply.type for reply in replies}


def test_required_shutdown_before_tls_is_still_tls_reqd_and_starttls_is_shutdown() -> None:
    pair = Pair(tls=TlsMode.REQUIRED)
    pair.server.shutdown()
    assert pair.ask_one(option(nbdwire.LIST)).type == nbdwire.TLS_REQD
    assert pair.ask_one(STARTTLS).type == nbdwire.SHUTDOWN
