"""Delta streams: what was encoded comes out, and anything else is refused with a clear error."""

from __future__ import annotations

import random
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from nbdsnap.delta import format as layout
from nbdsnap.delta.choice import CREDIT, Chooser, Compression
from nbdsnap.delta.decoder import Checkpoint, Decoder, End, Extents
from nbdsnap.delta.encoder import Encoder
from nbdsnap.delta.format import ENTRY, FRAME, HAS_BASE, MAX_DATA, Encoding, FrameType, Header
from nbdsnap.errors import CorruptionError, DeltaCutError, FormatError, NbdsnapError, WrongBaseError
from tests.golden.make_delta import SEED
from tests.support.deltas import CHUNK, WHEN, apply, contents, encode, events, header, seal, split, stored_extents

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/delta-v1.bin"
DOCUMENT = (ROOT / "docs/delta-format.md").read_text()

OLD, NEW = contents(1)
FRAMES = encode(NEW, OLD)
STREAM = b"".join(FRAMES)
WHOLE_FRAMES = encode(NEW)
WHOLE = b"".join(WHOLE_FRAMES)


def refused(stream: bytes, old: bytes = OLD) -> str:
    with pytest.raises(NbdsnapError) as caught:
        apply(stream, old)
    return str(caught.value)


# Round trips


def test_a_difference_makes_the_new_content_of_the_old() -> None:
    assert apply(STREAM, OLD) == NEW
    encodings = {extent.encoding for extent in stored_extents(STREAM)}
    assert encodings == set(Encoding)


def test_a_whole_stream_needs_no_base() -> None:
    assert apply(WHOLE) == NEW
    assert {extent.encoding for extent in stored_extents(WHOLE)} == {Encoding.RAW, Encoding.ZERO, Encoding.ZSTD}
    assert apply(WHOLE, b"\xff" * len(NEW)) == NEW


@pytest.mark.parametrize("length", [len(NEW) - 5 * CHUNK, len(NEW) + 5 * CHUNK])
def test_the_volume_may_have_shrunk_or_grown(length: int) -> None:
    new = NEW[:length].ljust(length, b"\x55")
    assert apply(b"".join(encode(new, OLD)), OLD) == new


def test_what_did_not_change_is_not_sent() -> None:
    assert list(stored_extents(b"".join(encode(OLD, OLD)))) == []
    assert apply(b"".join(encode(OLD, OLD)), OLD) == OLD


def test_events_say_what_was_sent() -> None:
    found = events(STREAM)
    assert found[0] == header(len(NEW), len(OLD))
    assert [event.position for event in found if isinstance(event, Checkpoint)] == [
        10 * CHUNK * n for n in (1, 2, 3)
    ] + [len(NEW)]
    extents = [extent for event in found if isinstance(event, Extents) for extent in event.extents]
    end = found[-1]
    assert isinstance(end, End)
    assert (end.extents, end.covered) == (len(extents), sum(extent.length for extent in extents))
    assert all(extent.base is not None for extent in extents)


def test_a_header_keeps_everything() -> None:
    full = replace(header(5 << 40, 1 << 40, start=77), resumed=bytes(range(32)), estimate=12345)
    assert Header.unpack(full.pack()) == full
    assert Header.unpack(replace(full, base=None).pack()) == replace(full, base=None)
    assert Header.unpack(full.pack()).created == WHEN


def test_a_resumed_stream_begins_where_the_first_was_cut() -> None:
    encoder = Encoder(header(len(NEW), None, start=10 * CHUNK))
    chooser = Chooser(Compression.NONE, lambda: 0)
    parts = encoder.start()
    for offset in range(10 * CHUNK, len(NEW), CHUNK):
        stored = chooser.store(offset, NEW[offset : offset + CHUNK], None)
        assert stored is not None
        parts += encoder.add(stored)
    parts += encoder.end()
    assert apply(b"".join(map(bytes, parts)), NEW[: 10 * CHUNK]) == NEW


def test_many_small_extents_share_a_frame_and_none_is_too_large() -> None:
    encoder = Encoder(header(1 << 40, 1 << 40))
    chooser = Chooser(Compression.NONE, lambda: 0)
    parts = encoder.start()
    for index in range(10_000):
        stored = chooser.store(index * 10_000, b"%4d" % index, b"xxxx")
        assert stored is not None
        parts += encoder.add(stored)
    for index in range(20):
        stored = chooser.store((1 << 30) + index * MAX_DATA, bytes([index + 1]) * (MAX_DATA - 1), None)
        assert stored is not None
        parts += encoder.add(stored)
    parts += encoder.end()
    stream = b"".join(map(bytes, parts))
    assert encoder.written == len(stream)
    frames = list(split(stream))
    assert len(frames) == 1 + 1 + 3 + 20 + 1
    assert max(map(len, frames)) <= FRAME.size + layout.MAX_BODY
    assert sum(len(event.extents) for event in events(stream) if isinstance(event, Extents)) == 10_020


