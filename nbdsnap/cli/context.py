"""What every command gets: where its configuration is, and how to run an operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from nbdsnap.config import Config
    from nbdsnap.operations import Operation, Request

Req = TypeVar("Req", bound="Request")
Res = TypeVar("Res")


class Context:
    """``config_path`` is None where neither ``--config`` nor the environment named one.

    ``lock_wait_s``: seconds to wait for a locked pool; None: as long as :mod:`nbdsnap.client` thinks right.
    """

    def __init__(self, config_path: Path | None, lock_wait_s: float | None = None) -> None:
        self.config_path = config_path
        self.lock_wait_s = lock_wait_s

    def config(self) -> Config:
        from nbdsnap.config import DEFAULT_CONFIG, load_config

        return load_config(self.config_path or DEFAULT_CONFIG)

    def call(
        self,
        operation: Operation[Req, Res],
        request: Req,
        on_event: Callable[[Any], None] | None = None,
        *,
        offline: bool = False,
    ) -> Res:
        """Run it on the server, or on the pool where no server runs (``offline``: without opening it)."""
        from nbdsnap.client import connect

        with connect(self.config(), self.lock_wait_s, offline=offline) as client:
            return client.call(operation, request, on_event)


pass_context = click.make_pass_decorator(Context)
