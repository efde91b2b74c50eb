"""Hypothesis against the protocol's parsers: streams valid, damaged and random; whole, bytewise and split at random.

The examples are the same at every run.  ``NBDSNAP_FUZZ_EXAMPLES=100000 pytest tests/fuzz`` tries that many new ones;
Hypothesis prints how to repeat a failure.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbdsnap.nbd.negotiation import TlsMode
from nbdsnap.nbd.replies import MAX_HOLE, status_extents
from nbdsnap.nbd.session import ExportInfo, Session
from nbdsnap.nbd.transmission import NO_PAYLOAD, RequestParser, check_request, status_query
from tests.fuzz import targets
from tests.support import nbdwire
from tests.support.nbdpair import CONTEXTS, Stream

_EXAMPLES = os.environ.get("NBDSNAP_FUZZ_EXAMPLES")
fuzz = settings(max_examples=int(_EXAMPLES or 200), derandomize=_EXAMPLES is None, deadline=None, database=None)

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
cuts = st.lists(st.integers(0, 3000), max_size=8)
names = st.sampled_from(["vol", "", "vol@monday", "other", "v\0l", "x" * 4097]) | st.text(max_size=8)
queries = st.lists(
    st.sampled_from([*CONTEXTS, "base:", "qemu:", "x:y", "nocolon", ""]) | st.text(max_size=5), max_size=5
)

options = st.one_of(
    st.builds(nbdwire.option, st.integers(0, 13) | U32, st.binary(max_size=40)),
    st.sampled_from([1, 2, 3, 5, 8, 8, 8, 11]).map(nbdwire.option),
    st.builds(nbdwire.option, st.just(99), st.just(bytes(2500))),
    st.builds(lambda name: nbdwire.option(1, name.encode()), names),
    st.builds(nbdwire.info, names, st.lists(U16, max_size=5), st.sampled_from([6, 7])),
    st.builds(nbdwire.contexts, names, queries, st.sampled_from([9, 10])),
    st.builds(lambda number, length: b"IHAVEOPT" + struct.pack(">II", number, length), st.integers(0, 13), U32),
)
handshakes = st.builds(
    lambda flags, parts, tail: nbdwire.client_flags(flags) + b"".join(parts) + tail,
    st.sampled_from([3, 3, 3, 0, 1, 2]) | U32,
    st.lists(options, max_size=8),
    st.binary(max_size=60),
)


@st.composite
def damaged(draw: st.DrawFn, streams: st.SearchStrategy[bytes]) -> bytes:
    """A stream with some bytes changed, cut out or put in."""
    data = bytearray(draw(streams))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@st.composite
def requests(draw: st.DrawFn, extended: bool) -> bytes:
    """Whole requests of all kinds, some with more payload than is allowed."""
    parts = []
    for _ in range(draw(st.integers(0, 8))):
        command = draw(st.sampled_from([0, 1, 1, 3, 4, 5, 6, 7]) | U16)
        flags = draw(st.sampled_from([0, 1, 32, 32]) | U16)
        payload = b""
        if (flags & 32) if extended else command == 1:
            payload = bytes(draw(st.integers(0, 100) | st.integers(targets.MAX_PAYLOAD - 1, targets.MAX_PAYLOAD + 1)))
        length = len(payload) or draw(U64 if extended else U32)
        if (flags & 32) if extended else command == 1:
            length = len(payload)
        parts.append(
            nbdwire.request(
                command, draw(U64), length, flags=flags, cookie=draw(U64), payload=payload, extended=extended
            )
        )
    return b"".join(parts) + draw(st.binary(max_size=3) | st.just(b""))


@fuzz
@given(damaged(handshakes), cuts, st.sampled_from(TlsMode))
@example(nbdwire.client_flags() + nbdwire.option(99) * 41, [], TlsMode.OFF)
@example(nbdwire.client_flags() + nbdwire.option(5) + nbdwire.go("vol"), [20], TlsMode.REQUIRED)
def test_a_handshake_parses_or_is_refused_however_it_is_split(data: bytes, cuts: list[int], tls: TlsMode) -> None:
    targets.negotiation(data, cuts, tls)


@fuzz
@given(st.binary(max_size=300), cuts)
def test_noise_is_no_handshake(data: bytes, cuts: list[int]) -> None:
    targets.negotiation(data, cuts)
    targets.negotiation(nbdwire.client_flags() + data, cuts)


@fuzz
@given(damaged(requests(False)), cuts)
def test_compact_requests_parse_or_are_refused_however_they_are_split(data: bytes, cuts: list[int]) -> None:
    targets.transmission(data, cuts)


@fuzz
@given(damaged(requests(True)), cuts)
def test_extended_requests_parse_or_are_refused_however_they_are_split(data: bytes, cuts: list[int]) -> None:
    targets.transmission(data, cuts, extended=True)


@fuzz
@given(st.binary(max_size=300), cuts, st.booleans())
def test_noise_is_no_request(data: bytes, cuts: list[int], extended: bool) -> None:
    targets.transmission(data, cuts, extended)


@fuzz
@given(st.binary(max_size=200) | st.builds(lambda one: one[16:], options))
def test_option_data_is_read_exactly_or_refused(data: bytes) -> None:
    targets.option_data(data)


@fuzz
@given(st.lists(st.tuples(U16, U16, U64, U64, st.binary(max_size=50)), max_size=10), st.booleans())
def test_requests_come_out_as_they_went_in(sent: list[tuple[int, int, int, int, bytes]], extended: bool) -> None:
    stream = Stream(RequestParser(extended))
    expected: list[tuple[int, int, int, int, int, bytes | None]] = []
    for command, flags, cookie, offset, payload in sent:
        if command == nbdwire.DISC:
            continue
        carries = bool(flags & 32) if extended else command == nbdwire.WRITE
        data = payload if carries else b""
        length = len(payload)
        stream.feed(
            nbdwire.request(command, offset, length, flags=flags, cookie=cookie, payload=data, extended=extended)
        )
        expected.append((command, flags, cookie, offset, length, payload if carries else None))
    assert not stream.buffer
    got = [(*request[:5], data) for request, data in zip(stream.requests, stream.payloads, strict=True)]
    assert got == expected
    for request in stream.requests:
        assert (request[5] == NO_PAYLOAD) == (not (request[1] & 32 if extended else request[0] == nbdwire.WRITE))


@fuzz
@given(U16, U16, U64, U64, st.integers(0, 2**63), st.booleans(), st.booleans(), st.booleans())
def test_what_is_accepted_lies_within_the_export(
    command: int, flags: int, offset: int, length: int, size: int, read_only: bool, structured: bool, extended: bool
) -> None:
    structured = structured or extended
    export = ExportInfo("vol", size, read_only=read_only)
    transmission_flags = export.transmission_flags(structured=structured, status_payload=extended)
    session = Session(None, export, transmission_flags, structured, extended, ((1, "base:allocation"),))
    error = check_request(command % 10, flags % 64, offset, length, size, read_only, session)
    assert error in (0, nbdwire.EPERM, nbdwire.EINVAL, nbdwire.ENOSPC, nbdwire.EOVERFLOW)
    if error == 0:
        assert offset + length <= size
        assert not (read_only and command % 10 in (nbdwire.WRITE, nbdwire.TRIM, nbdwire.WRITE_ZEROES))
    assert check_request(command, flags, offset, length, size, read_only, session) in range(109)


@fuzz
@given(st.binary(max_size=40), st.lists(st.integers(0, 5), max_size=4), U64)
def test_a_status_payload_selects_contexts_or_is_refused(noise: bytes, ids: list[int], length: int) -> None:
    contexts = tuple((number, f"x:{number}") for number in range(1, 5))
    session = Session(None, ExportInfo("vol", 1), 1 << 12, True, True, contexts)
    noisy = status_query(32, len(noise), noise, session)
    assert noisy is None or set(noisy[1]) <= set(contexts)
    good = bool(ids) and len(set(ids)) == len(ids) and set(ids) <= {1, 2, 3, 4}
    query = status_query(32, 8 + 4 * len(ids), struct.pack(f">Q{len(ids)}I", length, *ids), session)
    assert query == ((length, tuple((number, f"x:{number}") for number in ids)) if good else None)


extent_lists = st.lists(
    st.tuples(st.integers(1, 5) | st.integers(1, 2**34), st.integers(0, 3)), min_size=1, max_size=12
)


@fuzz
@given(extent_lists, st.integers(1, 40) | st.integers(1, 2**32 - 1), st.booleans(), st.booleans())
def test_status_extents_say_nothing_wrong(
    extents: list[tuple[int, int]], length: int, req_one: bool, extended: bool
) -> None:
    """Against the plain definition: the flags at each position are those of the device's extents."""
    found = status_extents(extents, length, req_one=req_one, extended=extended)
    assert found and all(size > 0 for size, _ in found)
    assert all(a[1] != b[1] for a, b in pairwise(found)), "neighbours are merged"
    assert sum(size for size, _ in found[:-1]) < length, "only the last passes the end"
    if req_one:
        assert len(found) == 1 and found[0][0] <= length
    if not extended:
        assert all(size <= MAX_HOLE for size, _ in found)

    def boundaries(pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        position, result = 0, []
        for size, flags in pairs:
            result.append((position, position + size, flags))
            position += size
        return result

    truth = boundaries(extents)
    for start, end, flags in boundaries(found):
        covering = [one for one in truth if one[0] < end and one[1] > start]
        assert {one[2] for one in covering} == {flags}
        assert covering[-1][1] >= end, "nothing is said of what is not known"