# The golden stream, and the document


def test_the_golden_stream_is_read_exactly() -> None:
    old, new = contents(SEED)
    assert apply(GOLDEN.read_bytes(), old) == new


def test_the_golden_stream_is_written_exactly() -> None:
    """From its extents as they are: what a compressor makes of them may change with its version."""
    golden = GOLDEN.read_bytes()
    stored = iter(list(stored_extents(golden)))
    found = events(golden)
    assert isinstance(found[0], Header)
    encoder = Encoder(found[0])
    again = encoder.start()
    for event in found[1:]:
        if isinstance(event, Extents):
            for _ in event.extents:
                again += encoder.add(next(stored))
        elif isinstance(event, Checkpoint):
            again += encoder.checkpoint(event.position)
    again += encoder.end()
    assert b"".join(map(bytes, again)) == golden


def test_the_document_has_the_numbers_of_the_code() -> None:
    assert f"at most {layout.MAX_BODY:,}" in DOCUMENT
    assert f"are {layout.MAX_DATA:,} in all" in DOCUMENT
    assert f"1 to {layout.MAX_ENTRIES:,}" in DOCUMENT
    assert f"looks back {layout.MAX_WINDOW >> 20} MiB" in DOCUMENT
    assert f"at most {layout.MAX_NAME} each" in DOCUMENT
    assert " ".join(f"{byte:02X}" for byte in layout.MAGIC) in DOCUMENT
    for kind in FrameType:
        assert f"| {kind.value} | {kind.name} |" in DOCUMENT
    for encoding in Encoding:
        assert f"| {encoding.value} | {encoding.name.lower()} |" in DOCUMENT
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |^## )", DOCUMENT, re.MULTILINE | re.DOTALL))
    for name, fixed in {
        "Prologue": layout.PROLOGUE.size,
        "Frames": FRAME.size,
        "HEADER": layout.HEADER_BODY.size,
        "CHECKPOINT": layout.CHECKPOINT_BODY.size,
        "END": layout.END_BODY.size,
    }.items():
        assert table_size(sections[name]) == fixed, name
    assert table_size(sections["EXTENTS"].split("Each extent:")[1]) == ENTRY.size


def table_size(section: str) -> int:
    """Bytes up to what has no fixed offset or size; each field begins where the one before ends."""
    position = 0
    for row in re.findall(r"^\| (\d+) \| ([\d, ]+) \|", section, re.MULTILINE):
        assert int(row[0]) == position, row
        position += sum(map(int, row[1].split(",")))
    return position


# Streams that are cut, damaged or forged


def test_a_stream_cut_anywhere_is_refused() -> None:
    boundaries = {sum(map(len, FRAMES[:count])) for count in range(len(FRAMES))}
    anywhere = set(random.Random(1).sample(range(len(STREAM)), 200))
    for length in boundaries | anywhere:
        with pytest.raises(DeltaCutError, match=r"cut after|nothing came"):
            apply(STREAM[:length], OLD)


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    stream = bytearray(STREAM)
    positions = set(range(200)) | set(random.Random(2).sample(range(len(stream)), 400)) | {len(stream) - 1}
    for position in positions:
        stream[position] ^= 1 << position % 8
        assert refused(bytes(stream))
        stream[position] ^= 1 << position % 8


def test_frames_out_of_order_missing_or_repeated_are_refused() -> None:
    for index in range(1, len(FRAMES) - 1):
        swapped = [*FRAMES[:index], FRAMES[index + 1], FRAMES[index], *FRAMES[index + 2 :]]
        missing = FRAMES[:index] + FRAMES[index + 1 :]
        repeated = [*FRAMES[: index + 1], FRAMES[index], *FRAMES[index + 1 :]]
        for parts in (swapped, missing, repeated):
            assert "belongs" in refused(b"".join(parts))


def test_a_frame_of_another_stream_is_noticed_at_the_next_checkpoint() -> None:
    other = encode(contents(5)[1], OLD)
    assert len(other) == len(FRAMES)
    assert "cryptographic" in refused(b"".join([*FRAMES[:3], other[3], *FRAMES[4:]]))


def test_more_after_the_end_is_refused() -> None:
    assert "after its end" in refused(STREAM + b"\0")
    assert "after its end" in refused(STREAM + STREAM)


def test_something_else_is_no_stream() -> None:
    for other in (b"\x7fELF" + bytes(100), bytes(100), b"QFI\xfb" + bytes(100)):
        with pytest.raises(FormatError, match="no delta stream"):
            apply(other)


