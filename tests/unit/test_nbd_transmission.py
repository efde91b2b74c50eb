"""Requests: found in a buffer, checked, refused with the right error."""

from __future__ import annotations

import struct

import pytest

from nbdsnap.errors import ProtocolError
from nbdsnap.nbd.session import ExportInfo, Session
from nbdsnap.nbd.transmission import (
    DROPPED,
    MAX_DROPPED_PAYLOAD,
    MAX_STATUS_PAYLOAD,
    NO_PAYLOAD,
    Request,
    RequestParser,
    check_request,
    status_query,
)
from tests.support.nbdpair import Stream
from tests.support.nbdwire import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    request,
)

SIZE = 1 << 20
MIB = 1 << 20
BOTH = pytest.mark.parametrize("extended", [False, True], ids=["compact", "extended"])


def parse(parser: RequestParser, data: bytes) -> tuple[list[Request], int]:
    out: list[Request] = []
    return out, parser.parse(data, 0, len(data), out)


def write(payload: bytes, *, offset: int = 0, cookie: int = 1, flags: int = 0, extended: bool = False) -> bytes:
    flags |= PAYLOAD_LEN if extended else 0
    return request(WRITE, offset, flags=flags, cookie=cookie, payload=payload, extended=extended)


# The parser


@BOTH
def test_every_complete_request_of_a_batch_is_found(extended: bool) -> None:
    reads = request(READ, 4096, 512, cookie=2**64 - 1, flags=FUA, extended=extended)
    data = reads + write(b"payload", offset=2**63, cookie=7, extended=extended) + reads + reads[:-1]
    out, position = parse(RequestParser(extended), data)
    read = (READ, FUA, 2**64 - 1, 4096, 512, NO_PAYLOAD)
    kind, _, cookie, offset, length, where = out[1]
    assert out == [read, out[1], read]
    assert (kind, cookie, offset, length, data[where : where + 7]) == (WRITE, 7, 2**63, 7, b"payload")
    assert position == len(data) - len(reads) + 1


@BOTH
def test_it_parses_within_the_given_bounds_alone(extended: bool) -> None:
    read = request(READ, 0, 512, extended=extended)
    out: list[Request] = []
    data = memoryview(bytearray(b"junk" + read + read + b"junk"))
    assert RequestParser(extended).parse(data, 4, 4 + len(read), out) == 4 + len(read)
    assert len(out) == 1


@BOTH
def test_needed_is_the_size_of_the_incomplete_request(extended: bool) -> None:
    header = 32 if extended else 28
    parser = RequestParser(extended)
    data = write(bytes(100_000), extended=extended)
    for length, needed in ((0, header), (3, header), (header - 1, header), (header, header + 100_000)):
        assert parse(parser, data[:length]) == ([], 0)
        assert parser.needed == needed
    out, position = parse(parser, data)
    assert (len(out), position, parser.needed) == (1, len(data), header)


@BOTH
def test_wrong_magic_is_an_error_as_soon_as_it_is_there_and_keeps_what_was_before(extended: bool) -> None:
    out: list[Request] = []
    data = request(READ, 0, 512, extended=extended) + b"GET "
    with pytest.raises(ProtocolError, match="magic"):
        RequestParser(extended).parse(data, 0, len(data), out)
    assert len(out) == 1


def test_the_other_headers_magic_is_wrong() -> None:
    for extended in (False, True):
        with pytest.raises(ProtocolError):
            parse(RequestParser(extended), request(READ, 0, 512, extended=not extended))


@BOTH
def test_nothing_behind_disc_is_parsed(extended: bool) -> None:
    parser = RequestParser(extended)
    data = request(DISC, extended=extended) + b"garbage garbage garbage garbage garbage"
    out, position = parse(parser, data)
    assert [one[0] for one in out] == [DISC] and position == len(data) and parser.disconnected
    assert parse(parser, b"more garbage") == ([], 12)


@BOTH
def test_write_of_no_bytes_is_complete_with_its_header(extended: bool) -> None:
    out, _ = parse(RequestParser(extended), write(b"", extended=extended))
    assert len(out) == 1 and out[0][4] == 0


@BOTH
def test_a_payload_of_the_maximum_is_kept(extended: bool) -> None:
    parser = RequestParser(extended, max_payload=1000)
    out, _ = parse(parser, write(bytes(1000), extended=extended))
    assert out[0][5] > 0


@pytest.mark.parametrize("step", [1, 100, 1000, 10_000])
def test_a_write_beyond_the_maximum_is_dropped_and_the_stream_stays_in_step(step: int) -> None:
    data = write(bytes(3000), cookie=5) + request(READ, 0, 512, cookie=6)
    stream = Stream(RequestParser(max_payload=1000))
    for start in range(0, len(data), step):
        stream.feed(data[start : start + step])
        assert len(stream.buffer) <= 28
    assert [(one[2], one[5]) for one in stream.requests] == [(5, DROPPED), (6, NO_PAYLOAD)]


