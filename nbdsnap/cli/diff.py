"""``nbdsnap diff``.

The answer may have millions of extents: each batch is printed as it comes, as a table or as JSON, and forgotten.
"""

from __future__ import annotations

import json
import sys
from typing import Protocol

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.names import complete_snapshots
from nbdsnap.cli.options import json_option
from nbdsnap.cli.output import plural
from nbdsnap.operations import DIFF, DiffExtents, DiffRange, DiffTotal
from nbdsnap.sizes import format_size

WIDTH = 20
"""Digits of the largest offset, and one."""


class Writer(Protocol):
    def extents(self, event: DiffExtents) -> None: ...

    def total(self, total: DiffTotal) -> None: ...


class TableWriter:
    """Two columns of bytes; on a terminal, a line with the sums at the end."""

    def __init__(self) -> None:
        self._count = 0

    def extents(self, event: DiffExtents) -> None:
        lines = [f"{one.offset:>{WIDTH}}{one.length:>{WIDTH}}\n" for one in event.extents]
        if self._count == 0:
            lines.insert(0, self._title())
        self._count += len(event.extents)
        sys.stdout.write("".join(lines))

    def _title(self) -> str:
        return f"{'OFFSET':>{WIDTH}}{'LENGTH':>{WIDTH}}\n"

    def total(self, total: DiffTotal) -> None:
        if self._count == 0:
            sys.stdout.write(self._title())
        if sys.stdout.isatty():
            sys.stdout.write(f"{plural(self._count, 'range')}, {format_size(total.bytes)}\n")


class JsonWriter:
    """One object, written in pieces; its ``bytes`` stand last, since they are known last."""

    def __init__(self, older: str, newer: str | None) -> None:
        self._older = older
        self._newer = newer
        self._separator = ""

    def extents(self, event: DiffExtents) -> None:
        items = ",\n".join(f'    {{"offset": {one.offset}, "length": {one.length}}}' for one in event.extents)
        sys.stdout.write(f"{self._separator or self._start()}{items}")
        self._separator = ",\n"

    def _start(self) -> str:
        head = f'{{\n  "from": {json.dumps(self._older)},\n  "to": {json.dumps(self._newer)},\n'
        return head + '  "extents": [\n'

    def total(self, total: DiffTotal) -> None:
        start = "" if self._separator else self._start()
        sys.stdout.write(f'{start}\n  ],\n  "bytes": {total.bytes}\n}}\n')


@click.command(short_help="Show the ranges that changed between two snapshots.")
@click.argument("older", metavar="VOLUME@A", shell_complete=complete_snapshots)
@click.argument("newer", metavar="[VOLUME@B]", required=False, shell_complete=complete_snapshots)
@json_option
@pass_context
def diff(context: Context, older: str, newer: str | None, as_json: bool) -> None:
    """Show the ranges that changed from snapshot A to snapshot B, or to the live volume.

    Ranges are in bytes, ascending, and do not touch. The cost is that of the change, not of the volume.

    \b
    Example:
      nbdsnap diff vol@monday vol@tuesday
      nbdsnap diff vol@tuesday --json
    """
    writer: Writer = JsonWriter(older, newer) if as_json else TableWriter()
    request = DiffRange.model_validate({"from": older, "to": newer})
    writer.total(context.call(DIFF, request, writer.extents))
