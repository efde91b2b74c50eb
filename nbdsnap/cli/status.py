"""``nbdsnap status``."""

from __future__ import annotations

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.options import json_option
from nbdsnap.cli.output import Column, print_fields, print_json, print_table
from nbdsnap.models import PoolStatus, Sharing, VolumeInfo, VolumeStatus
from nbdsnap.operations import STATUS, Nothing
from nbdsnap.sizes import format_size

BAR_WIDTH = 32


@click.command(short_help="Show volumes, space and sharing.")
@json_option
@pass_context
def status(context: Context, as_json: bool) -> None:
    """Show volumes, the space that snapshots take, and how much of it they share.

    \b
    Example:
      nbdsnap status
    """
    shown = context.call(STATUS, Nothing())
    if as_json:
        print_json(shown)
        return
    print_fields(_fields(shown))
    if shown.volumes:
        from nbdsnap.cli.volume import print_volumes

        click.echo()
        print_volumes([_summary(one) for one in shown.volumes])
    if shown.sharing:
        click.echo()
        _print_sharing(shown.sharing)


def _fields(shown: PoolStatus) -> list[tuple[str, str]]:
    store = shown.store
    limit = "none" if store.limit_bytes is None else format_size(store.limit_bytes)
    fields = [
        ("pool", shown.path),
        ("preserved", f"{format_size(store.used_bytes)} (limit: {limit})"),
        ("on disk", f"{format_size(store.allocated_bytes)}, and {format_size(store.index_bytes)} of index"),
    ]
    notes = (("warning", store.warning), ("problem", shown.problem))
    return [*fields, *((title, note) for title, note in notes if note)]


def _summary(one: VolumeStatus) -> VolumeInfo:
    return VolumeInfo.model_validate({**one.model_dump(exclude={"snapshots"}), "snapshots": len(one.snapshots)})


def _print_sharing(sharing: list[Sharing]) -> None:
    """The histogram: how much is needed by 1, 2, … snapshots; its bars are relative to the largest."""
    largest = max(one.bytes for one in sharing) or 1
    columns = (Column("SHARED BY", right=True), Column("PRESERVED", right=True), Column(""))
    rows = (
        (str(one.shared_by), format_size(one.bytes), "#" * max(1, round(BAR_WIDTH * one.bytes / largest)))
        for one in sharing
    )
    print_table(columns, rows)
