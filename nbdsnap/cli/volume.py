"""``nbdsnap volume``: create, list, show, accept, resize, delete."""

from __future__ import annotations

from pathlib import Path

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.names import complete_volumes
from nbdsnap.cli.options import Group, dry_run_option, json_option, parse_size_option
from nbdsnap.cli.output import Column, format_time, plural, print_fields, print_json, print_table
from nbdsnap.cli.progress import progress_bar
from nbdsnap.cli.snapshot import print_snapshots
from nbdsnap.models import VolumeInfo, VolumeStatus
from nbdsnap.operations import (
    VOLUME_ACCEPT,
    VOLUME_CREATE,
    VOLUME_DELETE,
    VOLUME_DEMOTE,
    VOLUME_FLATTEN,
    VOLUME_LIST,
    VOLUME_PROMOTE,
    VOLUME_RESIZE,
    VOLUME_SHOW,
    Nothing,
    ReplicaOf,
    VolumeAccept,
    VolumeCreate,
    VolumeDelete,
    VolumeFlatten,
    VolumeResize,
    VolumeShow,
)
from nbdsnap.sizes import format_size


@click.group(cls=Group)
def volume() -> None:
    """Add, list and remove volumes.

    \b
    Example:
      nbdsnap volume create vol --origin /srv/images/vol.img --size 10GiB
    """


@volume.command("create")
@click.argument("name")
@click.option(
    "--origin",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="The raw file or block device that holds the live data. It stays yours, and stays a raw image.",
)
@click.option("--thin", is_flag=True, help="No file: zeroes, until something is written; its data is in the pool.")
@click.option(
    "--size",
    metavar="SIZE",
    callback=parse_size_option,
    help="Like 10GiB. With it, a missing file is created, sparse; without, the size is what is found.",
)
@json_option
@pass_context
def create(context: Context, name: str, origin: Path | None, thin: bool, size: int | None, as_json: bool) -> None:
    """Add the volume NAME over a raw file or block device, which is adopted as it is; or a thin one.

    A thin volume takes the space in the pool that was written to it, and gives it back when that is trimmed.

    \b
    Example:
      nbdsnap volume create vol --origin /srv/images/vol.img --size 10GiB
      nbdsnap volume create scratch --thin --size 1TiB
    """
    if thin == (origin is not None):
        raise click.UsageError("give either --origin or --thin")
    if thin and size is None:
        raise click.UsageError("--thin needs --size")
    path = None if origin is None else origin.absolute()
    created = context.call(VOLUME_CREATE, VolumeCreate(name=name, origin=path, size=size, thin=thin))
    if as_json:
        print_json(created)
    else:
        click.echo(f"{created.name}: {format_size(created.size)} {_where(created)}")


def _where(shown: VolumeInfo | VolumeStatus) -> str:
    """Where the live data is."""
    if shown.base is not None:
        return f"in the pool, over {shown.base}"
    return "in the pool" if shown.origin is None else f"on {shown.origin}"


@volume.command("list")
@json_option
@pass_context
def list_(context: Context, as_json: bool) -> None:
    """List the volumes.

    \b
    Example:
      nbdsnap volume list --json
    """
    volumes = context.call(VOLUME_LIST, Nothing())
    if as_json:
        print_json(volumes, list[VolumeInfo])
    else:
        print_volumes(volumes)


def print_volumes(volumes: list[VolumeInfo]) -> None:
    columns = [
        Column("NAME"),
        Column("KIND"),
        Column("SIZE", right=True),
        Column("SNAPSHOTS", right=True),
        Column("CLIENTS", right=True),
        Column("ORIGIN"),
    ]
    broken = any(one.error for one in volumes)
    if broken:
        columns.append(Column("PROBLEM"))
    rows = []
    for one in volumes:
        row = [one.name, one.kind, format_size(one.size), str(one.snapshots), str(one.connections)]
        row.append(one.origin or (f"over {one.base}" if one.base else ""))
        rows.append([*row, one.error or ""] if broken else row)
    print_table(columns, rows)


@volume.command("show")
@click.argument("name", shell_complete=complete_volumes)
@json_option
@pass_context
def show(context: Context, name: str, as_json: bool) -> None:
    """Show the volume NAME and its snapshots.

    \b
    Example:
      nbdsnap volume show vol
    """
    shown = context.call(VOLUME_SHOW, VolumeShow(name=name))
    if as_json:
        print_json(shown)
        return
    print_fields(_fields(shown))
    if shown.snapshots:
        click.echo()
        print_snapshots(shown.snapshots)


def _fields(shown: VolumeStatus) -> list[tuple[str, str]]:
    fields = [
        ("name", shown.name),
        ("kind", shown.kind),
        ("size", f"{format_size(shown.size)} ({shown.size} bytes)"),
        ("live data", _where(shown)) if shown.origin is None else ("origin", shown.origin),
        ("created", format_time(shown.created)),
        ("clients", str(shown.connections)),
        ("snapshots", str(len(shown.snapshots))),
    ]
    if shown.live_bytes is not None:
        fields.append(("space", f"{format_size(shown.live_bytes)} of live data"))
    if shown.replica:
        fields.append(("replica", "yes: it takes no writes from clients"))
    if shown.receiving is not None:
        fields.append(("receiving", shown.receiving))
    return [*fields, ("problem", shown.error)] if shown.error else fields