def test_a_dropped_write_is_handed_out_when_its_last_byte_is_gone() -> None:
    parser = RequestParser(max_payload=1000)
    header, payload = write(bytes(1001))[:28], bytes(1001)
    assert parse(parser, header) == ([], 28)
    assert parse(parser, payload[:-1]) == ([], 1000)
    assert parse(parser, payload[-1:]) == ([(WRITE, 0, 1, 0, 1001, DROPPED)], 1)


def test_a_write_beyond_all_bounds_is_a_protocol_error() -> None:
    header = request(WRITE, 0, MAX_DROPPED_PAYLOAD + 1)
    with pytest.raises(ProtocolError, match="payload"):
        parse(RequestParser(), header)
    parser = RequestParser()
    assert parse(parser, request(WRITE, 0, MAX_DROPPED_PAYLOAD)) == ([], 28)


def test_extended_write_beyond_the_maximum_is_a_protocol_error() -> None:
    header = request(WRITE, 0, 64 * MIB + 1, flags=PAYLOAD_LEN, extended=True)
    with pytest.raises(ProtocolError, match="payload"):
        parse(RequestParser(True), header)
    huge = request(WRITE, 0, 2**64 - 1, flags=PAYLOAD_LEN, extended=True)
    with pytest.raises(ProtocolError, match="payload"):
        parse(RequestParser(True), huge)


def test_extended_write_without_payload_len_has_no_payload() -> None:
    out, _ = parse(RequestParser(True), request(WRITE, 0, 2**64 - 1, extended=True) * 2)
    assert [one[5] for one in out] == [NO_PAYLOAD] * 2


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 99, DISC])
def test_extended_payload_of_any_command_is_consumed(command: int) -> None:
    for size in (1, MAX_STATUS_PAYLOAD, MAX_STATUS_PAYLOAD + 1, 100_000):
        parser = RequestParser(True)
        flags = PAYLOAD_LEN
        data = request(command, payload=bytes(size), flags=flags, extended=True)
        out, position = parse(parser, data + request(READ, 0, 1, extended=True))
        assert out[0][0] == command
        assert (out[0][5] == DROPPED) == (size > MAX_STATUS_PAYLOAD)
        assert len(out) == (1 if command == DISC else 2)
        assert position == len(data) + 32


def test_thousands_of_dropped_payloads_in_one_buffer() -> None:
    one = request(READ, payload=bytes(MAX_STATUS_PAYLOAD + 1), flags=PAYLOAD_LEN, extended=True)
    out, _ = parse(RequestParser(True), one * 3000)
    assert len(out) == 3000


# Checks


def session(
    *, structured: bool = True, extended: bool = False, read_only: bool = False, contexts: bool = True
) -> Session[None]:
    structured = structured or extended
    selected = ((1, "base:allocation"), (2, "qemu:dirty-bitmap:a")) if contexts and structured else ()
    export = ExportInfo("vol", SIZE, read_only=read_only)
    flags = export.transmission_flags(structured=structured, status_payload=extended and bool(selected))
    return Session(None, export, flags, structured, extended, selected)


def check(command: int, offset: int = 0, length: int = 4096, flags: int = 0, **keys: bool) -> int:
    one = session(**keys)
    if one.extended and command == WRITE:
        flags |= PAYLOAD_LEN
    return check_request(command, flags, offset, length, SIZE, one.export.read_only, one)


COMMANDS = (READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS)
FLAGS = {"FUA": FUA, "NO_HOLE": NO_HOLE, "DF": DF, "REQ_ONE": REQ_ONE, "FAST_ZERO": FAST_ZERO}
APPLICABLE = {READ: DF, WRITE_ZEROES: NO_HOLE | FAST_ZERO, BLOCK_STATUS: REQ_ONE}


@BOTH
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", [1 << bit for bit in range(16)])
def test_applicable_flags_are_accepted_and_any_other_is_einval(command: int, flag: int, extended: bool) -> None:
    allowed = FUA | APPLICABLE.get(command, 0)
    if extended and command in (WRITE, BLOCK_STATUS):
        allowed |= PAYLOAD_LEN
    length = 0 if command == FLUSH else 4096
    assert check(command, 0, length, flag, extended=extended) == (0 if flag & allowed else EINVAL)


def test_df_is_einval_without_structured_replies() -> None:
    assert check(READ, flags=DF) == 0
    assert check(READ, flags=DF, structured=False) == EINVAL


def test_fast_zero_is_einval_where_it_is_not_advertised() -> None:
    assert check(WRITE_ZEROES, flags=FAST_ZERO, read_only=True) == EINVAL


def test_payload_len_is_einval_without_extended_headers() -> None:
    for command in COMMANDS:
        assert check(command, flags=PAYLOAD_LEN) == EINVAL


def test_extended_write_without_payload_len_is_einval() -> None:
    one = session(extended=True)
    assert check_request(WRITE, 0, 0, 4096, SIZE, False, one) == EINVAL
    assert check_request(WRITE, PAYLOAD_LEN, 0, 4096, SIZE, False, one) == 0


