"""Replies, as a client of each dialect reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from nbdsnap.nbd.replies import MAX_HOLE, ExtendedReplies, Replies, encode_text, replies_for, status_extents
from nbdsnap.nbd.session import ExportInfo, Session
from tests.support import nbdwire
from tests.support.nbdwire import Message, split_replies

COOKIE = 2**64 - 2
AT = 2**40
EIO = nbdwire.EIO


def dialect(kind: str) -> Replies:
    return replies_for(Session(None, ExportInfo("vol", 1), 1, kind != "simple", kind == "extended"))


def one(data: bytes) -> Message:
    (message,) = split_replies(data)
    return message


ALL = pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
CHUNKS = pytest.mark.parametrize("kind", ["structured", "extended"])


@ALL
def test_success_echoes_the_cookie(kind: str) -> None:
    message = one(dialect(kind).success(COOKIE, AT))
    assert (message.cookie, message.error, message.done) == (COOKIE, 0, True)
    assert message.kind == ("extended" if kind == "extended" else "simple")


@ALL
def test_error_has_its_value_and_in_chunks_its_text(kind: str) -> None:
    message = one(dialect(kind).error(COOKIE, AT, EIO, "the disk is gone"))
    assert (message.kind, message.cookie, message.error, message.done) == (kind, COOKIE, EIO, True)
    assert message.text == ("" if kind == "simple" else "the disk is gone")


@CHUNKS
def test_error_with_an_offset(kind: str) -> None:
    message = one(dialect(kind).error(COOKIE, AT, EIO, "here", AT + 512))
    assert (message.type, message.error, message.text, message.offset) == (nbdwire.ERROR_OFFSET, EIO, "here", AT + 512)


@CHUNKS
def test_error_text_is_cut_to_4096_bytes_between_characters(kind: str) -> None:
    message = one(dialect(kind).error(COOKIE, AT, EIO, "ü" * 3000))
    assert message.text == "ü" * 2048
    assert len(encode_text("x" + "ü" * 3000)) == 4095


def test_error_text_has_no_nul_and_is_utf8_whatever_it_was() -> None:
    assert encode_text("a\0b\udc80") == b"ab?"


@ALL
def test_read_data(kind: str) -> None:
    replies = dialect(kind)
    message = one_read(replies.read_data(COOKIE, AT, AT, 3) + b"abc")
    assert (message.kind, message.cookie, message.data, message.done) == (kind, COOKIE, b"abc", True)
    assert message.offset == (None if kind == "simple" else AT)


def one_read(data: bytes) -> Message:
    (message,) = split_replies(data, {COOKIE: 3})
    return message


@CHUNKS
def test_read_in_chunks_with_a_hole_and_an_end(kind: str) -> None:
    replies = dialect(kind)
    messages = split_replies(
        replies.read_data(COOKIE, AT, AT, 2, done=False)
        + b"ab"
        + replies.read_hole(COOKIE, AT, AT + 2, MAX_HOLE, done=False)
        + replies.read_done(COOKIE, AT)
    )
    assert [(m.type, m.offset, m.length, m.done) for m in messages] == [
        (nbdwire.OFFSET_DATA, AT, 0, False),
        (nbdwire.OFFSET_HOLE, AT + 2, MAX_HOLE, False),
        (nbdwire.NONE, None, 0, True),
    ]


@CHUNKS
def test_a_hole_may_end_a_read(kind: str) -> None:
    assert one(dialect(kind).read_hole(COOKIE, AT, AT, 512)).done


@ALL
def test_read_of_length_0_is_never_a_simple_reply_among_structured_ones(kind: str) -> None:
    assert one(dialect(kind).read_done(COOKIE, AT)).kind == kind


@CHUNKS
def test_block_status(kind: str) -> None:
    extents = [(4096, 0), (8192, 3), (512, 2)]
    message = one(dialect(kind).block_status(COOKIE, AT, 7, extents, done=False))
    assert (message.type, message.done) == (nbdwire.STATUS_EXT if kind == "extended" else nbdwire.STATUS, False)
    assert (message.context_id, list(message.extents)) == (7, extents)


def test_extended_block_status_carries_64_bits() -> None:
    message = one(ExtendedReplies().block_status(COOKIE, AT, 1, [(2**63, 2**32), (1, 0)], done=True))
    assert message.extents == ((2**63, 2**32), (1, 0))


def test_every_extended_chunk_carries_the_requests_offset() -> None:
    replies = dialect("extended")
    stream = (
        replies.success(COOKIE, AT)
        + replies.error(COOKIE, AT, EIO, "x", AT + 1)
        + replies.read_data(COOKIE, AT, AT + 5, 1)
        + b"x"
        + replies.read_hole(COOKIE, AT, AT + 5, 1)
        + replies.read_done(COOKIE, AT)
        + replies.block_status(COOKIE, AT, 1, [(1, 0)], done=True)
    )
    messages = split_replies(stream)
    assert len(messages) == 6
    assert {(message.kind, message.at) for message in messages} == {("extended", AT)}


# What a block status says


def test_equal_neighbours_are_merged() -> None:
    assert status_extents([(1, 0), (2, 0), (3, 1), (4, 1), (5, 0)], 15) == [(3, 0), (7, 1), (5, 0)]


def test_only_the_last_extent_passes_the_requests_end() -> None:
    assert status_extents([(100, 0), (100, 1), (100, 0)], 150) == [(100, 0), (100, 1)]
    assert status_extents([(100, 0), (100, 1)], 100) == [(100, 0)]


def test_req_one_gives_one_extent_within_the_request() -> None:
    assert status_extents([(100, 0), (100, 1)], 150, req_one=True) == [(100, 0)]
    assert status_extents([(100, 0), (100, 0)], 150, req_one=True) == [(150, 0)]
    assert status_extents([(1 << 40, 3)], 150, req_one=True) == [(150, 3)]


def test_at_most_a_million_extents() -> None:
    def endless() -> Iterator[tuple[int, int]]:
        while True:
            yield from ((512, 0), (512, 1))

    found = status_extents(endless(), 1 << 62)
    assert len(found) == 1 << 20
    assert len(dialect("structured").block_status(1, 0, 1, found, done=True)) == 20 + 4 + 8 * (1 << 20)


def test_no_more_extents_are_asked_for_than_needed() -> None:
    asked = iter([(100, 0), (100, 1), (100, 0)])
    status_extents(asked, 100)
    assert list(asked) == [(100, 1), (100, 0)]


@pytest.mark.parametrize("length", [2**32 - 1, 2**32, 2**33 + 1, 2**62])
def test_lengths_beyond_32_bits_are_cut_and_not_wrapped(length: int) -> None:
    assert status_extents([(length, 1), (512, 0)], 2**32 - 1) == [(MAX_HOLE, 1)]
    assert status_extents([(512, 0), (length, 1), (512, 0)], 2**32 - 1) == [(512, 0), (MAX_HOLE, 1)]
    halves = [(length // 2, 1), (length - length // 2, 1)]
    assert status_extents(halves, 2**32 - 1)[0][0] <= 2**32 - 1


def test_extended_headers_keep_64_bits() -> None:
    assert status_extents([(2**40, 1), (2**50, 0)], 2**60, extended=True) == [(2**40, 1), (2**50, 0)]


def test_the_wire_form_refuses_what_does_not_fit() -> None:
    with pytest.raises((struct.error, AssertionError)):
        dialect("structured").block_status(1, 0, 1, [(2**32, 0)], done=True)
