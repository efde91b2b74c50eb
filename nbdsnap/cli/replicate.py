"""``nbdsnap replicate``: how far the targets are, and bringing them up to date."""

from __future__ import annotations

from collections.abc import Sequence

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.names import complete_volumes
from nbdsnap.cli.options import Group, json_option
from nbdsnap.cli.output import Column, format_time, plural, print_json, print_table
from nbdsnap.cli.progress import progress_bar
from nbdsnap.errors import NbdsnapError
from nbdsnap.models import ReplicationStatus
from nbdsnap.operations import REPLICATE_RUN, REPLICATE_STATUS, Nothing, ReplicateRun
from nbdsnap.sizes import format_size


@click.group(cls=Group)
def replicate() -> None:
    """See how far the targets of this server's volumes are, and bring them up to date.

    \b
    Example:
      nbdsnap replicate status
    """


@replicate.command("status")
@json_option
@pass_context
@click.pass_context
def status(ctx: click.Context, context: Context, as_json: bool) -> None:
    """Show each target: what it has, and how far behind that is. Exit code 1 where one is failing.

    \b
    Example:
      nbdsnap replicate status --json
    """
    found = context.call(REPLICATE_STATUS, Nothing())
    _print(found, as_json)
    failing = sum(1 for one in found if one.error is not None)
    if failing:
        click.echo(f"nbdsnap: {plural(failing, 'target')} failing", err=True)
        ctx.exit(1)


@replicate.command("run")
@click.argument("volume", required=False, shell_complete=complete_volumes)
@click.option("--wait", is_flag=True, help="Until that is done; exit code 1 where it failed.")
@json_option
@pass_context
def run(context: Context, volume: str | None, wait: bool, as_json: bool) -> None:
    """Bring the targets of VOLUME, or of all volumes, up to date now.

    \b
    Example:
      nbdsnap replicate run vol --wait
    """
    with progress_bar("replicating", transfer=True) as on_event:
        found = context.call(REPLICATE_RUN, ReplicateRun(volume=volume, wait=wait), on_event)
    if wait or as_json:
        _print(found, as_json)
    failed = [one for one in found if wait and one.error is not None]
    if failed:
        raise NbdsnapError(f"{failed[0].volume} to {failed[0].target}: {failed[0].error}")


def _print(found: Sequence[ReplicationStatus], as_json: bool) -> None:
    if as_json:
        print_json(found, list[ReplicationStatus])
        return
    columns = [
        Column("VOLUME"),
        Column("TARGET"),
        Column("STATE"),
        Column("HAS"),
        Column("TAKEN"),
        Column("BEHIND", right=True),
        Column("RATE", right=True),
        Column("ERROR"),
    ]
    rows = [
        (
            one.volume,
            one.target,
            one.state,
            one.snapshot or "",
            "" if one.point is None else format_time(one.point),
            _behind(one),
            f"{format_size(one.rate)}/s" if one.rate else "",
            one.error or "",
        )
        for one in found
    ]
    print_table(columns, rows)


def _behind(one: ReplicationStatus) -> str:
    if one.lag_seconds is None or one.lag_bytes is None:
        return ""
    return f"{one.lag_seconds:.0f}s, {format_size(one.lag_bytes)}" if one.lag_bytes else "nothing"
