"""Snapshots by schedule: when, under which names, and which go.  The clock is the test's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdsnap.engine.pool import Pool
from nbdsnap.engine.schedule import Schedule, parse_schedules
from nbdsnap.server.timer import AGAIN, SnapshotTimer
from tests.support.enginepool import make_pool, write_blocks
from tests.unit.conftest import Cli

HOURLY, DAILY, WEEKLY, MONTHLY, YEARLY = parse_schedules(
    {"hourly": 3, "daily": 2, "weekly": 1, "monthly": 1, "yearly": 1}
)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# Times and names


@pytest.mark.parametrize(
    ("schedule", "last", "following"),
    [
        (HOURLY, "2026-11-22 22:00", "2026-11-22 23:00"),
        (DAILY, "2026-11-22 00:00", "2026-11-23 00:00"),
        (WEEKLY, "2026-11-16 00:00", "2026-11-23 00:00"),
        (MONTHLY, "2026-11-01 00:00", "2026-12-01 00:00"),
        (YEARLY, "2026-01-01 00:00", "2027-01-01 00:00"),
        (Schedule("x", "*/15 3 * * *", 1), "2026-11-22 03:45", "2026-11-23 03:00"),
    ],
)
def test_when_it_is_due(schedule: Schedule, last: str, following: str) -> None:
    now = at("2026-11-22 22:00:59")
    assert schedule.last_due(now) == at(last)
    assert schedule.next_due(now) == at(following)


def test_a_moment_is_due_when_it_has_come() -> None:
    due = at("2026-11-22 22:00")
    assert HOURLY.last_due(due) == due
    assert HOURLY.last_due(due - timedelta(microseconds=1)) == due - timedelta(hours=1)
    assert HOURLY.next_due(due) == due + timedelta(hours=1)


def test_names() -> None:
    due = at("2026-11-22 22:00")
    assert HOURLY.name(due) == "hourly-20261122T2200Z"
    assert HOURLY.due_of("hourly-20261122T2200Z") == due
    for other in ("daily-20261122T2200Z", "hourly", "hourly-", "hourly-20261322T2200Z", "xhourly-20261122T2200Z", "a"):
        assert HOURLY.due_of(other) is None
    odd = Schedule("a-b", "0 * * * *", 1)
    assert odd.due_of(odd.name(due)) == due
    assert odd.due_of("b-20261122T2200Z") is None


def test_missed_ones_are_made_up_for_once() -> None:
    since = at("2026-11-20 10:30")
    now = at("2026-11-22 22:10")
    assert HOURLY.missing(now, [], since) == at("2026-11-22 22:00")
    assert HOURLY.missing(now, ["hourly-20261122T2100Z", "mine"], since) == at("2026-11-22 22:00")
    assert HOURLY.missing(now, ["hourly-20261122T2200Z"], since) is None
    assert HOURLY.missing(at("2026-11-20 10:59"), [], since) is None


def test_what_it_does_not_keep() -> None:
    names = [HOURLY.name(at(f"2026-11-22 {hour}:00")) for hour in (20, 18, 22, 21, 19)]
    assert HOURLY.excess([*names, "mine", "daily-20261122T0000Z"]) == [
        "hourly-20261122T1800Z",
        "hourly-20261122T1900Z",
    ]
    assert HOURLY.excess(names[:3]) == []


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"often": 3}, "needs its times"),
        ({"hourly": 0}, "keeps 1 to"),
        ({"hourly": True}, "keeps 1 to"),
        ({"hourly": "24"}, "keeps 1 to"),
        ({"-x": {"at": "0 * * * *", "keep": 1}}, "no label"),
        ({"x": {"at": "0 * * * *"}}, "'at' and 'keep'"),
        ({"x": {"at": "0 * * * *", "keep": 1, "more": 1}}, "'at' and 'keep'"),
        ({"x": {"at": "61 * * * *", "keep": 1}}, "Bad minute"),
        ({"x": {"at": "0 0 31 2 *", "keep": 1}}, "no time"),
        ({"x": {"at": 5, "keep": 1}}, "no string"),
    ],
)
def test_mistakes(value: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_schedules(value)


# The timer


class Clock:
    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = make_pool(tmp_path, ["a", "b"], 1 << 20)
    yield pool
    pool.close()


@pytest.fixture
def clock(pool: Pool) -> Clock:
    """Half past the hour in which the volumes were created."""
    created, _ = pool.snapshot_names("a")
    return Clock(created.replace(minute=59, second=59))


def names(pool: Pool, volume: str) -> list[str]:
    return pool.snapshot_names(volume)[1]


def labels(pool: Pool, volume: str) -> list[str]:
    return [name.rpartition("-")[0] for name in names(pool, volume)]


def test_a_day(pool: Pool, clock: Clock) -> None:
    timer = SnapshotTimer(pool, {"a": [HOURLY, DAILY], "b": [HOURLY], "c": [HOURLY]}, clock)
    assert timer.tick() == HOURLY.next_due(clock.now)
    assert names(pool, "a") == []
    for _ in range(24):
        clock.now = HOURLY.next_due(clock.now)
        timer.tick()
        timer.tick()  # nothing more is due
    assert sorted(labels(pool, "a")) == ["daily", "hourly", "hourly", "hourly"]
    assert labels(pool, "b") == ["hourly"] * 3
    newest = HOURLY.name(clock.now)
    created = {info.volume: info.created for info in pool.snapshot_list() if info.name == newest}
    assert created["a"] == created["b"], "one instant"


def test_restart_after_a_while(pool: Pool, clock: Clock) -> None:
    """One makes up for all that were missed; and what was taken is not taken again."""
    clock.now += timedelta(days=3, minutes=10)
    for _ in range(2):
        SnapshotTimer(pool, {"a": [HOURLY]}, clock).tick()
        assert names(pool, "a") == [HOURLY.name(clock.now.replace(minute=0, second=0))]


def test_one_that_somebody_deletes_is_not_taken_again(pool: Pool, clock: Clock) -> None:
    timer = SnapshotTimer(pool, {"a": [HOURLY]}, clock)
    clock.now += timedelta(minutes=5)
    timer.tick()
    pool.snapshot_delete([f"a@{name}" for name in names(pool, "a")])
    timer.tick()
    assert names(pool, "a") == []


def test_a_clock_that_is_set_back(pool: Pool, clock: Clock) -> None:
    timer = SnapshotTimer(pool, {"a": [HOURLY]}, clock)
    clock.now += timedelta(hours=2)
    timer.tick()
    before = names(pool, "a")
    clock.now -= timedelta(hours=1)
    timer.tick()
    assert names(pool, "a") == before


def test_what_is_in_use_stays(pool: Pool, clock: Clock) -> None:
    timer = SnapshotTimer(pool, {"a": [HOURLY]}, clock)
    for hour in range(6):
        clock.now = HOURLY.next_due(clock.now)
        timer.tick()
        first = names(pool, "a")[0]
        if hour == 0:
            pool.snapshot_hold([f"a@{first}"])
            held = first
        if hour == 1:
            opened = names(pool, "a")[1]
            device = pool.open_device(f"a@{opened}")
    assert names(pool, "a")[:2] == [held, opened]
    assert len(names(pool, "a")) == 5
    report = pool.prune({"a": [HOURLY]}, dry_run=True)
    assert [(one.name, one.reason.rpartition(" ")[2]) for one in report.kept] == [
        (f"a@{held}", "held"),
        (f"a@{opened}", "connections"),
    ]
    device.close()
    pool.snapshot_hold([f"a@{held}"], held=False)
    assert pool.prune({"a": [HOURLY]}).names == [f"a@{held}", f"a@{opened}"]


def test_one_that_fails_is_tried_alone_and_again(pool: Pool, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    volume = pool._volumes["b"]
    timer = SnapshotTimer(pool, {"a": [HOURLY], "b": [HOURLY]}, clock)
    clock.now = HOURLY.next_due(clock.now)
    volume.park()  # type: ignore[attr-defined]
    for _ in range(2):
        assert timer.tick() == clock.now + AGAIN
        assert (len(names(pool, "a")), len(names(pool, "b"))) == (1, 0)
    assert len(caplog.records) == 1, "once is enough"
    volume.unpark()  # type: ignore[attr-defined]
    clock.now += AGAIN
    assert timer.tick() == HOURLY.next_due(clock.now)
    assert names(pool, "b") == names(pool, "a")


def test_the_thread(pool: Pool, clock: Clock) -> None:
    clock.now = HOURLY.next_due(clock.now)
    timer = SnapshotTimer(pool, {"a": [HOURLY]}, clock)
    done = timer._stop
    tick = timer.tick

    def tick_once() -> datetime:
        done.set()
        return tick()

    timer.tick = tick_once  # type: ignore[method-assign]
    timer.start()
    timer._thread.join(10)
    timer.stop()
    assert labels(pool, "a") == ["hourly"]
    SnapshotTimer(pool, {}, clock).stop()


# The command


def test_prune_command(cli: Cli) -> None:
    cli("snapshot", "prune", "vol", code=4)
    with cli.config.open("a") as config:
        config.write(
            f'[[volume]]\nname = "vol"\norigin = "{cli.config.parent}/vol.img"\nsnapshots = {{ hourly = 1 }}\n'
        )
    cli.write("vol", [0])
    old = [f"vol@hourly-20200101T0{hour}00Z" for hour in range(3)]
    for name in old:
        cli("snapshot", "create", name)
        cli.write("vol", [0])
    cli("snapshot", "hold", old[0])
    dry = cli("snapshot", "prune", "--dry-run").lines
    assert dry == [f"would delete {old[1]}", f"keeps {old[0]}: {old[0]} is held", "would free 4KiB"]
    assert cli("snapshot", "prune", "vol", "--json").json == {
        "names": [old[1]],
        "freed_bytes": 4096,
        "kept": [{"name": old[0], "reason": f"{old[0]} is held"}],
    }
    assert [one["name"] for one in cli("snapshot", "list", "--json").json] == [
        name.partition("@")[2] for name in (old[0], old[2])
    ]


def test_prune_of_what_has_no_schedule(pool: Pool) -> None:
    pool.snapshot_create(["a@mine"])
    write_blocks(pool, "a", [0])
    report = pool.prune({"a": [HOURLY], "nix": [HOURLY]})
    assert (report.names, report.kept, report.freed_bytes) == ([], [], 0)