def test_a_stream_of_a_future_version_is_refused() -> None:
    with pytest.raises(FormatError, match="has format 2; this nbdsnap knows up to 1") as caught:
        apply(STREAM[:8] + b"\0\2" + STREAM[10:])
    assert "newer nbdsnap" in caught.value.advice


def test_an_aborted_stream_says_why() -> None:
    encoder = Encoder(header(len(NEW)))
    parts = [*encoder.start(), *encoder.abort("vol@b: the data at offset 0\nis damaged")]
    assert refused(b"".join(map(bytes, parts))).endswith("gave up: vol@b: the data at offset 0 is damaged")


def extents(*entries: tuple[int, int, int, int, int, int], data: bytes = b"", count: int | None = None) -> bytes:
    """The body of a frame of extents."""
    return (
        struct.pack(">I", len(entries) if count is None else count)
        + b"".join(ENTRY.pack(*one) for one in entries)
        + data
    )


RAW, ZERO, ZSTD, DIFF = Encoding
BOMB = zstandard.ZstdCompressor().compress(bytes(MAX_DATA * 64))
LYING = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
END = len(NEW)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(extents((0, END + 1, 0, ZERO, 0, 0)), "beyond the volume", id="longer than the volume"),
        pytest.param(extents((END, 1, 1, RAW, 0, 0), data=b"x"), "beyond the volume", id="behind the volume"),
        pytest.param(extents((2**64 - 1, 2**64 - 1, 0, ZERO, 0, 0)), "beyond the volume", id="wraps around"),
        pytest.param(extents((5, 2**64 - 1, 0, ZERO, 0, 0)), "beyond the volume", id="wraps around to the start"),
        pytest.param(extents((0, 0, 0, ZERO, 0, 0)), "beyond the volume", id="empty"),
        pytest.param(extents((10, 5, 0, ZERO, 0, 0), (14, 5, 0, ZERO, 0, 0)), "before the one", id="overlap"),
        pytest.param(extents((10, 5, 0, ZERO, 0, 0), (0, 5, 0, ZERO, 0, 0)), "before the one", id="descending"),
        pytest.param(extents((0, 5, 4, RAW, 0, 0), data=b"1234"), "another length", id="less data than it says"),
        pytest.param(extents((0, 5, 6, RAW, 0, 0), data=b"123456"), "another length", id="more data than it says"),
        pytest.param(extents((0, 5, 5, ZERO, 0, 0), data=b"12345"), "another length", id="zeroes with data"),
        pytest.param(extents((0, 5, 99, RAW, 0, 0), data=b"12345"), "another length", id="data beyond the frame"),
        pytest.param(extents((0, 5, 99, ZSTD, 0, 0), data=b"12345"), "do not fit", id="packed beyond the frame"),
        pytest.param(extents((0, 5, 5, RAW, 0, 0), data=b"12345678"), "do not fit", id="data left over"),
        pytest.param(extents((0, 5, 0, 9, 0, 0)), "unknown encoding", id="unknown encoding"),
        pytest.param(extents((0, 5, 0, ZERO, 2, 0)), "unknown encoding", id="unknown flag"),
        pytest.param(extents(), "does not fit", id="no extents"),
        pytest.param(extents(count=2**32 - 1), "does not fit", id="a table beyond the frame"),
        pytest.param(extents(count=4097, data=bytes(4097 * ENTRY.size)), "does not fit", id="too long a table"),
        pytest.param(b"", "does not fit", id="no table"),
        pytest.param(extents((0, 4096, len(BOMB), ZSTD, 0, 0), data=BOMB), "another length", id="a bomb"),
        pytest.param(extents((0, 100, len(LYING), ZSTD, 0, 0), data=LYING), "another length", id="no length inside"),
        pytest.param(extents((0, 100, 4, ZSTD, 0, 0), data=b"junk"), "does not unpack", id="not packed"),
        pytest.param(extents((0, 100, 0, ZSTD, 0, 0)), "does not unpack", id="nothing packed"),
        pytest.param(extents((0, 100, 4, DIFF, 0, 0), data=b"junk"), "does not unpack", id="no difference"),
        pytest.param(extents((0, 5, 5, RAW, HAS_BASE, 99), data=b"12345"), "not what the delta", id="wrong base"),
    ],
)
def test_a_forged_frame_is_refused(body: bytes, message: str) -> None:
    """All checksums are right: an attacker computes them, too."""
    assert message in refused(seal([*FRAMES[:2], FRAMES[2], FRAMES[-1]], {1: body}))


def test_frames_that_unpack_to_more_than_a_reader_holds_are_refused() -> None:
    pieces = [zstandard.ZstdCompressor().compress(bytes(MAX_DATA)) for _ in range(2)]
    entries = [(index * MAX_DATA, MAX_DATA, len(one), ZSTD, 0, 0) for index, one in enumerate(pieces)]
    big = header(4 * MAX_DATA, 0)
    parts = [FRAMES[0], frame(FrameType.HEADER, big.pack()), FRAMES[2], FRAMES[-1]]
    assert "do not fit" in refused(seal(parts, {1: extents(*entries, data=b"".join(pieces))}))


