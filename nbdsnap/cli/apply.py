"""``nbdsnap apply``: no server, no pool."""

from __future__ import annotations

from pathlib import Path

import click

from nbdsnap.cli.options import json_option
from nbdsnap.cli.output import plural, print_json
from nbdsnap.cli.progress import progress_bar
from nbdsnap.errors import NotFoundError
from nbdsnap.sizes import format_size


@click.command(short_help="Write a delta onto a raw file or block device.")
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path))
@json_option
def apply(file: str, target: Path, as_json: bool) -> None:
    """Write the delta in FILE onto TARGET, a raw file or block device that holds its base.

    All of the delta is checked before anything is written, and so is what TARGET holds where the delta will change
    it. From a pipe (-) each part is checked before it is written. A delta of a whole snapshot makes a new file.

    \b
    Example:
      nbdsnap apply monday.delta backup.img
      nbdsnap apply tuesday.delta backup.img
    """
    from nbdsnap.operations import Progress
    from nbdsnap.transfer.apply import apply as execute

    try:
        opened = click.open_file(file, "rb")
    except FileNotFoundError:
        raise NotFoundError(f"{file} does not exist") from None
    with opened as stream, progress_bar("applying", transfer=True) as show:

        def report(done: int, total: int) -> None:
            if show is not None:
                show(Progress.model_construct(done=done, total=total))

        applied = execute(stream.fileno(), target, report)
    if as_json:
        print_json(applied)
    else:
        changed = f"{format_size(applied.bytes)} in {plural(applied.extents, 'extent')}"
        click.echo(f"{target} is {applied.volume}@{applied.snapshot}: {changed} written")
