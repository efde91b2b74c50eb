"""The benchmark's workloads: names that can be chosen, targets that name somebody who takes part."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cells import CELLS, Target, select
from benchmarks.clients import Client, Limits, Load, fio_command, parse_fio
from benchmarks.peers import all_peers
from benchmarks.procs import PeerError
from benchmarks.runner import Runner, Settings

NAMES = ["live/a-d1", "live/a-d1+random", "live/a-d16", "fresh/a-d1"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, NAMES),
        ("live", NAMES[:3]),
        ("fresh,live/a-d16", ["live/a-d16", "fresh/a-d1"]),
        ("live/a-d1", ["live/a-d1"]),
        ("*-d1", ["live/a-d1", "fresh/a-d1"]),
        ("+random", ["live/a-d1+random"]),
        (" fresh  d16 ", ["live/a-d16", "fresh/a-d1"]),
    ],
)
def test_select(patterns: str | None, expected: list[str]) -> None:
    assert select(NAMES, patterns) == expected


def test_select_refuses_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match="'nosuch' matches none of: live/a-d1"):
        select(NAMES, "live,nosuch")


def test_cell_names_are_unique_and_fit_the_table() -> None:
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 32
    assert any(cell.quick for cell in CELLS)


def test_targets_name_contenders_of_their_cell(tmp_path: Path) -> None:
    runner = Runner(Settings(tmp_path, 1 << 26, 1, 1.0), all_peers())
    for cell in CELLS:
        contenders = [peer.key for peer in runner.contenders(cell)]
        assert contenders[0] == "nbdsnap", cell.name
        assert len(contenders) > 1, cell.name
        assert set(cell.targets) <= set(contenders) - {"nbdsnap"}, cell.name


def test_a_volume_forgotten_at_disconnect_takes_no_part_in_second_passes(tmp_path: Path) -> None:
    runner = Runner(Settings(tmp_path, 1 << 26, 1, 1.0), all_peers())
    for cell in CELLS:
        if cell.before:
            assert "nbd-srv-cow" not in [peer.key for peer in runner.contenders(cell)]


def test_target() -> None:
    assert Target(at_least=2.0).met(2.0)
    assert not Target(at_least=2.0).met(1.99)
    assert Target(at_most=1.11).met(1.0)
    assert not Target(at_most=1.11).met(1.2)
    assert [str(Target(at_least=1.5)), str(Target(at_most=1.11))] == [">=1.5", "<=1.11"]


def test_fio_is_told_to_touch_each_block_once(tmp_path: Path) -> None:
    load = Load("randwrite", 4096, 16, connections=4, once=True, flush_every=32)
    command = fio_command("nbd://h/x", load, Limits(1 << 26, 2.0, 5, share=0.5, end_flush=True), tmp_path / "o")
    assert "--norandommap" not in command
    assert "--time_based" not in command
    assert {"--size=16777216", "--offset_increment=16777216", "--io_size=8388608"} <= set(command)
    assert {"--numjobs=4", "--fsync=32", "--end_fsync=1", "--randseed=5", "--runtime=2000ms"} <= set(command)


def test_fio_may_repeat_blocks_where_time_decides(tmp_path: Path) -> None:
    load = Load("randrw", 65536, 16, Client.FIO)
    command = fio_command("nbd://h/x", load, Limits(1 << 26, 0.5, 5), tmp_path / "o")
    assert {"--time_based", "--norandommap", "--size=67108864", "--rwmixread=70"} <= set(command)


def test_fio_report_adds_both_directions_and_takes_the_busier_ones_latency() -> None:
    def side(operations: int, p50: int) -> dict[str, object]:
        centiles = {"percentile": {"50.000000": p50, "99.000000": 2 * p50}}
        return {"total_ios": operations, "io_bytes": operations * 10, "runtime": 500, "clat_ns": centiles}

    idle = {"total_ios": 0, "io_bytes": 0, "runtime": 0, "clat_ns": {}}
    outcome = parse_fio({"jobs": [{"error": 0, "read": side(70, 3000), "write": side(30, 9000), "trim": idle}]})
    assert (outcome.operations, outcome.bytes, outcome.seconds) == (100, 1000, 0.5)
    assert (outcome.p50_us, outcome.p99_us) == (3.0, 6.0)
    with pytest.raises(PeerError, match="fio did nothing"):
        parse_fio({"jobs": [{"error": 0, "read": idle, "write": idle}]})
    with pytest.raises(PeerError, match="error 5"):
        parse_fio({"jobs": [{"error": 5, "read": idle, "write": idle}]})
