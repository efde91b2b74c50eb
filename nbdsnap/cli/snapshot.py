"""``nbdsnap snapshot``: create, list, delete, hold, release, priority."""

from __future__ import annotations

from collections.abc import Sequence

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.names import complete_new_snapshot, complete_snapshots, complete_volumes
from nbdsnap.cli.options import Group, dry_run_option, json_option
from nbdsnap.cli.output import Column, format_time, print_json, print_table
from nbdsnap.cli.progress import progress_bar
from nbdsnap.errors import NotFoundError
from nbdsnap.models import SnapshotInfo
from nbdsnap.operations import (
    SNAPSHOT_CREATE,
    SNAPSHOT_DELETE,
    SNAPSHOT_HOLD,
    SNAPSHOT_LIST,
    SNAPSHOT_PRIORITY,
    SNAPSHOT_PRUNE,
    SNAPSHOT_RECLAIM,
    SNAPSHOT_RELEASE,
    Nothing,
    ScheduleRule,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotList,
    SnapshotNames,
    SnapshotPriority,
    SnapshotPrune,
)
from nbdsnap.sizes import format_size


@click.group(cls=Group)
def snapshot() -> None:
    """Take, list and delete snapshots.

    \b
    Example:
      nbdsnap snapshot create vol@monday
    """


@snapshot.command("create")
@click.argument("names", metavar="VOLUME@NAME...", nargs=-1, required=True, shell_complete=complete_new_snapshot)
@json_option
@pass_context
def create(context: Context, names: tuple[str, ...], as_json: bool) -> None:
    """Take snapshots: all of them or none, all at one instant.

    \b
    Example:
      nbdsnap snapshot create database@monday logs@monday
    """
    taken = context.call(SNAPSHOT_CREATE, SnapshotCreate(names=list(names)))
    if as_json:
        print_json(taken, list[SnapshotInfo])
    else:
        for one in taken:
            click.echo(f"{one.volume}@{one.name}")


@snapshot.command("list")
@click.argument("volume", required=False, shell_complete=complete_volumes)
@json_option
@pass_context
def list_(context: Context, volume: str | None, as_json: bool) -> None:
    """List the snapshots of VOLUME, or of all volumes, oldest first.

    EXCLUSIVE is what deleting the snapshot gives back; SHARED is what other snapshots need, too.

    \b
    Example:
      nbdsnap snapshot list vol
    """
    snapshots = context.call(SNAPSHOT_LIST, SnapshotList(volume=volume))
    if as_json:
        print_json(snapshots, list[SnapshotInfo])
    else:
        print_snapshots(snapshots)


def print_snapshots(snapshots: Sequence[SnapshotInfo]) -> None:
    columns = [
        Column("NAME"),
        Column("CREATED"),
        Column("SIZE", right=True),
        Column("EXCLUSIVE", right=True),
        Column("SHARED", right=True),
        Column("PRIORITY", right=True),
        Column("CLIENTS", right=True),
    ]
    cloned = any(one.clones for one in snapshots)
    if cloned:
        columns.append(Column("CLONES"))
    broken = any(one.problem for one in snapshots)
    if broken:
        columns.append(Column("PROBLEM"))
    rows = []
    for one in snapshots:
        row = [
            f"{one.volume}@{one.name}",
            format_time(one.created),
            format_size(one.size),
            format_size(one.exclusive_bytes),
            format_size(one.shared_bytes),
            f"{one.priority}, held" if one.held else str(one.priority),
            str(one.connections),
        ]
        if cloned:
            row.append(", ".join(one.clones))
        rows.append([*row, one.problem or ""] if broken else row)
    print_table(columns, rows)


@snapshot.command("delete")
@click.argument("names", metavar="VOLUME@NAME...", nargs=-1, required=True, shell_complete=complete_snapshots)
@click.option("--background", is_flag=True, help="Do not wait until their space is given back.")
@dry_run_option
@json_option
@pass_context
def delete(context: Context, names: tuple[str, ...], background: bool, dry_run: bool, as_json: bool) -> None:
    """Delete snapshots: all of them or none. One that is held, has clones or open connections stays.

    They are gone at once. Their space is given back little by little, so that clients do not notice; Ctrl-C ends only
    the waiting for it.

    \b
    Example:
      nbdsnap snapshot delete vol@monday vol@tuesday --dry-run
    """
    deleted = context.call(SNAPSHOT_DELETE, SnapshotDelete(names=list(names), dry_run=dry_run, wait=False))
    if not (dry_run or background):
        with progress_bar("giving space back") as on_event:
            context.call(SNAPSHOT_RECLAIM, Nothing(), on_event)
    if as_json:
        print_json(deleted)
        return
    for name in deleted.names:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {name}")
    click.echo(f"{'would free' if dry_run else 'freed'} {format_size(deleted.freed_bytes)}")


