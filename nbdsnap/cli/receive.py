"""``nbdsnap receive``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.names import complete_volumes
from nbdsnap.cli.options import json_option
from nbdsnap.cli.output import print_json
from nbdsnap.cli.progress import progress_bar
from nbdsnap.errors import NotFoundError
from nbdsnap.operations import RECEIVE, RECEIVE_ABORT, ReceiveInto, ReceiveOf
from nbdsnap.sizes import format_size


@click.command(short_help="Make a snapshot of such a stream.")
@click.argument("volume", shell_complete=complete_volumes)
@click.option("-i", "--input", "source", metavar="FILE", type=click.Path(path_type=Path), help="Not standard input.")
@click.option("--name", help="Call the snapshot that, and not what it was called where it comes from.")
@click.option("--create", is_flag=True, help="Make a thin volume where there is none of that name.")
@click.option("--force", is_flag=True, help="Give up what was written since the base: roll the volume back first.")
@click.option("--resume", is_flag=True, help="Keep what came of a stream that is cut, and say how to go on.")
@click.option("--abort", is_flag=True, help="Undo what came of a stream that was cut.")
@json_option
@pass_context
@click.pass_context
def receive(
    ctx: click.Context,
    context: Context,
    volume: str,
    source: Path | None,
    name: str | None,
    create: bool,
    force: bool,
    resume: bool,
    abort: bool,
    as_json: bool,
) -> None:
    """Apply a delta stream to VOLUME, and make the snapshot of it that was sent.

    The volume has to be what the delta was made from: it holds that snapshot, and was not written since. The snapshot
    appears when all has come and was verified; where something fails, the volume is as it was before.

    With --resume, what came of a stream that is cut stays; until the rest has come, the volume shows what it held
    before, and takes no writes. With an empty stream, --resume prints the token for `nbdsnap send --resume`.

    \b
    Example:
      nbdsnap receive vol -i tuesday.delta
      nbdsnap receive vol --name from-backup -i tuesday.delta
      nbdsnap receive vol --abort
    """
    if abort:
        status = context.call(RECEIVE_ABORT, ReceiveOf(volume=volume))
        if as_json:
            print_json(status)
        else:
            click.echo(f"{volume} is as it was before")
        return
    from nbdsnap.transfer.channel import offered

    fd = _open(source, ctx, resume=resume)
    with (
        offered(fd, context.config().server.control) as path,
        progress_bar("receiving", transfer=True) as on_event,
    ):
        request = ReceiveInto(volume=volume, stream=path, name=name, create=create, force=force, resume=resume)
        report = context.call(RECEIVE, request, on_event)
    if as_json:
        print_json(report)
    elif report.token is not None:
        click.echo(report.token)
    else:
        click.echo(f"{report.snapshot}: {format_size(report.stream_bytes)} received")


def _open(source: Path | None, ctx: click.Context, *, resume: bool) -> int:
    if source is None:
        if not sys.stdin.isatty():
            return sys.stdin.fileno()
        if not resume:
            raise click.UsageError("a stream is nothing to type: name a file with -i, or a pipe", ctx)
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"{source} does not exist") from None
