"""``nbdsnap send``."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.names import complete_snapshots
from nbdsnap.cli.options import dry_run_option, json_option, parse_size_option
from nbdsnap.cli.output import plural, print_json
from nbdsnap.cli.progress import progress_bar
from nbdsnap.models import SendReport
from nbdsnap.operations import SEND, Send
from nbdsnap.sizes import format_size


@click.command(short_help="Write a snapshot, or what differs from an older one, as a stream.")
@click.argument("name", metavar="VOLUME@B", required=False, shell_complete=complete_snapshots)
@click.option("--from", "base", metavar="VOLUME@A", shell_complete=complete_snapshots, help="Only what changed since.")
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Not to standard output.")
@click.option(
    "--rate-limit", metavar="SIZE", callback=parse_size_option, help="Bytes per second, at most, such as 10MiB."
)
@click.option(
    "--compress",
    type=click.Choice(("none", "auto", "best")),
    default="auto",
    show_default=True,
    help="auto: what costs little; best: what saves most.",
)
@click.option("--resume", "token", metavar="TOKEN", help="Send the rest of a stream that was cut.")
@dry_run_option
@json_option
@pass_context
@click.pass_context
def send(
    ctx: click.Context,
    context: Context,
    name: str | None,
    base: str | None,
    output: Path | None,
    rate_limit: int | None,
    compress: str,
    token: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write snapshot B as a delta stream: whole, or what differs from the older snapshot A.

    `nbdsnap receive` makes the snapshot of it, on another machine; `nbdsnap apply` writes it onto a plain file.
    --dry-run says how much would be looked at: the stream is not longer, but for some bytes of its own, and often
    much shorter. With --json, what was sent is told on standard error, where the stream is on standard output.

    \b
    Example:
      nbdsnap send vol@tuesday --from vol@monday -o tuesday.delta
      nbdsnap send vol@monday > monday.delta
      nbdsnap send vol@tuesday --from vol@monday --dry-run
    """
    if (name is None) == (token is None) or (token is not None and base is not None):
        raise click.UsageError("name a snapshot, or --resume a stream", ctx)
    request = Send.model_validate(
        {"to": name, "from": base, "compress": compress, "rate_limit": rate_limit, "resume": token, "dry_run": dry_run}
    )
    if dry_run:
        _print(context.call(SEND, request), as_json)
        return
    if output is None and sys.stdout.isatty():
        raise click.UsageError("a stream is nothing for a terminal: name a file with -o, or a pipe", ctx)
    from nbdsnap.transfer.channel import offered

    control = context.config().server.control
    with (
        _opened(output) as fd,
        offered(fd, control) as path,
        progress_bar("sending", transfer=True) as on_event,
    ):
        report = context.call(SEND, request.model_copy(update={"stream": path}), on_event)
    if as_json:
        click.echo(report.model_dump_json(indent=2), err=output is None)
    elif output is not None:
        click.echo(f"{report.snapshot}: {format_size(report.stream_bytes)} in {output}")


def _print(report: SendReport, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    what = f"{report.snapshot} since {report.base}" if report.base else f"all of {report.snapshot}"
    click.echo(f"{what}: up to {format_size(report.bytes)} in {plural(report.extents, 'range')}")


@contextmanager
def _opened(output: Path | None) -> Iterator[int]:
    """Where to write.  A new file gets its name when it is whole."""
    if output is None:
        yield sys.stdout.fileno()
        return
    if output.exists() and not stat.S_ISREG(output.stat().st_mode):
        fd = os.open(output, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    part = output.with_name(f".{output.name}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        yield fd
        os.fsync(fd)
        part.rename(output)
    finally:
        os.close(fd)
        part.unlink(missing_ok=True)
