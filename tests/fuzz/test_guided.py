"""A little of the coverage-guided fuzzing in each run of the tests: the same inputs each time.

``python -m tests.fuzz.guided --help`` says how to fuzz for hours.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 250

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None and not os.environ.get("CI"), reason="not installed: atheris"
    ),
]


def fuzz(target: str, runs: int, crashes: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.guided", target, "--runs", str(runs), "--seed", "1"]
    command += ["--seconds", str(TIMEOUT_S - 50), "--crashes", str(crashes)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)


@pytest.mark.parametrize(("target", "runs"), [("handshake", 12_000), ("requests", 20_000), ("options", 50_000)])
def test_nothing_is_found(target: str, runs: int, tmp_path: Path) -> None:
    done = fuzz(target, runs, tmp_path)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert done.returncode == 0 and not left, f"{done.stderr[-3000:]}\n{left}"
    assert f"Done {runs} runs" in done.stderr


def test_a_failure_is_found_and_kept(tmp_path: Path) -> None:
    done = fuzz("canary", 1000, tmp_path)
    assert done.returncode != 0 and "a peer is in transmission" in done.stderr + done.stdout
    assert len(list(tmp_path.glob("crash-*"))) == 1
