"""Imports point one way: each package may use those named here, and no others.

Beside the packages of this project, protocol code may use nothing that does I/O or knows the time, and only the server
may know asyncio.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nbdsnap"

BASE = {"errors", "sizes", "models"}

MAY_USE: dict[str, set[str]] = {
    "errors": set(),
    "sizes": set(),
    "models": set(),
    "nbd": BASE,
    "delta": BASE,
    "store": BASE,
    "engine": BASE | {"store"},
    "transfer": BASE | {"engine", "store", "delta"},
    "addresses": set(),
    "config": BASE | {"addresses", "engine.names", "engine.schedule", "store.layout"},
    "operations": BASE | {"engine", "delta", "transfer"},
    "replication": BASE | {"engine", "delta", "transfer", "config", "addresses", "operations"},
    "server": BASE | {"engine", "nbd", "delta", "replication", "addresses", "config", "operations"},
    "client": BASE | {"engine", "config", "operations"},
    "cli": BASE
    | {"engine.names", "delta", "transfer", "replication", "addresses", "config", "operations", "client", "server"},
}
"""From the bottom up.  A module's name in full allows that module only."""

MUST_NOT_USE: dict[str, set[str]] = {
    "nbd": {"asyncio", "socket", "ssl", "time", "threading", "select", "selectors", "os", "uvloop", "random"},
    "delta": {"asyncio", "socket", "ssl", "time", "threading", "select", "selectors", "uvloop", "random"},
    "store": {"asyncio", "socket", "uvloop", "click", "rich"},
    "engine": {"asyncio", "socket", "uvloop", "lmdb", "click", "rich"},
    "transfer": {"asyncio", "uvloop", "lmdb", "click", "rich"},
    "operations": {"asyncio", "socket", "uvloop", "click", "rich"},
    "server": {"lmdb", "click", "rich"},
    "cli": {"asyncio", "uvloop", "lmdb"},
}


def modules() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def imports(path: Path) -> Iterator[str]:
    """Full names of all imported modules, wherever in the file; of ``from x import y``, ``x`` and ``x.y``."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_down(path: Path) -> None:
    package = package_of(path)
    allowed = MAY_USE[package] | {package, "__version__"}
    for name in imports(path):
        if name.startswith("nbdsnap."):
            used = name.removeprefix("nbdsnap.")
            assert any(used == one or used.startswith(f"{one}.") for one in allowed), f"{path} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=str)
def test_nothing_forbidden_is_imported(path: Path) -> None:
    forbidden = MUST_NOT_USE.get(package_of(path), set())
    used = {name.partition(".")[0] for name in imports(path)}
    assert not used & forbidden, f"{path} imports {used & forbidden}"


def test_every_module_says_what_it_is() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse((PACKAGE / path).read_text())), f"{path} has no docstring"
