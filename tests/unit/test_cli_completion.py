"""Completion in real shells: what the printed scripts do there."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from nbdsnap.cli.main import run
from tests.support.clients import require_client
from tests.support.server import NBDSNAP
from tests.support.terminal import Terminal
from tests.unit.conftest import Cli

pytestmark = pytest.mark.slow  # each starts several processes

TIMEOUT_S = 30.0

ENVIRONMENT = {**os.environ, "PATH": f"{NBDSNAP.parent}:{os.environ.get('PATH', '')}"}

BASH = """
eval "$(cat)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDBREAKS=$2
_nbdsnap_completion nbdsnap
printf '%s\\n' "${COMPREPLY[@]}"
"""

BASH_BREAKS = " \t\n\"'@><=;|&(:"
"""bash's own COMP_WORDBREAKS."""


@cache
def bash_script() -> str:
    return subprocess.check_output([NBDSNAP, "completion", "bash"], text=True, timeout=TIMEOUT_S)


def in_bash(line: str, breaks: str = BASH_BREAKS) -> list[str]:
    """What bash would put in place of the last word of ``line`` (which begins after the last of ``breaks``)."""
    require_client("bash")
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH, "bash", line, breaks],
        input=bash_script(),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout.split()


@pytest.fixture
def snapshots(local_cli: Cli, tmp_path: Path) -> Cli:
    return with_snapshots(local_cli, tmp_path)


def with_snapshots(cli: Cli, tmp_path: Path) -> Cli:
    cli("volume", "create", "other", "--origin", tmp_path / "other.img", "--size", "4096")
    cli("snapshot", "create", "vol@monday", "other@x")
    cli("snapshot", "create", "vol@tuesday")
    return cli


def test_commands_and_options() -> None:
    assert in_bash("nbdsnap vol") == ["volume"]
    volume = ["create", "list", "show", "accept", "flatten", "resize", "delete", "promote", "demote"]
    assert in_bash("nbdsnap volume ") == volume
    assert "--dry-run" in in_bash("nbdsnap snapshot delete --")
    assert in_bash("nbdsnap completion ") == ["bash", "zsh", "fish"]


def test_names(snapshots: Cli) -> None:
    nbdsnap = f"nbdsnap --config {snapshots.config}"
    assert in_bash(f"{nbdsnap} volume show ") == ["other", "vol"]
    assert in_bash(f"{nbdsnap} volume delete o") == ["other"]
    assert in_bash(f"{nbdsnap} snapshot create v") == ["vol@"]
    assert in_bash(f"{nbdsnap} snapshot delete v") == ["vol@monday", "vol@tuesday"]
    assert in_bash(f"{nbdsnap} snapshot delete vol@monday v") == ["vol@tuesday"]


@pytest.mark.parametrize("breaks", [BASH_BREAKS, " \t\n"])
def test_bash_begins_a_word_at_the_at_sign_or_not(snapshots: Cli, breaks: str) -> None:
    kept = "" if "@" in breaks else "vol"
    line = f"nbdsnap --config {snapshots.config} diff vol@"
    assert in_bash(line, breaks) == [f"{kept}@monday", f"{kept}@tuesday"]
    assert in_bash(f"{line}tu", breaks) == [f"{kept}@tuesday"]


def test_configuration_from_the_environment(snapshots: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "NBDSNAP_CONFIG", str(snapshots.config))
    assert in_bash("nbdsnap volume show ") == ["other", "vol"]


def test_no_pool_completes_to_nothing(tmp_path: Path) -> None:
    assert in_bash(f"nbdsnap --config {tmp_path}/none volume show ") == []


def test_the_tab_key_in_bash(cli: Cli, tmp_path: Path) -> None:
    require_client("bash")
    with_snapshots(cli, tmp_path)
    environment = {"PATH": ENVIRONMENT["PATH"], "PS1": "$ ", "NBDSNAP_CONFIG": str(cli.config)}
    with Terminal(["bash", "--norc", "-i"], 200, environment) as terminal:
        terminal.type('eval "$(nbdsnap completion bash)"; echo lo""aded\n')
        terminal.read_until("loaded")
        terminal.type("nbdsnap diff vol@mo\t")
        terminal.read_until("nbdsnap diff vol@monday ")
        terminal.type("vol@t\t--json\n")
        terminal.read_until('"to": "vol@tuesday"')


@pytest.mark.parametrize(
    ("shell", "variables"),
    [
        ("zsh", {"COMP_WORDS": "nbdsnap diff vol@mo", "COMP_CWORD": "2"}),
        ("fish", {"COMP_WORDS": "nbdsnap diff vol@mo", "COMP_CWORD": "vol@mo"}),
    ],
)
def test_other_shells_ask_and_are_answered(snapshots: Cli, shell: str, variables: dict[str, str]) -> None:
    done = subprocess.run(
        ["nbdsnap"],
        env={
            **ENVIRONMENT,
            **variables,
            "NBDSNAP_CONFIG": str(snapshots.config),
            "_NBDSNAP_COMPLETE": f"{shell}_complete",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert "vol@monday" in done.stdout
    assert "vol@tuesday" not in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_whole(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_NBDSNAP_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (done.returncode, done.stderr) == (0, "")


def test_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err
