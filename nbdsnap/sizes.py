"""Sizes as people write them: ``10GiB``, ``10G``, ``512K``, ``4096``.

Units are powers of 1024, as in qemu-img and lvm; ``K`` and ``KiB`` mean the same.
"""

from __future__ import annotations

import re

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_PATTERN = re.compile(r"(\d{1,19})\s*([KMGTP]?)(?:iB|B)?", re.IGNORECASE | re.ASCII)

MAX_SIZE = (1 << 63) - 1
"""NBD offsets are signed 64-bit in every client that matters."""


def parse_size(text: str | int) -> int:
    """Bytes of ``text``; ValueError, with a message for a person, where it is no size."""
    if isinstance(text, bool):
        raise ValueError("a size is a number of bytes or like 10GiB")
    if isinstance(text, int):
        size = text
    else:
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no size: write bytes, or a unit of K M G T (1024), like 10GiB")
        size = int(match[1]) << _UNITS[match[2].upper()]
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"size {text} is out of range: 0 to {MAX_SIZE}")
    return size


def format_size(size: int) -> str:
    """``size`` bytes for a person: ``10GiB``, ``1.5MiB``, ``17B``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            return f"{value:.1f}".rstrip("0").rstrip(".") + unit
        value /= 1024
    return f"{value:.1f}PiB"
