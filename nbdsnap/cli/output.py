"""Printing: JSON for scripts, tables for people.

A table on a terminal is drawn by rich and fits its width (long names fold, nothing is cut off).  Anywhere else, and
where it can't fit, it is plain text: a line per row, columns two spaces apart, no colour, no folding; so that grep and
awk work on it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click
from pydantic import TypeAdapter

EMPTY = "-"
"""In a cell that has nothing to say, so that columns can be counted."""


@dataclass(frozen=True)
class Column:
    title: str
    right: bool = False


def print_json(value: Any, kind: Any = None) -> None:
    """``value`` as JSON, as its model (or ``kind``) serializes it."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind if kind is not None else type(value))
    click.echo(adapter.dump_json(value, by_alias=True, indent=2))


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    cells = [[cell or EMPTY for cell in row] for row in rows]
    if sys.stdout.isatty() and _least_width(columns, cells) <= shutil.get_terminal_size().columns:
        _print_rich(columns, cells)
    else:
        _print_plain(columns, cells)


def _least_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """What rich needs: numbers whole, anything else folded, but not its title."""
    widths = (
        max(len(cell) for cell in (column.title, *(row[index] for row in rows if column.right)))
        for index, column in enumerate(columns)
    )
    return sum(widths) + 2 * (len(columns) - 1)


def _print_rich(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=column.right,
            min_width=len(column.title),
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name is no markup
    Console(highlight=False).print(table)


def _print_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    table = [[column.title for column in columns], *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    for row in table:
        cells = (
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """``title: value`` lines, values aligned."""
    listed = list(fields)
    width = max(len(title) for title, _ in listed) + 1
    for title, value in listed:
        click.echo(f"{title + ':':<{width}} {value or EMPTY}")


def format_time(time: datetime) -> str:
    """In UTC, to the second, as JSON has it."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
