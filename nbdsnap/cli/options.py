"""Options and parameter types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nbdsnap.sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])


class Group(click.Group):
    """Its commands in the order in which they stand in the source, as in the documentation."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def parse_size_option(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A callback for options that take a size: bytes of ``10GiB`` and the like."""
    if value is None:
        return None
    try:
        size = parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    if size == 0:
        raise click.BadParameter("a size is at least 1 byte", ctx, param)
    return size


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(function)


def dry_run_option(function: F) -> F:
    return click.option("--dry-run", "-n", is_flag=True, help="Only say what would be done.")(function)
