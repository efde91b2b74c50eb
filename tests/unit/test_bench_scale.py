"""The scale test's judgement: what is held to what."""

from __future__ import annotations

from dataclasses import fields

from benchmarks.report import WIDTH
from benchmarks.scale import TIB, Limit, rows, table
from benchmarks.scaleprobe import Costs


def costs(value: float) -> Costs:
    found = Costs()
    for field in fields(Costs):
        if field.name != "problems":
            setattr(found, field.name, value)
    return found


def test_limit_by_bound() -> None:
    assert Limit(bound=2.0).held(None, 2.0)
    assert not Limit(bound=2.0).held(0.1, 2.1)


def test_limit_beside_the_small_pool() -> None:
    assert Limit(factor=2.0, slack=0.02).held(0.01, 0.04)
    assert not Limit(factor=2.0, slack=0.02).held(0.01, 0.05)
    assert not Limit(factor=2.0).held(None, 0.0), "nothing to compare with"


def test_limit_of_a_speed() -> None:
    assert Limit(at_least=0.7).held(100.0, 70.0)
    assert not Limit(at_least=0.7).held(100.0, 69.0)


def test_a_row_without_a_limit_is_information() -> None:
    assert Limit().held(None, 1e9)


def test_table_names_what_is_not_held_within_100_columns() -> None:
    lines = rows(costs(0.001), costs(5000.0), 16 * TIB, 256)
    text = table(lines).splitlines()
    assert max(map(len, text)) <= WIDTH
    verdicts = {row.what: row.held for row in lines}
    assert not verdicts["snapshot create"]
    assert not verdicts["start"]
    assert verdicts["first overwrites"]
    assert next(line for line in text if line.startswith("snapshot create")).endswith("NOT HELD")
