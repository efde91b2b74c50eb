"""``nbdsnap serve``."""

from __future__ import annotations

from pathlib import Path

import click

from nbdsnap.cli.context import Context, pass_context


@click.command()
@click.option(
    "--config", metavar="FILE", type=click.Path(path_type=Path), help="The configuration, as before the command's name."
)
@click.option(
    "--accept-changed-origin",
    "accepted",
    metavar="VOLUME",
    multiple=True,
    help="Serve it although another program has changed its origin, and mark its snapshots (see `volume accept`).",
)
@pass_context
@click.pass_context
def serve(ctx: click.Context, context: Context, config: Path | None, accepted: tuple[str, ...]) -> None:
    """Serve every volume and snapshot until SIGTERM or SIGINT.

    Creates the pool, and the volumes of the configuration that it lacks. Prints one line that begins with "ready" once
    clients can connect.

    \b
    Example:
      nbdsnap serve --config /etc/nbdsnap/nbdsnap.toml
    """
    from nbdsnap.server.app import run

    ctx.exit(run(Context(config or context.config_path).config(), accepted))