@volume.command("accept")
@click.argument("name", shell_complete=complete_volumes)
@json_option
@pass_context
def accept(context: Context, name: str, as_json: bool) -> None:
    """Serve the volume NAME although another program has changed its origin.

    A snapshot reads from the origin what was never overwritten through nbdsnap. So the snapshots may have changed with
    it, and are marked for good. Delete those that you do not trust.

    \b
    Example:
      nbdsnap volume accept vol
    """
    accepted = context.call(VOLUME_ACCEPT, VolumeAccept(name=name))
    if as_json:
        print_json(accepted)
        return
    marked = [one for one in accepted.snapshots if one.problem]
    click.echo(f"{name}: accepted; {plural(len(marked), 'snapshot')} may have changed")


@volume.command("flatten")
@click.argument("name", shell_complete=complete_volumes)
@json_option
@pass_context
def flatten(context: Context, name: str, as_json: bool) -> None:
    """Copy what the clone NAME still has from its base, which can be deleted then.

    NAME is a thin volume afterwards, with the same content and snapshots. It may be in use meanwhile. Cut short, it
    stays a clone: the same command goes on.

    \b
    Example:
      nbdsnap volume flatten trial
    """
    with progress_bar("copying") as on_event:
        flat = context.call(VOLUME_FLATTEN, VolumeFlatten(name=name), on_event)
    if as_json:
        print_json(flat)
    else:
        click.echo(f"{flat.name}: {format_size(flat.size)} {_where(flat)}")


@volume.command("resize")
@click.argument("name", shell_complete=complete_volumes)
@click.argument("size", callback=parse_size_option)
@click.option("--shrink", is_flag=True, help="Allow a smaller size: what lies behind it is cut off the live volume.")
@dry_run_option
@json_option
@pass_context
def resize(context: Context, name: str, size: int, shrink: bool, dry_run: bool, as_json: bool) -> None:
    """Give the volume NAME another SIZE, while it is in use. Its snapshots keep theirs.

    A raw file gets the new length; a block device has to be large enough already. New connections see the new size.

    \b
    Example:
      nbdsnap volume resize vol 20GiB
    """
    resized = context.call(VOLUME_RESIZE, VolumeResize(name=name, size=size, shrink=shrink, dry_run=dry_run))
    if as_json:
        print_json(resized)
        return
    click.echo(f"{name} would have {format_size(size)}" if dry_run else f"{name}: {format_size(resized.size)}")
    if resized.connections and not dry_run:
        click.echo(f"{plural(resized.connections, 'client')} opened it with the old size: reconnect to see the new one")


@volume.command("delete")
@click.argument("name", shell_complete=complete_volumes)
@click.option("--snapshots", is_flag=True, help="Delete its snapshots, too; without this they keep the volume.")
@dry_run_option
@json_option
@pass_context
def delete(context: Context, name: str, snapshots: bool, dry_run: bool, as_json: bool) -> None:
    """Make the pool forget the volume NAME. Its raw file or device stays, with its current content.

    The data of a thin volume or clone is in the pool, and is gone with it.

    \b
    Example:
      nbdsnap volume delete vol --snapshots --dry-run
    """
    request = VolumeDelete(name=name, snapshots=snapshots, dry_run=dry_run)
    deleted = context.call(VOLUME_DELETE, request)
    if as_json:
        print_json(deleted)
        return
    what = f"{deleted.name} and {plural(len(deleted.snapshots), 'snapshot')}" if deleted.snapshots else deleted.name
    stays = "" if deleted.origin is None else f"; {deleted.origin} stays"
    click.echo(f"{'would delete' if dry_run else 'deleted'} {what}{stays}")


@volume.command("promote")
@click.argument("name", shell_complete=complete_volumes)
@json_option
@pass_context
def promote(context: Context, name: str, as_json: bool) -> None:
    """Make the replica NAME a volume like any other: it can be written, and follows no more.

    \b
    Example:
      nbdsnap volume promote vol
    """
    promoted = context.call(VOLUME_PROMOTE, ReplicaOf(name=name))
    if as_json:
        print_json(promoted)
    else:
        click.echo(f"{name} can be written: clients that have it open read-only have to connect again")


@volume.command("demote")
@click.argument("name", shell_complete=complete_volumes)
@json_option
@pass_context
def demote(context: Context, name: str, as_json: bool) -> None:
    """Make NAME a replica: it takes no writes, and follows a volume of another server that replicates to it.

    What was written to it since the last snapshot that both have is given up then; take a snapshot first to keep it.

    \b
    Example:
      nbdsnap volume demote vol
    """
    demoted = context.call(VOLUME_DEMOTE, ReplicaOf(name=name))
    if as_json:
        print_json(demoted)
    else:
        click.echo(f"{name} is a replica: it takes no writes from clients")
