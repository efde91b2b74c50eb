"""Options 9 LIST_META_CONTEXT and 10 SET_META_CONTEXT."""

from __future__ import annotations

import struct

import pytest

from nbdsnap.nbd.negotiation import NegotiationLimits
from tests.support import nbdwire
from tests.support.nbdpair import CONTEXTS, Exports, Pair
from tests.support.nbdwire import contexts, go, option

LIST, SET = nbdwire.LIST_META_CONTEXT, nbdwire.SET_META_CONTEXT
BOTH = pytest.mark.parametrize("number", [LIST, SET])


def structured(exports: Exports | None = None, **keys: NegotiationLimits) -> Pair:
    pair = Pair(exports, **keys)  # type: ignore[arg-type]
    pair.ask(option(nbdwire.STRUCTURED_REPLY))
    return pair


def ask(pair: Pair, number: int, name: str, *queries: str | bytes) -> list[tuple[int, str]]:
    """The contexts of a reply that ends well."""
    *found, last = pair.ask(contexts(name, queries, number))
    assert last == nbdwire.OptionReply(number, nbdwire.ACK, b"")
    assert all(reply.type == nbdwire.META_CONTEXT for reply in found)
    return [(struct.unpack_from(">I", reply.data)[0], reply.data[4:].decode()) for reply in found]


def session_contexts(pair: Pair, name: str) -> list[str]:
    pair.ask(go(name))
    assert pair.server.session is not None
    return [context for _, context in pair.server.session.contexts]


def test_list_without_queries_gives_all_contexts_with_id_0() -> None:
    assert ask(structured(), LIST, "vol") == [(0, name) for name in CONTEXTS]


@pytest.mark.parametrize("queries", [(), ("base:allocation",)])
def test_a_context_that_the_source_names_twice_is_one_context(queries: tuple[str, ...]) -> None:
    pair = structured(Exports(contexts=["base:allocation"] * 2))
    assert len(ask(pair, LIST, "vol", *queries)) == 1
    assert len(ask(pair, SET, "vol", *queries)) == len(queries)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("base:", ["base:allocation"]),
        ("base:allocation", ["base:allocation"]),
        ("qemu:", ["qemu:dirty-bitmap:monday", "qemu:allocation-depth"]),
        ("qemu:dirty-bitmap:", ["qemu:dirty-bitmap:monday"]),
        ("x-nbdsnap:changed:", ["x-nbdsnap:changed:monday"]),
        ("qemu:dirty", []),
        ("base:other", []),
        (":", []),
        ("", []),
    ],
)
def test_list_wildcards(query: str, expected: list[str]) -> None:
    assert [name for _, name in ask(structured(), LIST, "vol", query)] == expected


def test_list_names_a_context_once_however_many_queries_match() -> None:
    assert len(ask(structured(), LIST, "vol", "base:", "base:allocation", "base:")) == 1


def test_set_without_queries_selects_nothing() -> None:
    pair = structured()
    assert ask(pair, SET, "vol") == []
    assert session_contexts(pair, "vol") == []


@pytest.mark.parametrize("query", ["base:", "qemu:", "qemu:dirty-bitmap:", "x-nbdsnap:changed:"])
def test_wildcards_select_nothing(query: str) -> None:
    pair = structured()
    assert ask(pair, SET, "vol", query) == []
    assert session_contexts(pair, "vol") == []


def test_set_gives_unique_ids_that_the_session_keeps() -> None:
    pair = structured()
    selected = ask(pair, SET, "vol", "x-nbdsnap:changed:monday", "base:allocation", "nope:nothing")
    assert sorted(name for _, name in selected) == ["base:allocation", "x-nbdsnap:changed:monday"]
    assert len({context_id for context_id, _ in selected}) == 2
    pair.ask(go("vol"))
    assert pair.server.session is not None and list(pair.server.session.contexts) == selected


@BOTH
def test_unknown_namespaces_are_ignored_with_a_bare_ack(number: int) -> None:
    assert ask(structured(), number, "vol", "nobody:knows", "x-other:", "no colon at all") == []


@BOTH
def test_unknown_export_is_unknown(number: int) -> None:
    pair = structured()
    assert pair.ask_one(contexts("other", ["base:allocation"], number)).type == nbdwire.UNKNOWN
    assert pair.in_step


