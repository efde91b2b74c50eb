"""``nbdsnap delta``: look into delta streams in files.  No server, no pool."""

from __future__ import annotations

import click

from nbdsnap.cli.options import Group, json_option
from nbdsnap.cli.output import Column, format_time, plural, print_fields, print_json, print_table
from nbdsnap.cli.progress import progress_bar
from nbdsnap.errors import CorruptionError, DeltaCutError, NotFoundError
from nbdsnap.models import DeltaInfo
from nbdsnap.sizes import format_size


@click.group(cls=Group)
def delta() -> None:
    """Look into delta streams: what `nbdsnap send` made. Needs no server.

    \b
    Example:
      nbdsnap delta info monday.delta
    """


@delta.command("info")
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@json_option
def info(file: str, as_json: bool) -> None:
    """Say what the delta in FILE holds (- is standard input).

    \b
    Example:
      nbdsnap delta info monday.delta
    """
    found = _inspect(file, "reading", unpack=False)
    if as_json:
        print_json(found)
        return
    base = f"{found.volume}@{found.base.name} ({found.base.id})" if found.base else "none: all of the snapshot"
    fields = [
        ("snapshot", f"{found.volume}@{found.to.name} ({found.to.id})"),
        ("base", base),
        ("size", format_size(found.to.size)),
        ("taken", format_time(found.created)),
        ("covers", f"{format_size(found.bytes)} in {plural(found.extents, 'extent')}"),
        ("stream", f"{format_size(found.stream_bytes)} in {plural(found.frames, 'frame')}"),
        ("sha-256", found.digest),
    ]
    if found.start:
        fields.insert(3, ("goes on at", str(found.start)))
    print_fields(fields)
    click.echo()
    rows = [
        (name, str(one.extents), format_size(one.bytes), format_size(one.stored_bytes))
        for name, one in found.encodings.items()
    ]
    columns = [Column("ENCODING"), Column("EXTENTS", right=True), Column("COVERS", right=True)]
    print_table([*columns, Column("STORED", right=True)], rows)


@delta.command("verify")
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@json_option
def verify(file: str, as_json: bool) -> None:
    """Check all of the delta in FILE (- is standard input). Exit code 7 where it is damaged or cut.

    \b
    Example:
      nbdsnap delta verify monday.delta
    """
    try:
        found = _inspect(file, "verifying", unpack=True)
    except DeltaCutError as error:  # for a stream a failure, for a file that should be whole, damage
        raise CorruptionError(str(error), hint="make it again with `nbdsnap send`") from None
    if as_json:
        print_json(found)
    else:
        click.echo(f"ok: {found.volume}@{found.to.name}, {format_size(found.stream_bytes)}, sha-256 {found.digest}")


def _inspect(file: str, what: str, *, unpack: bool) -> DeltaInfo:
    from nbdsnap.operations import Progress
    from nbdsnap.transfer.inspect import inspect
    from nbdsnap.transfer.streams import Source

    try:
        opened = click.open_file(file, "rb")
    except FileNotFoundError:
        raise NotFoundError(f"{file} does not exist") from None
    with opened as stream, progress_bar(what, transfer=True) as show:
        sizes: list[int] = []

        def on_position(position: int) -> None:
            if show is not None:
                show(Progress.model_construct(done=position, total=sizes[0]))

        return inspect(
            Source(stream.fileno()),
            unpack=unpack,
            on_header=lambda header: sizes.append(header.to.size),
            on_position=on_position,
        )
