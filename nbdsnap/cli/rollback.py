"""``nbdsnap rollback``."""

from __future__ import annotations

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.names import complete_snapshots
from nbdsnap.cli.options import dry_run_option, json_option
from nbdsnap.cli.output import print_json
from nbdsnap.cli.progress import progress_bar
from nbdsnap.operations import ROLLBACK, RollbackTo
from nbdsnap.sizes import format_size


@click.command(short_help="Give a volume the content of one of its snapshots.")
@click.argument("name", metavar="VOLUME@NAME", shell_complete=complete_snapshots)
@click.option("--force", is_flag=True, help="Also while clients have the volume open: its content changes under them.")
@dry_run_option
@json_option
@pass_context
def rollback(context: Context, name: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Give the live volume the content of its snapshot NAME.

    What was written since is lost, but for what other snapshots hold: they all stay, the newer ones, too. Take a
    snapshot first to be able to come back. The cost is that of what has changed since, and a crash in between leaves
    no half: the next start finishes it.

    \b
    Example:
      nbdsnap rollback vol@monday --dry-run
      nbdsnap rollback vol@monday
    """
    request = RollbackTo(name=name, force=force, dry_run=dry_run)
    with progress_bar("rolling back") as on_event:
        report = context.call(ROLLBACK, request, on_event)
    if as_json:
        print_json(report)
        return
    volume = name.partition("@")[0]
    changed = format_size(report.bytes)
    if report.done:
        click.echo(f"{volume} is {name} again: {changed} written over")
        return
    click.echo(f"would write over {changed} of {volume}")
    if report.preserved_bytes:
        click.echo(f"newer snapshots would need up to {format_size(report.preserved_bytes)} of that")
