"""Hypothesis against the delta decoder: streams valid, damaged, forged (all checksums right) and random, split anyhow.

The invariant: a stream decodes to what was encoded, or raises one of nbdsnap's own errors; how it is split makes no
difference; memory is bounded.  ``NBDSNAP_FUZZ_EXAMPLES`` as in :mod:`tests.fuzz.test_nbd_parsers`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbdsnap.delta.choice import Chooser, Compression
from nbdsnap.delta.decoder import Decoder
from nbdsnap.delta.encoder import Encoder
from nbdsnap.delta.format import ENTRY, FRAME, MAX_BODY, Header
from nbdsnap.errors import NbdsnapError
from tests.support.deltas import apply, contents, encode, header, seal, split

_EXAMPLES = os.environ.get("NBDSNAP_FUZZ_EXAMPLES")
fuzz = settings(max_examples=int(_EXAMPLES or 200), derandomize=_EXAMPLES is None, deadline=None, database=None)

OLD, NEW = contents(3, chunks=12)
FRAMES = encode(NEW, OLD, checkpoint_every=4)
WHOLE = encode(NEW, checkpoint_every=4)
cuts = st.lists(st.integers(0, 60_000), max_size=8)


def outcome(stream: bytes, cuts: Sequence[int] = ()) -> object:
    """The content, or what it was refused with."""
    try:
        return apply(stream, OLD, cuts)
    except NbdsnapError as error:
        return type(error), str(error)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Some bytes changed, cut out or put in; or frames moved, left out and repeated."""
    frames = list(draw(st.sampled_from([FRAMES, WHOLE])))
    for _ in range(draw(st.integers(0, 2))):
        where = draw(st.integers(0, len(frames) - 1))
        frames[where:where] = draw(st.lists(st.sampled_from(frames), max_size=2))
        del frames[draw(st.integers(0, len(frames) - 1))]
    data = bytearray(b"".join(frames))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """Fields of headers, tables and data changed, and every checksum made right again."""
    frames = list(draw(st.sampled_from([FRAMES, WHOLE])))
    bodies = {}
    for number in draw(st.lists(st.integers(0, len(frames) - 2), max_size=2)):
        body = bytearray(frames[1 + number][FRAME.size :])
        for _ in range(draw(st.integers(1, 3))):
            limit = len(body) if draw(st.booleans()) else min(len(body), 4 + 3 * ENTRY.size)
            at = draw(st.integers(0, limit - 1))
            body[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8) | st.just(b"\xff" * 8))
        bodies[number] = bytes(body)
    return seal(frames, bodies)


@fuzz
@given(damaged(), cuts)
@example(b"".join(FRAMES), list(range(0, 60_000, 7)))
def test_a_damaged_stream_is_noticed_however_it_is_split(stream: bytes, cuts: list[int]) -> None:
    whole = outcome(stream)
    assert whole == outcome(stream, cuts)
    if isinstance(whole, bytes):
        assert whole == NEW


@fuzz
@given(forged())
def test_a_forged_stream_decodes_or_is_refused(stream: bytes) -> None:
    found = outcome(stream)
    assert isinstance(found, tuple | bytes)
    decoder = Decoder()
    try:
        for _ in decoder.feed(stream):
            assert len(decoder.wanted()) <= MAX_BODY
    except NbdsnapError:
        pass


@fuzz
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_no_stream(noise: bytes, after_prologue: bool) -> None:
    stream = FRAMES[0] + noise if after_prologue else noise
    assert isinstance(outcome(stream), tuple)
    assert outcome(stream) == outcome(stream, range(len(stream)))


@fuzz
@given(st.binary(min_size=120, max_size=200))
def test_any_bytes_are_a_header_or_refused(body: bytes) -> None:
    try:
        found = Header.unpack(body)
    except NbdsnapError:
        return
    assert Header.unpack(found.pack()) == found


ranges = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.booleans()), max_size=12)


@fuzz
@given(ranges, st.integers(0, 2**16), st.sampled_from(Compression), cuts)
def test_what_is_encoded_comes_out(
    gaps: list[tuple[int, int, bool]], seed: int, compression: Compression, cuts: list[int]
) -> None:
    """Extents of any place and length, over any base."""
    old, new = contents(seed, chunks=2)
    size = len(new)
    expected = bytearray(old[:size])
    encoder = Encoder(header(size, len(old)))
    chooser = Chooser(compression, lambda: 0)
    parts = encoder.start()
    position = 0
    for gap, length, confirmed in gaps:
        start, end = position + gap * 37, min(position + gap * 37 + length * 199, size)
        if start >= end:
            break
        expected[start:end] = new[start:end]
        if (stored := chooser.store(start, new[start:end], old[start:end])) is not None:
            parts += encoder.add(stored)
        position = end
        if confirmed:
            parts += encoder.checkpoint(position)
    parts += encoder.end()
    stream = b"".join(map(bytes, parts))
    assert b"".join(split(stream)) == stream
    assert apply(stream, old, cuts) == expected