@BOTH
def test_without_structured_replies_it_is_invalid(number: int) -> None:
    assert Pair().ask_one(contexts("vol", ["base:allocation"], number)).type == nbdwire.INVALID


@BOTH
def test_extended_headers_will_do_for_structured_replies(number: int) -> None:
    pair = Pair()
    pair.ask(option(nbdwire.EXTENDED_HEADERS))
    assert len(ask(pair, number, "vol", "base:allocation")) == 1


MALFORMED = {
    "nothing": b"",
    "no count": nbdwire.string("vol"),
    "name beyond the end": struct.pack(">I", 100) + b"vol" + struct.pack(">I", 0),
    "a count of four thousand million": nbdwire.string("vol") + struct.pack(">I", 0xFFFFFFFF),
    "query beyond the end": nbdwire.string("vol") + struct.pack(">II", 1, 100) + b"base:",
    "a query missing": nbdwire.string("vol") + struct.pack(">I", 2) + nbdwire.string("base:"),
    "a trailing byte": nbdwire.string("vol") + struct.pack(">I", 1) + nbdwire.string("base:") + b"x",
    "NUL in a query": nbdwire.string("vol") + struct.pack(">I", 1) + nbdwire.string("base:\0"),
    "a query that is not UTF-8": nbdwire.string("vol") + struct.pack(">I", 1) + nbdwire.string(b"base:\xff"),
    "a query of 4097 bytes": nbdwire.string("vol") + struct.pack(">I", 1) + nbdwire.string("x" * 4097),
}


@BOTH
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_invalid(number: int, case: str) -> None:
    pair = structured()
    assert pair.ask_one(option(number, MALFORMED[case])).type == nbdwire.INVALID
    assert pair.in_step


def test_set_replaces_the_former_set() -> None:
    pair = structured()
    ask(pair, SET, "vol", "base:allocation")
    ask(pair, SET, "vol", "x-nbdsnap:changed:monday")
    assert session_contexts(pair, "vol") == ["x-nbdsnap:changed:monday"]


@pytest.mark.parametrize(
    "failing",
    [contexts("other", ["base:allocation"]), option(SET, b"malformed"), contexts("vol")],
    ids=["unknown export", "malformed", "no queries"],
)
def test_set_replaces_the_former_set_even_when_it_fails(failing: bytes) -> None:
    pair = structured()
    ask(pair, SET, "vol", "base:allocation")
    pair.ask(failing)
    assert session_contexts(pair, "vol") == []


def test_list_leaves_the_selected_set_alone() -> None:
    pair = structured()
    ask(pair, SET, "vol", "base:allocation")
    ask(pair, LIST, "vol@monday")
    assert session_contexts(pair, "vol") == ["base:allocation"]


def test_contexts_apply_to_the_named_export_only() -> None:
    pair = structured()
    ask(pair, SET, "vol@monday", "base:allocation")
    assert session_contexts(pair, "vol") == []


def test_the_name_is_compared_as_the_client_wrote_it() -> None:
    pair = structured()
    ask(pair, SET, "", "base:allocation")
    assert session_contexts(pair, "") == ["base:allocation"]


def test_contexts_survive_an_info_of_another_export() -> None:
    pair = structured()
    ask(pair, SET, "vol", "base:allocation")
    pair.ask(nbdwire.info("vol@monday"))
    assert session_contexts(pair, "vol") == ["base:allocation"]


def test_selecting_too_many_contexts_is_too_big_and_selects_none() -> None:
    many = [f"x-nbdsnap:changed:{n}" for n in range(65)]
    pair = structured(Exports(contexts=many))
    assert pair.ask_one(contexts("vol", many)).type == nbdwire.TOO_BIG
    assert len(ask(pair, LIST, "vol")) == 65
    assert len(ask(pair, SET, "vol", *many[:64])) == 64
    assert len(session_contexts(pair, "vol")) == 64


def test_block_status_payload_is_advertised_with_extended_headers_and_contexts_alone() -> None:
    for number, query, advertised in ((8, "base:allocation", False), (11, "base:allocation", True), (11, "x:y", False)):
        pair = Pair()
        pair.ask(option(number))
        ask(pair, SET, "vol", query)
        assert bool(nbdwire.read_infos(pair.ask(go("vol"))).flags & 1 << 12) == advertised
