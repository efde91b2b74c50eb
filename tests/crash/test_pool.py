"""The pool's promises after power cuts, explored; and proof that the exploration would notice each missing sync."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.campaign import Stage, explore_stages, first_stage, next_stage
from tests.crash.explorer import StateId, explore_until_found
from tests.model import profiles

STATES = 250
"""Of each stage, times the profile's scale."""

STAGES = 2

HARMLESS = {
    "engine.pool.snapshot_create": "syncs early what the snapshot itself syncs again, while writes go on",
    "store.intentlog._create": "nothing is in the log yet; what comes is synced with its header",
    "store.intentlog._make_ring": "likewise",
    "store.intentlog.close": "a log that is not known to be empty is read, and found empty",
}
"""Syncs whose loss breaks no promise, each with its reason."""

NEEDED = {
    "durable write pool/index.mdb",
    "durable write pool/index.mdb.new",
    "engine.pool._take",
    "engine.pool.close",
    "engine.preservation._preserve",
    "engine.preserver._settle",
    "engine.preserver.sync_log",
    "engine.recovery._apply",
    "engine.sync._run",
    "store.intentlog.begin_life",
    "store.intentlog.retire",
    "store.origin.create_origin",
    "sync new.img",
    "sync old.img",
    "sync pool/index.mdb",
    "sync pool/index.mdb.new",
    "sync-directory .",
    "sync-directory pool",
}

MAX_STAGES = 12
"""Runs in which to look for a moment where a missing sync shows: some need a coincidence."""

SEARCH_ROUNDS = (60, 240)


@pytest.mark.parametrize("seed", [profiles.seed(), profiles.seed() + 1])
def test_power_cuts(seed: int) -> None:
    report, _ = explore_stages(STAGES, seed, STATES * profiles.scale())
    assert not report.violations, str(report)


def test_each_sync_left_out_is_found() -> None:
    unnoticed = set(NEEDED)
    for stage in _stages():
        syncs = stage.recording.syncs().keys()
        assert syncs <= NEEDED | HARMLESS.keys(), "a new sync has to be looked at: is its loss noticed?"
        unnoticed -= {name for name in unnoticed & syncs if _is_noticed(stage, name)}
        if not unnoticed:
            return
    raise AssertionError(f"without these, nothing goes wrong: {sorted(unnoticed)}")


def _stages() -> Iterator[Stage]:
    """Runs on new disks, each followed by one on what was left when its process was killed."""
    for seed in range(1, 1 + MAX_STAGES // 2):
        stage = first_stage(seed)
        yield stage
        points = stage.recording.points()
        yield next_stage(stage, StateId(points[len(points) * 2 // 5], "kept", 0))


def _is_noticed(stage: Stage, name: str) -> bool:
    report = explore_until_found(
        stage.recording, stage.make_verify, seed=1, drop=lambda operation: operation.name == name, rounds=SEARCH_ROUNDS
    )
    return bool(report.violations)
