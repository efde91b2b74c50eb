"""docs/nbd.md is a checklist: every row names tests that exist, and all that the protocol code knows is in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from nbdsnap.errors import NbdsnapError
from nbdsnap.nbd import constants
from tests.conformance.table import load
from tests.unit.test_docs import ROOT, rows, tree

PAGE = (ROOT / "docs" / "nbd.md").read_text()
CASES = {case.id.partition("[")[0] for case in load()}


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def exists(name: str) -> bool:
    file, _, function = name.partition("::")
    if not file.endswith(".py"):
        return name in CASES
    found = list((ROOT / "tests").rglob(file))
    return len(found) == 1 and (not function or function in functions_of(found[0]))


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0].replace("`", ""))
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 3, row
    named = re.findall(r"`([^`]+)`", row[2])
    assert named, f"no test for {row[0]!r}"
    assert not [name for name in named if not exists(name)], row[0]


def test_every_case_of_the_table_belongs_to_a_row() -> None:
    assert sorted(case for case in CASES if f"`{case}`" not in PAGE) == []


def test_every_name_of_the_protocol_code_is_there() -> None:
    names = {name.removeprefix("NBD_") for name in vars(constants) if name.startswith("NBD_")}
    assert sorted(name for name in names if f"`{name}`" not in PAGE) == []


def test_enomem_is_never_sent() -> None:
    """The document asks servers not to."""
    assert constants.NBD_ENOMEM not in {cls.nbd_errno for cls in tree(NbdsnapError)}
