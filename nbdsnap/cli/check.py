"""``nbdsnap check``."""

from __future__ import annotations

import sys

import click

from nbdsnap.cli.context import Context, pass_context
from nbdsnap.cli.options import dry_run_option, json_option
from nbdsnap.cli.output import Column, plural, print_json, print_table
from nbdsnap.cli.progress import progress_bar
from nbdsnap.errors import CorruptionError
from nbdsnap.models import RepairReport
from nbdsnap.operations import CHECK, CheckScope


@click.command()
@click.option("--data", is_flag=True, help="Read all preserved data, too, and verify its checksums.")
@click.option("--repair", is_flag=True, help="Remove what is lost; only while no server runs.")
@dry_run_option
@json_option
@pass_context
@click.pass_context
def check(ctx: click.Context, context: Context, data: bool, repair: bool, dry_run: bool, as_json: bool) -> None:
    """Verify the pool's invariants. Exit code 7 where something is wrong.

    Nothing is changed without --repair. That removes what is provably lost, and nothing else; it prints what it is
    about to do, and with --dry-run does no more than that. Live data is never touched.

    \b
    Example:
      nbdsnap check --data
      nbdsnap check --repair --dry-run
    """
    if repair:
        _repair(context, dry_run, as_json)
        return
    if dry_run:
        raise click.UsageError("--dry-run is for --repair: a check changes nothing", ctx)
    with progress_bar("checking") as on_event:
        report = context.call(CHECK, CheckScope(data=data), on_event, offline=True)
    if as_json:
        print_json(report)
    elif report.ok:
        click.echo("ok")
    else:
        print_table((Column("PROBLEM"), Column("DETAIL")), ((one.kind, one.detail) for one in report.problems))
    if not report.ok:
        click.echo(f"nbdsnap: {plural(len(report.problems), 'problem')} found", err=True)
    ctx.exit(0 if report.ok else CorruptionError.exit_code)


def _repair(context: Context, dry_run: bool, as_json: bool) -> None:
    from nbdsnap.client import repair

    def announce(report: RepairReport) -> None:
        if as_json:
            print_json(report)
        elif report.steps:
            print_table((Column("STEP"), Column("DETAIL")), ((one.kind, one.detail) for one in report.steps))
        else:
            click.echo("there is nothing to repair")
        sys.stdout.flush()

    report = repair(context.config(), announce, dry_run=dry_run)
    if report.done and report.steps:
        click.echo("nbdsnap: repaired; what was damaged stays beside it as *.damaged", err=True)
