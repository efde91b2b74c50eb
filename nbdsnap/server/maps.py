"""Metadata contexts: which an export has, and the extents that each says of a range (proto.md, "Metadata querying").

====================================  =====================================================================
context                               flags of an extent
====================================  =====================================================================
``base:allocation``                   bit 0: a hole; bit 1: it reads as zeroes
``qemu:allocation-depth``             0: a hole; 1: in the export's own layer; 2: in the one below: what a
                                      snapshot still shares with the live volume
``x-nbdsnap:changed:SNAPSHOT``        bit 0: changed since that snapshot of the volume, or perhaps
``qemu:dirty-bitmap:SNAPSHOT``        the same map, for tools that speak qemu's dialect
====================================  =====================================================================

The last two are there for each older snapshot, and say exactly what ``nbdsnap diff`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from nbdsnap.engine.device import Device
from nbdsnap.nbd.replies import Extent

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
CHANGED = "x-nbdsnap:changed:"
DIRTY_BITMAP = "qemu:dirty-bitmap:"

Map = Callable[[int, int], Iterator[Extent]]
"""From offset and length to consecutive extents, which may end early, but not before the first."""

WINDOW = 256 << 20
"""Bytes that the engine is asked about at a time, so that one request does not list a whole fragmented disk."""

MOST_EXTENTS = 16 << 10
"""Extents after which a map ends, as the protocol allows: its client asks on from there."""

HELD_PER_MAP = 16 * MOST_EXTENTS
"""Bytes that a reply may take, for each map: extents of two 64-bit numbers."""


def context_names(bases: Sequence[str]) -> tuple[str, ...]:
    """All contexts of an export that can be compared with the snapshots ``bases``."""
    changed = [prefix + base for prefix in (CHANGED, DIRTY_BITMAP) for base in bases]
    return (BASE_ALLOCATION, ALLOCATION_DEPTH, *changed)


def base_of(context: str) -> str | None:
    """The snapshot that a context compares with."""
    for prefix in (CHANGED, DIRTY_BITMAP):
        if context.startswith(prefix):
            return context.removeprefix(prefix)
    return None


def map_of(device: Device, context: str) -> Map:
    """The map of a context that the device was opened with."""
    base = base_of(context)
    if base is not None:
        return lambda offset, length: _ended(device.changes(base, offset, length))
    ask = device.depths if context == ALLOCATION_DEPTH else device.extents
    return lambda offset, length: _ended(_in_windows(ask, offset, length))


def _in_windows(ask: Callable[[int, int], list[Extent]], offset: int, length: int) -> Iterator[Extent]:
    end = offset + length
    while offset < end:
        step = min(WINDOW, end - offset)
        yield from ask(offset, step)
        offset += step


def _ended(extents: Iterable[Extent]) -> Iterator[Extent]:
    """``extents``, found as they are asked for, as far as a reply goes; neighbours that are alike are one."""
    count = length = value = 0
    for more, flags in extents:
        if length and flags != value:
            yield length, value
            length = 0
            count += 1
            if count == MOST_EXTENTS:
                return
        length += more
        value = flags
    if length:
        yield length, value
