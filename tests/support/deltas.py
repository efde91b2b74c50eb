"""Delta streams in memory: made from contents, and applied to contents."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from nbdsnap.delta.choice import Chooser, Compression, Stored
from nbdsnap.delta.decoder import Decoder, End, Event, Extents
from nbdsnap.delta.encoder import Encoder
from nbdsnap.delta.format import FRAME, FRAME_CHECKED, PROLOGUE, Encoding, Header, Point, frame_checksum, new_digest

CHUNK = 4096
WHEN = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def header(size: int, base_size: int | None = None, start: int = 0) -> Header:
    base = None if base_size is None else Point(uuid.UUID(int=2), "monday", base_size)
    return Header(uuid.UUID(int=3), "vol", Point(uuid.UUID(int=1), "tuesday", size), WHEN, base, start)


def contents(seed: int, chunks: int = 40) -> tuple[bytes, bytes]:
    """A base and what became of it: chunks of each kind that an encoding is for, and some that stayed."""
    rng = random.Random(seed)
    old = bytearray()
    new = bytearray()
    for index in range(chunks):
        before = rng.randbytes(CHUNK) if index % 2 else bytes(CHUNK)
        after = bytearray(before)
        match index % 5:
            case 0:
                after[:] = rng.randbytes(CHUNK)
            case 1:
                after[100:104] = b"\xff\xfe\xfd\xfc"
            case 2:
                after[:] = (b"line %d\n" % index).ljust(32, b"-") * (CHUNK // 32)
            case 3:
                after[:] = bytes(CHUNK)
        old += before
        new += after
    return bytes(old), bytes(new[:-700])


def encode(new: bytes, old: bytes | None = None, *, checkpoint_every: int = 10) -> list[bytes]:
    """The stream of one extent per chunk, cut into its prologue and frames."""
    encoder = Encoder(header(len(new), None if old is None else len(old)))
    chooser = Chooser(Compression.BEST, lambda: 0)
    parts = [b"".join(map(bytes, encoder.start()))]
    for index, offset in enumerate(range(0, len(new), CHUNK)):
        content = new[offset : offset + CHUNK]
        base = None if old is None else old[offset : offset + CHUNK].ljust(len(content), b"\0")[: len(content)]
        if (stored := chooser.store(offset, content, base)) is not None:
            parts.append(b"".join(map(bytes, encoder.add(stored))))
        if index % checkpoint_every == checkpoint_every - 1:
            parts.append(b"".join(map(bytes, encoder.checkpoint(offset + len(content)))))
    parts.append(b"".join(map(bytes, encoder.end())))
    return list(split(b"".join(parts)))


def split(stream: bytes) -> Iterator[bytes]:
    """The prologue, then each frame."""
    yield stream[: PROLOGUE.size]
    position = PROLOGUE.size
    while position < len(stream):
        length = FRAME.size + FRAME.unpack_from(stream, position)[2]
        yield stream[position : position + length]
        position += length


def seal(parts: Iterable[bytes], bodies: dict[int, bytes] | None = None) -> bytes:
    """The stream again, with frames renumbered, some bodies replaced, and all checksums and digests right: what an
    attacker would send."""
    prologue, *frames = parts
    digest = new_digest()
    digest.update(prologue)
    stream = bytearray(prologue)
    for number, frame in enumerate(frames):
        kind, flags, _, _, _ = FRAME.unpack_from(frame)
        body = (bodies or {}).get(number, frame[FRAME.size :])
        if kind in (3, 4):
            body = body[:-32] + digest.digest()
        head = FRAME.pack(kind, flags, len(body), number, 0)[:FRAME_CHECKED]
        whole = head + frame_checksum(head, body).to_bytes(8, "big") + body
        digest.update(whole)
        stream += whole
    return bytes(stream)


def stream_events(stream: bytes, cuts: Iterable[int] = ()) -> Iterator[Event]:
    """As they come, up to what the decoder raises."""
    decoder = Decoder()
    start = 0
    for cut in sorted({cut for cut in cuts if 0 < cut < len(stream)} | {len(stream)}):
        yield from decoder.feed(stream[start:cut])
        start = cut
    decoder.close()


def events(stream: bytes, cuts: Iterable[int] = ()) -> list[Event]:
    return list(stream_events(stream, cuts))


def apply(stream: bytes, old: bytes = b"", cuts: Iterable[int] = ()) -> bytes:
    """What a receiver ends up with."""
    content = bytearray()
    has_base = ended = False
    for event in stream_events(stream, cuts):
        assert not ended
        if isinstance(event, Header):
            has_base = event.base is not None
            content += old.ljust(event.to.size, b"\0")[: event.to.size]
        elif isinstance(event, Extents):
            for extent in event.extents:
                end = extent.offset + extent.length
                data = extent.content(bytes(content[extent.offset : end]) if has_base else None)
                content[extent.offset : end] = bytes(extent.length) if data is None else data
        ended = isinstance(event, End)
    assert ended
    return bytes(content)


def stored_extents(stream: bytes) -> Iterator[Stored]:
    for event in events(stream):
        if isinstance(event, Extents):
            for one in event.extents:
                yield Stored(one.offset, one.length, Encoding(one.encoding), bytes(one.stored), one.base)