@snapshot.command("prune")
@click.argument("volumes", metavar="[VOLUME...]", nargs=-1, shell_complete=complete_volumes)
@click.option("--background", is_flag=True, help="Do not wait until their space is given back.")
@dry_run_option
@json_option
@pass_context
def prune(context: Context, volumes: tuple[str, ...], background: bool, dry_run: bool, as_json: bool) -> None:
    """Delete the snapshots that their schedules do not keep any more, of VOLUMES or of all.

    The server does so by itself after each snapshot that it takes by schedule. What is held, open, or the base of a
    clone stays.

    \b
    Example:
      nbdsnap snapshot prune --dry-run
    """
    rules = [
        ScheduleRule(volume=volume.name, label=rule.label, at=rule.at, keep=rule.keep)
        for volume in context.config().volumes
        for rule in volume.snapshots
        if not volumes or volume.name in volumes
    ]
    for volume in volumes:
        if volume not in {rule.volume for rule in rules}:
            raise NotFoundError(
                f"the configuration has no schedule for volume {volume}", hint="it is [[volume]] snapshots = { ... }"
            )
    report = context.call(SNAPSHOT_PRUNE, SnapshotPrune(schedules=rules, dry_run=dry_run))
    if report.names and not (dry_run or background):
        with progress_bar("giving space back") as on_event:
            context.call(SNAPSHOT_RECLAIM, Nothing(), on_event)
    if as_json:
        print_json(report)
        return
    for name in report.names:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {name}")
    for one in report.kept:
        click.echo(f"keeps {one.name}: {one.reason}")
    click.echo(f"{'would free' if dry_run else 'freed'} {format_size(report.freed_bytes)}")


@snapshot.command("hold")
@click.argument("names", metavar="VOLUME@NAME...", nargs=-1, required=True, shell_complete=complete_snapshots)
@json_option
@pass_context
def hold(context: Context, names: tuple[str, ...], as_json: bool) -> None:
    """Keep snapshots from being deleted, and from being dropped when the store is full.

    \b
    Example:
      nbdsnap snapshot hold vol@monday
    """
    held = context.call(SNAPSHOT_HOLD, SnapshotNames(names=list(names)))
    if as_json:
        print_json(held, list[SnapshotInfo])
    else:
        click.echo("".join(f"held {one.volume}@{one.name}\n" for one in held), nl=False)


@snapshot.command("release")
@click.argument("names", metavar="VOLUME@NAME...", nargs=-1, required=True, shell_complete=complete_snapshots)
@json_option
@pass_context
def release(context: Context, names: tuple[str, ...], as_json: bool) -> None:
    """End the hold of snapshots: they can be deleted again.

    \b
    Example:
      nbdsnap snapshot release vol@monday
    """
    released = context.call(SNAPSHOT_RELEASE, SnapshotNames(names=list(names)))
    if as_json:
        print_json(released, list[SnapshotInfo])
    else:
        click.echo("".join(f"released {one.volume}@{one.name}\n" for one in released), nl=False)


@snapshot.command("priority", context_settings={"ignore_unknown_options": True})  # so that -5 is a number
@click.argument("name", metavar="VOLUME@NAME", shell_complete=complete_snapshots)
@click.argument("priority", metavar="N", type=click.IntRange(-128, 127))
@json_option
@pass_context
def priority(context: Context, name: str, priority: int, as_json: bool) -> None:
    """Say how much a snapshot matters: from -128 to 127, at first 0.

    Where the configuration says on_full = "drop-snapshots", a full store drops the snapshots of the lowest priority
    first, the oldest of them before the others; those of priority 127 never.

    \b
    Example:
      nbdsnap snapshot priority vol@monday -10
    """
    changed = context.call(SNAPSHOT_PRIORITY, SnapshotPriority(name=name, priority=priority))
    if as_json:
        print_json(changed)
    else:
        click.echo(f"{changed.volume}@{changed.name}: priority {changed.priority}")
