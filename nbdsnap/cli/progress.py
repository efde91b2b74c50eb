"""A progress bar for operations that take a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbdsnap.operations import Progress


@contextmanager
def progress_bar(what: str, *, transfer: bool = False) -> Iterator[Callable[[Progress], None] | None]:
    """On standard error, where that is a terminal; gone when all is done.  ``transfer``: of bytes, at a rate."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns: list[bars.ProgressColumn] = [bars.TextColumn(what), bars.BarColumn(), bars.TaskProgressColumn()]
    if transfer:
        columns += [bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn()]
    columns.append(bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda event: bar.update(task, completed=event.done, total=event.total)