def frame(kind: FrameType, body: bytes) -> bytes:
    return FRAME.pack(kind, 0, len(body), 0, 0) + body


def test_a_whole_stream_may_leave_no_gap_and_needs_no_base() -> None:
    first = WHOLE_FRAMES[:2]
    for body in (
        extents((1, 5, 0, ZERO, 0, 0)),
        extents((0, 5, 0, ZERO, HAS_BASE, 1)),
        extents((0, 5, 4, DIFF, 0, 0), data=b"junk"),
    ):
        assert "needs a base" in refused(seal([*first, WHOLE_FRAMES[2], WHOLE_FRAMES[-1]], {1: body}))
    short = extents((0, 5, 0, ZERO, 0, 0))
    end = layout.END_BODY.pack(1, 5, bytes(32))
    assert "before the volume does" in refused(seal([*first, WHOLE_FRAMES[2], WHOLE_FRAMES[-1]], {1: short, 2: end}))


def test_endless_frames_are_refused() -> None:
    """Extents ascend, so their number is bounded; checkpoints alone would go on for ever."""
    checkpoint = next(one for one in FRAMES if one[0] == FrameType.CHECKPOINT)
    assert "nothing between" in refused(seal([*FRAMES[:3], checkpoint, checkpoint], {}))
    too_long = FRAME.pack(FrameType.EXTENTS, 0, 2**32 - 1, 1, 0)
    assert "longer than a frame may be" in refused(FRAMES[0] + FRAMES[1] + too_long)


def test_memory_is_bounded_whatever_a_frame_announces() -> None:
    decoder = Decoder()
    list(decoder.feed(FRAMES[0] + FRAMES[1] + FRAME.pack(FrameType.EXTENTS, 0, layout.MAX_BODY, 1, 0)))
    assert len(decoder.wanted()) == layout.MAX_BODY


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (replace(header(1 << 20), to=replace(header(1 << 20).to, size=2**63)), "out of range"),
        (replace(header(1 << 20), to=replace(header(1 << 20).to, size=0)), "out of range"),
        (header(1 << 20, 2**62), "out of range"),
        (header(1 << 20, start=(1 << 20) + 1), "out of range"),
        (replace(header(1 << 20), volume="v" * 129), "no valid length"),
    ],
)
def test_a_header_out_of_range_is_refused(changed: Header, message: str) -> None:
    assert message in refused(seal([FRAMES[0], frame(FrameType.HEADER, changed.pack())]))


def test_a_header_that_is_no_header_is_refused() -> None:
    good = header(1 << 20).pack()
    for body in (b"", good[:50], good + b"x", good[:-1] + b"\xff", good[:64] + b"\x7f" * 8 + good[72:]):
        assert "header" in refused(seal([FRAMES[0], frame(FrameType.HEADER, body)]))
    assert "first frame" in refused(seal([FRAMES[0], FRAMES[2]]))
    assert "two headers" in refused(seal([FRAMES[0], FRAMES[1], FRAMES[1]]))


def test_the_wrong_base_is_noticed_before_anything_is_written() -> None:
    wrong = bytearray(OLD)
    wrong[0] ^= 1
    with pytest.raises(WrongBaseError, match="offset 0 is not what the delta was made from"):
        apply(STREAM, bytes(wrong))


# The CPU budget


def test_an_exhausted_budget_stores_extents_as_they_are() -> None:
    spent = iter(range(0, 10**15, CREDIT * 10))
    chooser = Chooser(Compression.AUTO, lambda: next(spent))
    text = b"compressible " * 1000
    first = chooser.store(0, text, None)
    second = chooser.store(len(text), text, None)
    zero = chooser.store(2 * len(text), bytes(len(text)), None)
    assert first is not None and second is not None and zero is not None
    assert [first.encoding, second.encoding, zero.encoding] == [Encoding.ZSTD, Encoding.RAW, Encoding.ZERO]


def test_a_budget_recovers() -> None:
    times = iter([0, CREDIT + 10_000, 0, 0, 0, 0])
    chooser = Chooser(Compression.AUTO, lambda: next(times))
    text = b"compressible " * 1000
    found = [chooser.store(index * len(text), text, None) for index in range(3)]
    assert [one.encoding for one in found if one is not None] == [Encoding.ZSTD] * 2 + [Encoding.ZSTD]


def test_corruption_has_its_exit_code() -> None:
    with pytest.raises(CorruptionError):
        apply(STREAM[:100] + bytes([STREAM[100] ^ 1]) + STREAM[101:], OLD)
    assert CorruptionError.exit_code == 7
