"""What the runs say: the summary of each cell, as text within 100 columns and as JSON.

Pure: runs in, text or data out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.cells import CELLS, Cell, Target
from benchmarks.runner import Run
from benchmarks.stats import Spread, ratios, spread

OURS = "nbdsnap"
WIDTH = 100
FORMAT = 1
"""Of the JSON; a reader refuses another one."""

_NAME, _SPEED, _COLUMN = 32, 10, 14


@dataclass(frozen=True)
class Line:
    """One contender in one cell.

    ``ratio``: nbdsnap's speed over this one's, round by round; None for nbdsnap itself, or where one of them failed.
    """

    contender: str
    speed: Spread | None
    p50_us: float | None
    p99_us: float | None
    cpu_us: float | None
    memory_bytes: int | None
    ratio: Spread | None
    target: Target | None
    errors: tuple[str, ...]

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or nothing to judge it by."""
        return None if self.target is None or self.ratio is None else self.target.met(self.ratio.median)


@dataclass(frozen=True)
class Summary:
    cell: Cell
    lines: tuple[Line, ...]


def summarise(runs: Iterable[Run], cells: Sequence[Cell] = CELLS) -> list[Summary]:
    """A summary of each cell that has runs, in the cells' order; contenders in the order of their first runs' names."""
    by_cell: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_cell[run.cell][run.contender].append(run)
    return [_summary(cell, by_cell[cell.name]) for cell in cells if cell.name in by_cell]


def _summary(cell: Cell, contenders: dict[str, list[Run]]) -> Summary:
    ours = _speeds(cell, contenders.get(OURS, []))
    return Summary(cell, tuple(_line(cell, name, runs, ours) for name, runs in contenders.items()))


def _speeds(cell: Cell, runs: list[Run]) -> dict[int, float]:
    return {run.round: run.speed(cell.unit) for run in runs if run.error is None}


