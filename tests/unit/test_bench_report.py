"""The benchmark's report: what the numbers become, within 100 columns, in JSON and as a chart."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import chart, report
from benchmarks.cells import CELLS
from benchmarks.clients import Outcome
from benchmarks.peers import all_peers
from benchmarks.runner import Run, Runner, Settings

CELL = "live/randread-4k-d64"


def run(contender: str, number: int, iops: float, cell: str = CELL, error: str | None = None) -> Run:
    if error is not None:
        return Run(cell, contender, number, error=error)
    outcome = Outcome(operations=int(iops), bytes=int(iops) * 4096, seconds=1.0, p50_us=12.5, p99_us=1234.5)
    return Run(cell, contender, number, outcome, cpu_s=0.5, memory_bytes=50 << 20)


def two_rounds() -> list[Run]:
    return [
        run("nbdsnap", 0, 180_000),
        run("nbdkit", 0, 90_000),
        run("qemu", 0, 100_000),
        run("nbdsnap", 1, 30_000),
        run("nbdkit", 1, 10_000),
        run("qemu", 1, 0, error="it fell over"),
    ]


def line(summary: report.Summary, contender: str) -> report.Line:
    return next(found for found in summary.lines if found.contender == contender)


def test_summary_compares_round_by_round() -> None:
    (summary,) = report.summarise(two_rounds())
    kit = line(summary, "nbdkit")
    assert kit.ratio is not None
    assert (kit.ratio.median, kit.ratio.low, kit.ratio.high, kit.ratio.rounds) == (2.5, 2.0, 3.0, 2)
    assert kit.met is True
    assert kit.cpu_us == pytest.approx((0.5 / 90_000 + 0.5 / 10_000) / 2 * 1e6)
    assert line(summary, "nbdsnap").ratio is None


def test_summary_keeps_failures_and_judges_by_the_rounds_that_are_left() -> None:
    summaries = report.summarise(two_rounds())
    qemu = line(summaries[0], "qemu")
    assert qemu.errors == ("it fell over",)
    assert qemu.ratio is not None
    assert (qemu.ratio.median, qemu.ratio.rounds, qemu.met) == (1.8, 1, False)
    assert report.failures(summaries) == [f"{CELL}, qemu: it fell over"]
    assert report.missed(summaries) == [f"{CELL} against qemu: 1.80, target >=2"]


def test_cell_text_shows_ratio_target_and_failure() -> None:
    (summary,) = report.summarise([*two_rounds(), run("nbd-server", 0, 0, error="no such thing")])
    text = report.cell_text(summary)
    assert "2.50x 2.00-3.00 ok >=1.5" in text
    assert "1.80x 1.80-1.80 MISSED >=2  1 failed" in text
    assert "failed: no such thing" in text


def test_text_fits_100_columns_with_everybody_in_every_cell(tmp_path: Path) -> None:
    runner = Runner(Settings(tmp_path, 1 << 26, 1, 1.0), all_peers())
    runs = [
        run(peer.key, number, 12_345 * (number + 1) ** 3, cell.name, "x" * 300 if peer.key == "qcow2" else None)
        for cell in CELLS
        for number in range(3)
        for peer in runner.contenders(cell)
    ]
    summaries = report.summarise(runs)
    assert len(summaries) == len(CELLS)
    texts = [report.table_text(summaries), *(report.cell_text(summary) for summary in summaries)]
    lines = [text_line for text in texts for text_line in text.splitlines()]
    assert max(map(len, lines)) <= report.WIDTH
    assert not any("more contenders than columns" in text_line for text_line in lines)


def test_table_marks_missed_targets() -> None:
    table = report.table_text(report.summarise(two_rounds()))
    row = next(text_line for text_line in table.splitlines() if text_line.startswith(CELL))
    assert row.split() == [CELL, "105.0k", "2.50", "2.0-3.0", "!1.80", "1.8-1.8"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.0"),
        (9.94, "9.9"),
        (99.96, "100"),
        (9999.4, "9999"),
        (9999.6, "10.0k"),
        (180_000, "180.0k"),
        (1_234_567, "1.23M"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert report.number(value) == text


def test_json_gives_the_same_report_again() -> None:
    runs = two_rounds()
    summaries = report.summarise(runs)
    data = json.loads(json.dumps(report.to_json(runs, summaries, {"rounds": 2})))
    assert report.runs_from_json(data) == runs
    assert data["cells"][0]["contenders"][1]["nbdsnap_ratio"]["median"] == 2.5
    with pytest.raises(ValueError, match="format"):
        report.runs_from_json({**data, "format": 99})


def test_chart_is_well_formed_and_shows_every_ratio() -> None:
    summaries = report.summarise([*two_rounds(), run("<odd & name>", 0, 10)])
    root = ET.fromstring(chart.svg(summaries, caption="a <machine>"))
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "nbdkit: 2.50x (2.00 to 3.00)" in titles
    assert any(title is not None and title.startswith("<odd & name>") for title in titles)


def test_chart_needs_something_to_compare() -> None:
    lonely = [replace(one, contender="nbdkit") for one in two_rounds()[:1]]
    with pytest.raises(ValueError, match="nothing to draw"):
        chart.svg(report.summarise(lonely))
