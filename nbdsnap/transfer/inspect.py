"""What a delta stream holds, and whether all of it is as it was made: without a server, a pool or the base."""

from __future__ import annotations

from collections.abc import Callable

from nbdsnap.delta.decoder import Checkpoint, End, Extents
from nbdsnap.delta.format import Encoding, Header, Point
from nbdsnap.models import DeltaEncoding, DeltaInfo, DeltaPoint
from nbdsnap.transfer.streams import Source, read_events

OnHeader = Callable[[Header], None]
OnPosition = Callable[[int], None]


def inspect(source: Source, *, unpack: bool, on_header: OnHeader, on_position: OnPosition) -> DeltaInfo:
    """Read all of it; CorruptionError, DeltaCutError or FormatError where it is not whole.

    ``unpack``: what is compressed, too (but for differences, which need the base).
    """
    header: Header | None = None
    found = {encoding: DeltaEncoding(extents=0, bytes=0, stored_bytes=0) for encoding in Encoding}
    frames = 0
    end: End | None = None
    for event in read_events(source):
        frames += 1
        match event:
            case Header():
                header = event
                on_header(header)
            case Extents():
                for extent in event.extents:
                    kind = found[extent.encoding]
                    kind.extents += 1
                    kind.bytes += extent.length
                    kind.stored_bytes += len(extent.stored)
                    if unpack and extent.encoding is Encoding.ZSTD:
                        extent.content()
                on_position(event.extents[-1].offset + event.extents[-1].length)
            case Checkpoint():
                on_position(event.position)
            case End():
                end = event
    assert header is not None and end is not None
    return DeltaInfo(
        volume=header.volume,
        volume_id=str(header.volume_id),
        to=_point(header.to),
        base=None if header.base is None else _point(header.base),
        created=header.created,
        start=header.start,
        stream_bytes=source.received,
        frames=frames,
        extents=end.extents,
        bytes=end.covered,
        encodings={encoding.name.lower(): kind for encoding, kind in found.items() if kind.extents},
        digest=end.digest.hex(),
    )


def _point(point: Point) -> DeltaPoint:
    return DeltaPoint(name=point.name, id=str(point.id), size=point.size)
