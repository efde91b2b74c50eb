"""What clients notice of a deletion: which answers count, and what is held."""

from __future__ import annotations

from benchmarks.bulkdelete import _row, table, within


def test_answers_within_windows() -> None:
    moments = [10, 20, 30, 40, 50]
    latencies = [5, 4, 3, 2, 1]
    assert within(moments, latencies, [(20, 40)]) == [3, 4]
    assert within(moments, latencies, [(0, 11), (50, 99)]) == [1, 5]
    assert within(moments, latencies, [(60, 99)]) == []


def test_what_is_held() -> None:
    second = 1_000_000_000
    moments = [n * second // 100 for n in range(200)]
    windows = [(0, second)], [(second, 2 * second)]
    same = _row("reads", moments, [1000] * 200, *windows)
    assert same["p99_ratio"] == 1.0
    assert same["quiet"]["per_second"] == 100.0
    assert "held to 3: ok" in table([same])
    slow = _row("writes", moments, [1000] * 100 + [3100] * 100, *windows)
    assert "NOT HELD" in table([slow])
