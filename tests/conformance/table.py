"""The table of cases, read and checked.

A case is data: nothing in ``cases/*.toml`` knows Python.  What its keys and steps mean stands in README.md, and
``steps.py`` carries them out.  Invariants of a table that :func:`load` returned: ids are unique, every key is known, a
case that names several dialects has been expanded into one for each.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

CASES = Path(__file__).parent / "cases"
LEVELS = ("MUST", "SHOULD", "MAY")
STARTS = ("connected", "plain", "hello")
DIALECTS = ("simple", "structured", "extended")
PLAIN_NEEDS = (
    "structured", "extended", "contexts", "writable", "read-only", "second", "byte-granularity", "block-size",
    "tls", "tls=off", "tls=optional", "tls=required",
)  # fmt: skip
"""Beside these there are ``size:EXPRESSION`` and ``flag:NAME``."""


class TableError(Exception):
    """The table itself is wrong."""


@dataclass(frozen=True)
class Case:
    """One row, in one dialect."""

    id: str
    section: str
    """The heading of the protocol document that asks for it."""
    level: str
    says: str
    """What has to be so, in a sentence."""
    steps: tuple[str, ...]
    start: str = "hello"
    """How far the connection has come when the first step runs: one of STARTS, or of DIALECTS: in transmission."""
    needs: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    """Metadata contexts that are selected before transmission."""
    read_only: bool = False
    """It runs on the export that can't be written."""
    file: str = ""


_KEYS = {"id", "section", "level", "says", "steps", "start", "in", "needs", "contexts", "read_only"}


def load(folder: Path = CASES) -> list[Case]:
    """All cases, in the order of the files' names and of their rows."""
    cases = [case for path in sorted(folder.glob("*.toml")) for case in _read(path)]
    ids = [case.id for case in cases]
    for one in ids:
        if ids.count(one) > 1:
            raise TableError(f"two cases are called {one}")
    return cases


def rows(folder: Path = CASES) -> int:
    """Rows of the table, each counted once whatever its dialects."""
    return sum(len(tomllib.loads(path.read_text())["case"]) for path in folder.glob("*.toml"))


def _read(path: Path) -> Iterator[Case]:
    for row in tomllib.loads(path.read_text())["case"]:
        where = f"{path.name}: {row.get('id', row)}"
        if unknown := row.keys() - _KEYS:
            raise TableError(f"{where}: unknown keys {sorted(unknown)}")
        if row["level"] not in LEVELS:
            raise TableError(f"{where}: the level is one of {LEVELS}")
        for need in row.get("needs", ()):
            if need not in PLAIN_NEEDS and not need.startswith(("size:", "flag:")):
                raise TableError(f"{where}: unknown need {need!r}")
        steps = tuple(line.strip() for line in row["steps"].splitlines() if line.strip())
        case = Case(
            row["id"],
            row["section"],
            row["level"],
            row["says"],
            steps,
            row.get("start", "hello"),
            tuple(row.get("needs", ())),
            tuple(row.get("contexts", ())),
            row.get("read_only", False),
            path.stem,
        )
        yield from _expand(case, row.get("in", []), where)


def _expand(case: Case, dialects: list[str], where: str) -> Iterator[Case]:
    if not dialects:
        if case.start not in STARTS:
            raise TableError(f"{where}: start is one of {STARTS}")
        yield _with_needs(case, ())
    for dialect in dialects:
        if dialect not in DIALECTS:
            raise TableError(f"{where}: a dialect is one of {DIALECTS}")
        needs = () if dialect == "simple" else (dialect,)
        name = case.id if len(dialects) == 1 else f"{case.id}[{dialect}]"
        yield _with_needs(replace(case, id=name, start=dialect), needs)


def _with_needs(case: Case, more: tuple[str, ...]) -> Case:
    """What follows from the other keys."""
    if case.contexts:
        more += ("contexts",)
    if case.read_only:
        more += ("read-only",)
    return replace(case, needs=tuple(dict.fromkeys((*case.needs, *more))))