def _line(cell: Cell, name: str, runs: list[Run], ours: dict[int, float]) -> Line:
    good = [run for run in runs if run.error is None]
    theirs = _speeds(cell, runs)
    return Line(
        contender=name,
        speed=spread(list(theirs.values())),
        p50_us=_median([run.outcome.p50_us for run in good if run.outcome]),
        p99_us=_median([run.outcome.p99_us for run in good if run.outcome]),
        cpu_us=_median([run.cpu_us for run in good]),
        memory_bytes=max((run.memory_bytes for run in good), default=None),
        ratio=None if name == OURS else spread(ratios(ours, theirs)),
        target=cell.targets.get(name),
        errors=tuple(run.error for run in runs if run.error is not None),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


# --- text ---


def cell_text(summary: Summary) -> str:
    """One cell in full: every contender with its speed, latency, CPU time and the ratio with its range."""
    head = f"{summary.cell.name}  ({summary.cell.describe()})"
    titles = f"  {'':<15}{summary.cell.unit:>8}{'p50 us':>8}{'p99 us':>8}{'CPU/req':>9}{'MiB':>7}  nbdsnap is"
    rows = [_line_text(line) for line in summary.lines]
    return "\n".join([_fit(head), titles, *(_fit(row) for row in rows)])


def _line_text(line: Line) -> str:
    if line.speed is None:
        return f"  {line.contender:<15} failed: {line.errors[0] if line.errors else 'no run'}"
    cells = "".join(
        f"{text:>{width}}"
        for text, width in (
            (number(line.speed.median), 8),
            (number(line.p50_us), 8),
            (number(line.p99_us), 8),
            (number(line.cpu_us), 9),
            (number(None if line.memory_bytes is None else line.memory_bytes / (1 << 20)), 7),
        )
    )
    failed = f"  {len(line.errors)} failed" if line.errors else ""
    return f"  {line.contender:<15}{cells}  {_ratio_text(line)}{failed}".rstrip()


def _ratio_text(line: Line) -> str:
    if line.ratio is None:
        return ""
    text = f"{line.ratio.median:.2f}x {line.ratio.low:.2f}-{line.ratio.high:.2f}"
    if line.target is None:
        return text
    return f"{text} {'ok' if line.met else 'MISSED'} {line.target}"


def table_text(summaries: Sequence[Summary]) -> str:
    """All cells, a table for each set of contenders: our speed, then how many times theirs it is, with the range."""
    blocks: dict[tuple[str, ...], list[Summary]] = {}
    order = list(dict.fromkeys(line.contender for summary in summaries for line in summary.lines))
    for summary in summaries:
        present = {line.contender for line in summary.lines} - {OURS}
        family = tuple(name for name in order if name in present)
        blocks.setdefault(_host(blocks, family), []).append(summary)
    texts = [_block_text(family, members) for family, members in blocks.items()]
    legend = "nbdsnap's speed, then how many times the other's it is: median, range over rounds; ! target missed"
    return "\n\n".join([*texts, _fit(legend)])


def _host(blocks: dict[tuple[str, ...], list[Summary]], family: tuple[str, ...]) -> tuple[str, ...]:
    """The block a cell's contenders fit into: one that has all of them, or a new one."""
    return next((known for known in blocks if set(family) <= set(known)), family)


def _block_text(family: tuple[str, ...], members: list[Summary]) -> str:
    columns = (WIDTH - _NAME - _SPEED) // _COLUMN
    head = f"{'':<{_NAME}}{OURS:>{_SPEED}}" + "".join(f"{name:>{_COLUMN}}" for name in family[:columns])
    rows = [head, *(_row_text(family[:columns], summary) for summary in members)]
    if len(family) > columns:
        rows.append("(more contenders than columns: the JSON has them all)")
    return "\n".join(rows)


def _row_text(family: Sequence[str], summary: Summary) -> str:
    lines = {line.contender: line for line in summary.lines}
    ours = lines.get(OURS)
    speed = number(ours.speed.median) if ours and ours.speed else "-"
    unit = " M/s" if summary.cell.unit == "MiB/s" else ""
    return f"{summary.cell.name:<{_NAME}}{speed + unit:>{_SPEED}}" + "".join(
        f"{_compact(lines.get(name)):>{_COLUMN}}" for name in family
    )


def _compact(line: Line | None) -> str:
    if line is None:
        return ""
    if line.ratio is None:
        return "failed" if line.errors else "-"
    mark = "!" if line.met is False else ""
    ratio = line.ratio
    return f"{mark}{_short(ratio.median, 2)} {_short(ratio.low, 1)}-{_short(ratio.high, 1)}"


def _short(ratio: float, digits: int) -> str:
    """Fewer digits behind the point where there are more before it, so that a column holds it."""
    return f"{ratio:.{digits if ratio < 9.5 else max(0, digits - 1)}f}"


def number(value: float | None) -> str:
    """A number in at most seven characters: three significant digits or all before the point."""
    if value is None:
        return "-"
    if value >= 9999.5:
        return f"{value / 1000:.1f}k" if value < 999_950 else f"{value / 1e6:.2f}M"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def _fit(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def missed(summaries: Iterable[Summary]) -> list[str]:
    """Every target that was not reached, as ``cell against contender: ratio, target``."""
    return [
        f"{summary.cell.name} against {line.contender}: {line.ratio.median:.2f}, target {line.target}"
        for summary in summaries
        for line in summary.lines
        if line.met is False and line.ratio is not None
    ]


def failures(summaries: Iterable[Summary]) -> list[str]:
    return [
        f"{summary.cell.name}, {line.contender}: {error}"
        for summary in summaries
        for line in summary.lines
        for error in line.errors
    ]


# --- JSON ---


def to_json(runs: Sequence[Run], summaries: Sequence[Summary], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **settings,
        "cells": [_summary_json(summary) for summary in summaries],
        "runs": [run.to_json() for run in runs],
    }


def runs_from_json(data: dict[str, Any]) -> list[Run]:
    """The runs of a file that :func:`to_json` made; ValueError where it is something else."""
    if data.get("format") != FORMAT:
        raise ValueError(f"not a benchmark result of format {FORMAT}")
    return [Run.from_json(run) for run in data["runs"]]


def _summary_json(summary: Summary) -> dict[str, Any]:
    return {
        "name": summary.cell.name,
        "what": summary.cell.describe(),
        "unit": summary.cell.unit,
        "contenders": [_line_json(line) for line in summary.lines],
    }


def _line_json(line: Line) -> dict[str, Any]:
    return {
        "name": line.contender,
        "speed": _spread_json(line.speed),
        "p50_us": line.p50_us,
        "p99_us": line.p99_us,
        "cpu_us_per_request": line.cpu_us,
        "memory_bytes": line.memory_bytes,
        "nbdsnap_ratio": _spread_json(line.ratio),
        "target": None if line.target is None else str(line.target),
        "target_met": line.met,
        "errors": list(line.errors),
    }


def _spread_json(value: Spread | None) -> dict[str, float | int] | None:
    if value is None:
        return None
    return {"median": value.median, "low": value.low, "high": value.high, "rounds": value.rounds}
