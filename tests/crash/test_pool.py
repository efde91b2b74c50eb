"""The pool's promises after power cuts, explored; and proof that the exploration would notice each missing sync."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.campaign import Stage, explore_stages, first_stage, next_stage
from tests.crash.explorer import StateId, explore_until_found
from tests.crash.pool_workload import SCENARIOS, scenario
from tests.model import profiles

STATES = 290
"""Of each stage, times the profile's scale: 5,000 and more in all by default."""

STAGES = 2
WORKERS = 2

HARMLESS = {
    "engine.pool._sync_early": "syncs early what the snapshot itself syncs again, while writes go on",
    "store.intentlog._create: directory": "the pool's folder is synced once more, right after",
    "store.intentlog._create": "nothing is in the log yet; what comes is synced with its header",
    "store.intentlog._make_ring": "likewise",
    "store.intentlog.close": "a log that is not known to be empty is read, and found empty",
    "store.intentlog.renew": "nothing is in the new log yet; what comes is synced with its header",
}
"""Syncs whose loss breaks no promise, each with its reason."""

NEEDED = {
    "durable write pool/index.mdb",
    "durable write pool/index.mdb.new",
    "engine.files._create_index: directory",
    "engine.files.make_entries_durable: directory",
    "engine.pool._take",
    "engine.pool.close",
    "engine.preservation._preserve",
    "engine.redirect._redirect",
    "engine.preserver._settle",
    "engine.preserver.sync_log",
    "engine.recovery._apply",
    "engine.sync._run",
    "store.intentlog.begin_life",
    "store.intentlog.renew: directory",
    "store.intentlog.retire",
    "store.intentlog.save_intents",
    "store.intentlog.save_intents: directory",
    "store.origin.create_origin",
    "store.origin.create_origin: directory",
    "store.stranded.remove: directory",
    "sync new.img",
    "sync old.img",
    "sync pool/index.mdb",
    "sync pool/index.mdb.new",
}

MAX_STAGES = 32
"""Runs in which to look for a moment where a missing sync shows: some need a coincidence."""

SEARCH_ROUNDS = (60, 240)


COVERED = {
    "plain": {"log wrapped"},
    "faults": {"log renewed", "writes stranded", "stranded writes applied"},
    "full": {"snapshots dropped"},
    "redirected": {"log wrapped"},
}


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=SCENARIOS)
def test_power_cuts(number: int) -> None:
    seed = len(SCENARIOS) * profiles.seed() + number
    report, _ = explore_stages(STAGES, seed, STATES * profiles.scale(), WORKERS)
    assert not report.violations, str(report)
    assert report.features >= COVERED[scenario(seed)], f"seed {seed}: {report.features}"


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
