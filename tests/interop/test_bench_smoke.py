"""The benchmarks run: their smallest cells and the smallest scale test, on the real server.  What they measure is not
judged here; that they measure something is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.clients import require_client

ROOT = Path(__file__).parents[2]
SHM = Path("/dev/shm")
TIMEOUT_S = 240.0
CELLS = "live/latency-4k-d1,fresh/randwrite-4k-d32-flush32,fresh/randwrite-4k-d32-wait32"
"""Those that need no other client than the benchmarks' own."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


def run_module(module: str, *words: str | Path, exit_codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    assert done.returncode in exit_codes, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def bench(folder: Path, *words: str) -> dict[str, Any]:
    result = folder / "result.json"
    scale = ["--rounds", "1", "--seconds", "0.2", "--size", "64MiB", "--folder", str(folder / "bench")]
    run_module("benchmarks", *scale, "--json", result, *words)
    data: dict[str, Any] = json.loads(result.read_text())
    return data


def test_smallest_cells_run_on_nbdsnap(tmp_path: Path) -> None:
    data = bench(tmp_path, "--cells", CELLS, "--peers", "nbdsnap")
    runs = {run["cell"]: run for run in data["runs"]}
    assert list(runs) == CELLS.split(",")
    assert all(run["error"] is None and run["outcome"]["operations"] > 0 for run in runs.values())
    assert all(run["memory_bytes"] > 1 << 20 for run in runs.values())
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["origin-64m.img"], "leavings"


def test_earlier_snapshots_are_made_on_demand(tmp_path: Path) -> None:
    data = bench(tmp_path, "--cells", "fresh/randwrite-4k-d32-flush32", "--peers", "nbdsnap", "--snapshots", "20")
    assert [run["error"] for run in data["runs"]] == [None]
    assert data["snapshots"] == 20


def test_a_peer_is_compared_and_drawn(tmp_path: Path) -> None:
    require_client("nbdkit")
    chart = tmp_path / "chart.svg"
    data = bench(tmp_path, "--cells", "live/latency-4k-d1", "--peers", "nbdsnap,nbdkit", "--svg", str(chart))
    ratios = {line["name"]: line["nbdsnap_ratio"] for line in data["cells"][0]["contenders"]}
    assert ratios["nbdsnap"] is None
    assert ratios["nbdkit"]["median"] > 0
    assert chart.read_text().startswith("<svg")
    again = run_module("benchmarks", "--load", tmp_path / "result.json")
    assert "live/latency-4k-d1" in again


def test_list_needs_nothing_installed() -> None:
    listed = run_module("benchmarks", "--list")
    assert "live/randread-4k-d64 " in listed
    assert "qcow2-ext " in listed


def test_a_pattern_that_matches_nothing_is_a_usage_error() -> None:
    run_module("benchmarks", "--cells", "nosuch", exit_codes=(2,))


def test_smallest_scale_test(tmp_path: Path, stack: ExitStack) -> None:
    """Its limits are for an idle machine and a large pool: only what is plainly wrong fails here."""
    result = tmp_path / "scale.json"
    images = Path(stack.enter_context(TemporaryDirectory(dir=SHM if SHM.is_dir() else tmp_path)))
    sizes = ["--chunks", "400", "--snapshots", "20", "--size", "2GiB", "--connections", "70", "--index-chunks", "2000"]
    places = ["--folder", tmp_path / "scale", "--images", images]
    run_module("benchmarks.scale", *sizes, *places, "--json", result, exit_codes=(0, 1))
    data = json.loads(result.read_text())
    assert data["problems"] == []
    assert {row["what"] for row in data["rows"]} >= {"start", "snapshot create", "status", "snapshot list"}
    assert not list(images.iterdir()), "leavings"
