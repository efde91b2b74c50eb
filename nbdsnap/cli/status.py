"""``nbdsnap status``."""

from __future__ import annotations

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.options import json_option
from nbdsnap.cli.output import Column, print_fields, print_json, print_table
from nbdsnap.models import PoolStatus, Sharing, VolumeInfo, VolumeMap, VolumeStatus
from nbdsnap.operations import STATUS, VOLUME_MAP, MapScope, Nothing
from nbdsnap.sizes import format_size

BAR_WIDTH = 32


@click.command(short_help="Show volumes, space and sharing.")
@click.option("--map", "as_map", is_flag=True, help="Draw where on each volume changes and sharing lie.")
@json_option
@pass_context
def status(context: Context, as_map: bool, as_json: bool) -> None:
    """Show volumes, the space that snapshots take, and how much of it they share.

    With --map, a line for each of the newest snapshots says where the volume was changed after it: the fuller a
    character, the more of that part. The line below says how many snapshots share what is preserved there.

    \b
    Example:
      nbdsnap status
      nbdsnap status --map
    """
    shown = context.call(STATUS, Nothing())
    if as_map:
        _show_maps(context, [one for one in shown.volumes if one.snapshots], as_json)
        return
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


def _show_maps(context: Context, volumes: list[VolumeStatus], as_json: bool) -> None:
    from nbdsnap.cli.map import ROWS, cells_of, print_map

    maps = [
        context.call(VOLUME_MAP, MapScope(name=one.name, cells=cells_of(one, as_json), rows=ROWS)) for one in volumes
    ]
    if as_json:
        print_json(maps, list[VolumeMap])
        return
    for position, one in enumerate(maps):
        if position:
            click.echo()
        print_map(one)


def _fields(shown: PoolStatus) -> list[tuple[str, str]]:
    store = shown.store
    limit = "none" if store.limit_bytes is None else format_size(store.limit_bytes)
    live = sum(one.live_bytes or 0 for one in shown.volumes)
    used = f"{format_size(store.used_bytes - live)} (limit: {limit})"
    fields = [
        ("pool", shown.path),
        ("preserved", used if not live else f"{used}, beside {format_size(live)} of live data"),
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