@pytest.mark.parametrize("command", [8, 9, 255, 0xFFFF])
def test_unknown_commands_are_einval(command: int) -> None:
    assert check(command) == EINVAL


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
def test_writing_to_a_read_only_export_is_eperm(command: int) -> None:
    assert check(command, read_only=True) == EPERM
    assert check(command, 0, 0, read_only=True) == EPERM
    assert check(command, SIZE, 4096, read_only=True) == EPERM


@pytest.mark.parametrize("command", [READ, CACHE, BLOCK_STATUS])
def test_reading_a_read_only_export_is_fine(command: int) -> None:
    assert check(command, read_only=True) == 0
    assert check(FLUSH, 0, 0, read_only=True) == 0


@BOTH
@pytest.mark.parametrize(
    ("command", "error"),
    [(READ, EINVAL), (TRIM, EINVAL), (BLOCK_STATUS, EINVAL), (CACHE, EINVAL), (WRITE, ENOSPC), (WRITE_ZEROES, ENOSPC)],
)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (2**64 - 1, 1), (2**64 - 4096, 4096), (2**63, 2**32 - 1), (SIZE + 1, 0)],
)
def test_past_the_end(command: int, error: int, offset: int, length: int, extended: bool) -> None:
    assert check(command, offset, length, extended=extended) == error


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (SIZE - 1, 1), (1, 1), (511, 513), (4095, 4098)])
def test_any_alignment_within_the_export_is_fine(command: int, offset: int, length: int) -> None:
    assert check(command, offset, length) == 0


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
def test_length_0_is_success(command: int) -> None:
    for offset in (0, 4096, SIZE):
        assert check(command, offset, 0) == 0


def test_block_status_of_length_0_is_success_where_an_extent_can_answer_it() -> None:
    for offset in (0, 4096, SIZE - 1):
        assert check(BLOCK_STATUS, offset, 0) == 0
        assert check(BLOCK_STATUS, offset, 0, REQ_ONE) == EINVAL
    assert check(BLOCK_STATUS, SIZE, 0) == EINVAL


def test_flush_with_an_offset_or_a_length_is_einval() -> None:
    assert check(FLUSH, 0, 0) == 0
    assert check(FLUSH, 0, 1) == EINVAL and check(FLUSH, 1, 0) == EINVAL


def test_block_status_without_contexts_is_einval() -> None:
    assert check(BLOCK_STATUS, contexts=False) == EINVAL
    assert check(BLOCK_STATUS, structured=False) == EINVAL


def big(command: int, length: int, **keys: bool) -> int:
    one = session(**keys)
    flags = PAYLOAD_LEN if one.extended and command == WRITE else 0
    return check_request(command, flags, 0, length, 2**62, False, one)


@BOTH
def test_64_mib_is_served_and_more_is_refused_where_there_is_a_payload(extended: bool) -> None:
    assert big(READ, 64 * MIB, extended=extended) == big(WRITE, 64 * MIB, extended=extended) == 0
    assert big(WRITE, 64 * MIB + 1, extended=extended) == EINVAL
    assert big(READ, 64 * MIB + 1, extended=extended) == EOVERFLOW


def test_too_long_a_read_is_einval_with_simple_replies() -> None:
    assert big(READ, 64 * MIB + 1, structured=False) == EINVAL


@pytest.mark.parametrize("command", [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
def test_without_a_payload_any_length_is_served(command: int) -> None:
    assert big(command, 2**32 - 1) == 0
    assert big(command, 2**62, extended=True) == 0


# The payload of BLOCK_STATUS


def ids(length: int, *contexts: int) -> bytes:
    return struct.pack(f">Q{len(contexts)}I", length, *contexts)


def test_status_query_without_a_payload_is_about_all_contexts() -> None:
    one = session(extended=True)
    assert status_query(REQ_ONE, 2**40, None, one) == (2**40, one.contexts)


def test_status_query_narrows_to_the_ids_of_its_payload() -> None:
    one = session(extended=True)
    payload = ids(2**40, 2)
    assert status_query(PAYLOAD_LEN, len(payload), payload, one) == (2**40, ((2, "qemu:dirty-bitmap:a"),))
    assert status_query(PAYLOAD_LEN, 16, memoryview(ids(1, 2, 1)), one) == (1, tuple(reversed(one.contexts)))


@pytest.mark.parametrize(
    "payload",
    [None, b"", ids(4096)[:-1], ids(4096), ids(4096, 3), ids(4096, 1, 1), ids(4096, 1)[:-1], ids(4096, 1) + b"x"],
    ids=["dropped", "empty", "short", "no ids", "unknown", "repeated", "cut", "trailing"],
)
def test_malformed_status_payloads_are_refused(payload: bytes | None) -> None:
    assert status_query(PAYLOAD_LEN, len(payload or b""), payload, session(extended=True)) is None


def test_status_payload_is_einval_where_it_is_not_advertised() -> None:
    assert check(BLOCK_STATUS, flags=PAYLOAD_LEN, extended=True, contexts=False) == EINVAL
    assert check(BLOCK_STATUS, flags=PAYLOAD_LEN, extended=True) == 0
