"""The command as a process: on a terminal, in a pipe, interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from nbdsnap import __version__
from tests.support.deadline import wait_until
from tests.support.server import NBDSNAP
from tests.support.terminal import Terminal
from tests.unit.conftest import Cli

pytestmark = pytest.mark.slow  # each starts several processes

TIMEOUT_S = 30.0


def command(cli: Cli, *words: str) -> list[str]:
    return [str(NBDSNAP), "--config", str(cli.config), *words]


def test_version() -> None:
    done = subprocess.run([NBDSNAP, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"nbdsnap {__version__}\n", "")


def test_error_on_standard_error(local_cli: Cli) -> None:
    done = subprocess.run(
        command(local_cli, "volume", "show", "nix"), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr == "nbdsnap: there is no volume nix\n  `nbdsnap volume list` shows what there is\n"


# On a terminal


LONG_NAME = "a-rather-long-name-of-a-volume." * 4


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("noun", ["volume", "snapshot"])
def test_tables_fit_the_terminal(local_cli: Cli, tmp_path: Path, width: int, noun: str) -> None:
    local_cli("volume", "create", LONG_NAME, "--origin", tmp_path / "long.img", "--size", "1GiB")
    local_cli("snapshot", "create", f"{LONG_NAME}@monday")
    with Terminal(command(local_cli, noun, "list"), width) as terminal:
        shown = terminal.read_all()
    assert terminal.process.returncode == 0
    assert max(map(len, shown.splitlines())) <= width
    assert {"NAME", "SIZE", "1GiB"} <= set(shown.split())
    assert "…" not in shown  # nothing is cut off


def test_a_terminal_too_narrow_for_the_table_gets_whole_lines(local_cli: Cli) -> None:
    with Terminal(command(local_cli, "volume", "list"), 30) as terminal:
        shown = terminal.read_all()
    assert shown.splitlines()[0] == "NAME  KIND    SIZE  SNAPSHOTS  CLIENTS  ORIGIN"


def test_names_are_no_markup_and_not_colours(local_cli: Cli) -> None:
    with Terminal(command(local_cli, "volume", "list"), environment={"NO_COLOR": "1"}) as terminal:
        terminal.read_all()
    assert "\x1b[3" not in terminal.raw


def test_diff_has_its_sums_on_a_terminal(local_cli: Cli) -> None:
    local_cli("snapshot", "create", "vol@a")
    local_cli.write("vol", [0, 8192])
    with Terminal(command(local_cli, "diff", "vol@a")) as terminal:
        assert terminal.read_all().splitlines()[-1] == "2 ranges, 8KiB"


def test_progress_on_a_terminal(local_cli: Cli) -> None:
    with Terminal(command(local_cli, "check", "--data")) as terminal:
        shown = terminal.read_all()
    assert terminal.process.returncode == 0
    assert "checking" in shown
    assert shown.rstrip().endswith("ok")


# In a pipe


def test_tables_in_a_pipe_are_whole_lines(local_cli: Cli, tmp_path: Path) -> None:
    name = "x" * 128
    local_cli("volume", "create", name, "--origin", tmp_path / "long.img", "--size", "1GiB")
    done = subprocess.run(
        command(local_cli, "volume", "list"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "COLUMNS": "40", "FORCE_COLOR": "1"},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[2].split() == [name, "origin", "1GiB", "0", "0", f"{tmp_path}/long.img"]
    assert "\x1b" not in done.stdout


def fill(cli: Cli) -> None:
    """A diff that is longer than any pipe's buffer."""
    cli("snapshot", "create", "vol@a")
    cli.write("vol", [index * 8192 for index in range(6000)])


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_closed_pipe_is_silent(cli: Cli, form: list[str]) -> None:
    fill(cli)
    with subprocess.Popen(
        command(cli, "diff", "vol@a", *form), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(TIMEOUT_S) == 141


def test_closed_pipe_of_a_short_answer(local_cli: Cli) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(local_cli, "volume", "list"), stdout=writer, stderr=subprocess.PIPE, timeout=TIMEOUT_S
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_full_disk(local_cli: Cli) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command(local_cli, "volume", "list"), stdout=full, stderr=subprocess.PIPE, timeout=TIMEOUT_S
        )
    assert done.returncode == 6
    assert done.stderr == b"nbdsnap: No space left on device\n"


# Ctrl-C


def test_interrupt_while_the_output_is_blocked(cli: Cli) -> None:
    """As with a pager that ignores Ctrl-C: the command must not wait for it."""
    fill(cli)
    reader, writer = os.pipe()
    with subprocess.Popen(command(cli, "diff", "vol@a"), stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        first = os.read(reader, 1)
        assert first
        wait_until(lambda: is_blocked_in_write(process.pid), "the pipe to be full")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(reader)
    cli("volume", "list")  # the pool is free, and well
    assert cli("check").lines == ["ok"]


def is_blocked_in_write(pid: int) -> bool:
    return "pipe_w" in Path(f"/proc/{pid}/wchan").read_text()
