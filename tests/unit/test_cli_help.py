"""Every command explains itself, with an example that its own parser accepts."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator

import click
import pytest

from nbdsnap import __version__
from nbdsnap.cli.main import cli, run


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from walk(found, (*path, name))


COMMANDS = list(walk(cli, ()))
"""As words after ``nbdsnap``; () is ``nbdsnap`` itself."""


def find(path: tuple[str, ...]) -> click.Command:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    return command


def examples(path: tuple[str, ...]) -> list[str]:
    """The lines below ``Example:`` in a command's help."""
    _, _, text = inspect.cleandoc(find(path).help or "").partition("\b\nExample:\n")
    return [line.strip() for line in text.partition("\n\n")[0].splitlines() if line.strip()]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_an_example(path: tuple[str, ...]) -> None:
    assert examples(path), f"nbdsnap {' '.join(path)} --help shows no example"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_examples_parse(path: tuple[str, ...]) -> None:
    for line in examples(path):
        words = shlex.split(line.partition(" > ")[0])
        assert words[0] == "nbdsnap", line
        if not isinstance(find(path), click.Group):
            assert tuple(words[1:])[: len(path)] == path, line
        parse(words[1:])


def parse(words: list[str]) -> None:
    """As click does it, down to the last subcommand, but run nothing."""
    context = cli.make_context("nbdsnap", list(words))
    command: click.Command = cli
    while isinstance(command, click.Group):
        rest = [*getattr(context, "_protected_args", []), *context.args]  # click 9 has them all in args
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        assert name is not None
        command = found
        context = found.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_is_explained(path: tuple[str, ...]) -> None:
    for parameter in find(path).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"nbdsnap {' '.join(path)} {parameter.opts}"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_commands_that_print_data_have_json(path: tuple[str, ...]) -> None:
    prints_no_data = {"serve", "demo", "completion"}
    command = find(path)
    if not isinstance(command, click.Group) and path[0] not in prints_no_data:
        assert "--json" in {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_commands_that_destroy_have_a_dry_run(path: tuple[str, ...]) -> None:
    if path[-1:] == ("delete",):
        assert "--dry-run" in {option for parameter in find(path).params for option in parameter.opts}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_shown(path: tuple[str, ...], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path, option]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: nbdsnap {' '.join(path)}".rstrip())
    assert "Example:\n    nbdsnap " in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert capsys.readouterr().err.startswith("Usage: nbdsnap")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"nbdsnap {__version__}\n"
