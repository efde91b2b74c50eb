"""``nbdsnap status --map``: a volume's changes, drawn as lines of text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

import click

from nbdsnap.models import VolumeMap, VolumeStatus
from nbdsnap.sizes import format_size

ROWS = 20
"""The newest snapshots of a volume."""

CELLS = 64
"""Where the output is no terminal."""

LEAST_CELLS = 16
MOST_CELLS = 256
NAME_WIDTH = 24

SHADES = " \u00b7\u2591\u2592\u2593\u2588"
"""Nothing, next to nothing, and then by quarters."""

SHARED = "shared by"


def cells_of(volume: VolumeStatus, as_json: bool) -> int:
    """As many as fit beside the names of the volume's newest snapshots."""
    if as_json or not sys.stdout.isatty():
        return CELLS
    width = shutil.get_terminal_size().columns - _name_width([one.name for one in volume.snapshots[-ROWS:]]) - 3
    return max(LEAST_CELLS, min(MOST_CELLS, width))


def _name_width(names: Sequence[str]) -> int:
    return min(NAME_WIDTH, max(len(SHARED), *(len(name) for name in names)))


def print_map(shown: VolumeMap) -> None:
    click.echo(f"{shown.volume}: {format_size(shown.size)}, {format_size(shown.cell_bytes)} in a character")
    width = _name_width([row.since for row in shown.rows])
    for row in shown.rows:
        name = row.since if len(row.since) <= width else row.since[: width - 1] + "\u2026"
        line = "".join(_shade(changed / shown.cell_bytes) for changed in row.changed_bytes)
        click.echo(f"{name:>{width}} |{line}|")
    click.echo(f"{SHARED:>{width}} |{''.join(_digit(sharers) for sharers in shown.sharers)}|")


def _shade(share: float) -> str:
    if share <= 0:
        return SHADES[0]
    return SHADES[1] if share < 1 / 64 else SHADES[2 + min(3, int(share * 4))]


def _digit(sharers: float) -> str:
    number = round(sharers)
    return " " if sharers <= 0 else str(max(1, number)) if number < 10 else "+"
