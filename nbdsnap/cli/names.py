"""Completing names of volumes and snapshots in a shell: from the running server, or the pool where none runs.

Never an error, never a wait: what can't be had at once completes to nothing.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from nbdsnap.cli.context import Context


def complete_volumes(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in _volumes(ctx) if name.startswith(incomplete)]


def complete_new_snapshot(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``VOLUME@``: what follows is the user's to choose."""
    return [CompletionItem(f"{name}@") for name in _volumes(ctx) if f"{name}@".startswith(incomplete)]


def complete_snapshots(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    given = ctx.params.get(param.name or "") or ()
    return [CompletionItem(name) for name in _snapshots(ctx) if name.startswith(incomplete) and name not in given]


def _volumes(ctx: click.Context) -> list[str]:
    from nbdsnap.operations import VOLUME_LIST, Nothing

    try:
        return [one.name for one in _context(ctx).call(VOLUME_LIST, Nothing())]
    except Exception:
        return []


def _snapshots(ctx: click.Context) -> list[str]:
    from nbdsnap.operations import SNAPSHOT_LIST, SnapshotList

    try:
        return [f"{one.volume}@{one.name}" for one in _context(ctx).call(SNAPSHOT_LIST, SnapshotList())]
    except Exception:
        return []


def _context(ctx: click.Context) -> Context:
    config = ctx.find_root().params.get("config")
    return Context(Path(config) if config is not None else None, lock_wait_s=0)
