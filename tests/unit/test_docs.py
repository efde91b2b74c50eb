"""What the documentation says is what the code does."""

from __future__ import annotations

import errno
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from nbdsnap import errors
from nbdsnap.cli.main import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, cli
from nbdsnap.config import AllowConfig, LimitsConfig
from nbdsnap.errors import NbdsnapError
from nbdsnap.operations import OPERATIONS
from nbdsnap.server.control import MAX_REQUEST_BYTES, MAX_STREAMS
from nbdsnap.sizes import parse_size

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXIT_CODES = (ROOT / "docs" / "exit-codes.md").read_text()
SECURITY = (ROOT / "docs" / "security.md").read_text()
CONTROL_API = (ROOT / "docs" / "control-api.md").read_text()


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, less titles and rules."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rules = [index for index, row in enumerate(found) if set("".join(row)) <= {"-", " "}]
    titles = {index - 1 for index in rules}
    return [row for index, row in enumerate(found) if index not in titles and index not in rules]


def tree(cls: type[NbdsnapError]) -> Iterator[type[NbdsnapError]]:
    yield cls
    for sub in cls.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from tree(sub)


def error_row(cls: type[NbdsnapError]) -> list[str]:
    meaning = (inspect.getdoc(cls) or "").rstrip(".")
    meaning = meaning[:1].lower() + meaning[1:]
    return [str(cls.exit_code), f"`{cls.__name__}`", str(cls.http_status), errno.errorcode[cls.nbd_errno], meaning]


def error_table() -> str:
    """The table of docs/exit-codes.md: ``python -c 'from tests.unit.test_docs import *; print(error_table())'``."""
    classes = sorted(tree(NbdsnapError), key=lambda cls: cls.exit_code)  # stable: a class before its own
    return "\n".join(f"| {' | '.join(error_row(cls))} |" for cls in classes)


def test_exit_codes_are_those_of_the_classes() -> None:
    assert error_table() in EXIT_CODES, f"docs/exit-codes.md should hold:\n{error_table()}"


@pytest.mark.parametrize("code", [EXIT_INTERRUPTED, EXIT_BROKEN_PIPE])
def test_exit_codes_of_signals(code: int) -> None:
    assert f"| {code} |" in EXIT_CODES


def test_error_tree_is_drawn_whole() -> None:
    drawn = re.findall(r"^[│├└─ ]*(\w+Error)(?: |$)", inspect.getdoc(errors) or "", re.MULTILINE)
    assert sorted(drawn) == sorted(cls.__name__ for cls in tree(NbdsnapError))


def test_control_api_lists_every_operation() -> None:
    documented = {row[0].strip("`"): row for row in rows(CONTROL_API)}
    assert set(documented) == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        keys = set(re.findall(r"`(\w+)`", documented[name][1]))
        assert keys == {field.alias or key for key, field in operation.request.model_fields.items()}, name
        assert bool(documented[name][3]) == (operation.event is not None), name
        if operation.event is not None:
            assert set(operation.event.model_fields) <= set(re.findall(r"`(\w+)`", documented[name][3])), name


def test_control_api_names_the_limits() -> None:
    assert f"{MAX_REQUEST_BYTES >> 20} MiB long" in CONTROL_API
    assert f"At most {MAX_STREAMS} operations" in CONTROL_API


def test_examples_of_the_control_api_are_json() -> None:
    for line in CONTROL_API.splitlines():
        if line.startswith(("{", "[{")):
            json.loads(line)
        if "-d '" in line:
            json.loads(line.split("'")[1])


def leaves(command: click.Command, path: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from leaves(found, f"{path} {name}".strip())
    else:
        yield path


def test_readme_lists_every_command() -> None:
    listed = "\n".join(row[0] for row in rows(README))
    for path in leaves(cli, ""):
        assert f"`{path}" in listed, f"README.md does not list `{path}`"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_security_names_every_limit_and_its_default() -> None:
    for name, field in LimitsConfig.model_fields.items():
        (row,) = (row for row in rows(SECURITY) if f"`{name}`" in row[0])
        keys = re.findall(r"`(\w+)`", row[0])
        shown = row[1].partition(":")[0].split(", ")[keys.index(name)]
        assert parse_size(shown) == field.default, name


def test_rules_in_the_documentation_are_rules() -> None:
    (block,) = re.findall(r"```toml\n(\[\[allow\]\].*?)```", SECURITY, re.DOTALL)
    rules = [AllowConfig.model_validate(rule) for rule in tomllib.loads(block)["allow"]]
    assert [rule.mode for rule in rules] == ["rw", "ro", "rw"]
