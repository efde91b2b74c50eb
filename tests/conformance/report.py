"""Runs the table and prints it: one column for each server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.conformance.connection import Failure
from tests.conformance.steps import Outcome, run_case
from tests.conformance.table import LEVELS, Case
from tests.conformance.target import Target


@dataclass
class Column:
    """One server's outcomes, by case."""

    name: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def failures(self, cases: Sequence[Case], level: str) -> int:
        return sum(self.outcomes[case.id].status == "fail" for case in cases if case.level == level)


def run_all(name: str, target: Target, cases: Sequence[Case], revive: Callable[[], None] | None = None) -> Column:
    """``revive``: called after each failure; may start the server again."""
    column = Column(name)
    target.probe()
    for case in cases:
        column.outcomes[case.id] = outcome = run_case(case, target)
        if outcome.status == "fail" and revive is not None:
            revive()
    return column


def cell(case: Case, outcome: Outcome) -> str:
    """What a MAY comes to is an answer, not a failure."""
    if case.level == "MAY":
        return {"pass": "yes", "fail": "no", "n/a": "-"}[outcome.status]
    return {"pass": "ok", "fail": "FAIL", "n/a": "-"}[outcome.status]


def table(cases: Sequence[Case], columns: Sequence[Column], *, reasons: bool = True) -> str:
    """The whole table, the reasons of what failed, and the sums."""
    width = max(len(case.id) for case in cases)
    heads = [max(len(column.name), 4) for column in columns]
    lines = [f"{'case':{width}}  level   " + "  ".join(f"{c.name:{w}}" for c, w in zip(columns, heads, strict=True))]
    section = ""
    for case in cases:
        if case.file != section:
            section = case.file
            lines.append(f"-- {section.partition('-')[2].replace('-', ' ')}")
        cells = [f"{cell(case, c.outcomes[case.id]):{w}}" for c, w in zip(columns, heads, strict=True)]
        lines.append(f"{case.id:{width}}  {case.level:6}  {'  '.join(cells)}".rstrip())
    if reasons:
        lines += _reasons(cases, columns)
    named = "  ".join(f"{c.name:{w}}" for c, w in zip(columns, heads, strict=True))
    lines += ["", f"{'failures':{width + 8}}{named}"]
    for level in LEVELS[:2]:
        sums = [f"{c.failures(cases, level):<{w}}" for c, w in zip(columns, heads, strict=True)]
        count = sum(case.level == level for case in cases)
        lines.append(f"{level:6} of {count:<{width - 4}}    {'  '.join(sums)}".rstrip())
    return "\n".join(lines)


def _reasons(cases: Sequence[Case], columns: Sequence[Column]) -> list[str]:
    lines = []
    for column in columns:
        failed = [case for case in cases if case.level != "MAY" and column.outcomes[case.id].status == "fail"]
        if failed:
            lines += ["", f"{column.name}:"]
        for case in failed:
            lines.append(f"  {case.id} ({case.level}, {case.section}): {case.says}")
            lines.append(f"    {column.outcomes[case.id].detail}")
    return lines


def reachable(target: Target) -> bool:
    """Whether the server still greets."""
    try:
        with target.connect() as one:
            one.hello()
    except Failure:
        return False
    return True
