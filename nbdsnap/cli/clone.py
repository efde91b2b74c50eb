"""``nbdsnap clone``."""

from __future__ import annotations

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.names import complete_snapshots
from nbdsnap.cli.options import json_option
from nbdsnap.cli.output import print_json
from nbdsnap.operations import CLONE, CloneOf
from nbdsnap.sizes import format_size


@click.command(short_help="Make a writable volume of a snapshot.")
@click.argument("snapshot", metavar="VOLUME@NAME", shell_complete=complete_snapshots)
@click.argument("name", metavar="NEWVOLUME")
@json_option
@pass_context
def clone(context: Context, snapshot: str, name: str, as_json: bool) -> None:
    """Make NEWVOLUME, a writable volume with the content of a snapshot.

    It is there at once, whatever the size, and shares everything with the snapshot, which stays as it is. What is
    written to it goes into the pool. The snapshot can't be deleted as long as it has clones.

    \b
    Example:
      nbdsnap clone vol@monday trial
    """
    made = context.call(CLONE, CloneOf(snapshot=snapshot, name=name))
    if as_json:
        print_json(made)
    else:
        click.echo(f"{made.name}: {format_size(made.size)}, a clone of {made.base}")
