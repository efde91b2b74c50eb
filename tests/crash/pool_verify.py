"""What a pool must be after a power cut, given the marks of its run.

* A server starts on it, as on any pool.
* Flushed data is there, and every byte is one that was written there.
* Every snapshot that was acknowledged exists, unless its deletion was begun; one whose deletion was acknowledged does
  not; several taken at one instant exist all or none.  Each is byte for byte what it was.
* Diffs name every chunk that differs.
* ``check`` with data is clean, and the raw files equal the live volumes.
* It goes on working: writes, snapshots, deletion of everything, with all space given back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nbdsnap.engine.pool import Pool
from tests.crash.explorer import ViolationError
from tests.crash.pool_workload import SIZES, adapt_engine, initial_content, open_pool, origin_path, scenario
from tests.crash.recording import Recording
from tests.support.deadline import wait_until
from tests.support.device import flush, read, write
from tests.support.expectation import Expectation
from tests.support.history import UNFINISHED, HistoryError, content

CHUNK = 4096

GO_ON_SHARE = 0.15
"""Of the states: on those the pool is used after it has been verified."""


Event = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Earlier:
    """What happened to a pool before its power was cut, and it was used again."""

    events: list[Event]
    images: dict[str, bytes]


def until(recording: Recording, time: int, earlier: Earlier | None = None) -> Earlier:
    """A recording up to a cut at ``time``, as the past of the next: its times are before 0."""
    events = [(mark.time, mark.fields) for mark in recording.marks_before(time)]
    images = dict(recording.attachments)
    if earlier is not None:
        events = [*earlier.events, *events]
        images.update(earlier.images)
    begun = {name for _, fields in events if fields["event"] == "create" for name in fields["names"]}
    images = {name: image for name, image in images.items() if name in begun}
    return Earlier([(moment - time, fields) for moment, fields in _without_lost(events)], images)


def _without_lost(events: list[Event]) -> list[Event]:
    """The events without the acknowledgements of what was not durable: the cut has taken that, or not."""
    done = {fields["number"]: moment for moment, fields in events if fields["event"] == "done"}
    flushes = [
        (moment, fields["volume"])
        for moment, fields in events
        if fields["event"] == "flush" and fields["number"] in done
    ]
    durable = {
        fields["number"]
        for _, fields in events
        if fields["event"] == "change" and fields["number"] in done
        if fields["fua"] or any(begin > done[fields["number"]] for begin, of in flushes if of == fields["volume"])
    }
    durable |= {fields["number"] for _, fields in events if fields["event"] == "flush"}
    closed = [moment for moment, fields in events if fields["event"] == "closed"]
    last_close = max(closed, default=-UNFINISHED)
    return [
        (moment, fields)
        for moment, fields in events
        if fields["event"] != "done" or fields["number"] in durable or moment < last_close
    ]


class PoolVerifier:
    """Verifies states of one recording; made for :func:`tests.crash.explorer.explore`.

    ``earlier``: what happened to the pool before this recording began, at negative times.
    """

    def __init__(self, recording: Recording, seed: int, earlier: Earlier | None = None) -> None:
        adapt_engine()
        events = [(mark.time, mark.fields) for mark in recording.marks]
        images = dict(recording.attachments)
        if earlier is not None:
            events = [*earlier.events, *events]
            images.update(earlier.images)
        self.expectation = Expectation({name: initial_content(name) for name in SIZES}, events, images, seed)
        self._rng = random.Random(seed)
        self._redirected = scenario(seed) == "redirected"

    def __call__(self, folder: Path, time: int) -> None:
        os.chdir(folder)
        pool = open_pool(redirected=self._redirected)
        try:
            live = self._check_pool(pool, time)
            if self._rng.random() < GO_ON_SHARE:
                live = _go_on(pool)
        finally:
            pool.close()
        if self._redirected:
            live = {"old": initial_content("old")}  # the base's file
        for name, image in live.items():
            if origin_path(name).read_bytes() != image:
                raise ViolationError(f"the raw file of {name} is not what the live volume was")

    def _check_pool(self, pool: Pool, time: int) -> dict[str, bytes]:
        expected = self.expectation
        found = {f"{info.volume}@{info.name}" for info in pool.snapshot_list() if info.volume in SIZES}
        expected.snapshots.check(found, time)
        live = {name: _read_all(pool, name) for name in SIZES}
        for name, image in live.items():
            try:
                expected.volumes[name].check_after_power_cut(image, time)
            except HistoryError as error:
                raise ViolationError(f"volume {name}: {error}") from None
        images = {name: _read_all(pool, name) for name in sorted(found, key=expected.order)}
        for name, image in images.items():
            if name in expected.images and image != expected.images[name]:
                raise ViolationError(f"snapshot {name} has changed: {_first_difference(image, expected.images[name])}")
        _check_diffs(pool, images, live)
        report = pool.check(data=True)
        if not report.ok:
            raise ViolationError(f"check: {report.problems}")
        # a deletion that the cut interrupted goes on beside all this
        wait_until(lambda: _unneeded_bytes(pool) == 0, "the space that no snapshot needs to be given back")
        return live


def _read_all(pool: Pool, name: str) -> bytes:
    device = pool.open_device(name)
    try:
        return read(device, 0, device.size)
    finally:
        device.close()


def _unneeded_bytes(pool: Pool) -> int:
    status = pool.status()
    live = sum(volume.live_bytes or 0 for volume in status.volumes)
    return status.store.used_bytes - live - sum(entry.bytes for entry in status.sharing)


def _first_difference(one: bytes, other: bytes) -> str:
    for start in range(0, len(one), CHUNK):
        if one[start : start + CHUNK] != other[start : start + CHUNK]:
            return f"chunk {start // CHUNK}"
    return "its size"


def _check_diffs(pool: Pool, images: dict[str, bytes], live: dict[str, bytes]) -> None:
    """Between each snapshot and the next of its volume, and the live volume, every difference is named."""
    for volume in SIZES:
        names = [name for name in images if name.partition("@")[0] == volume]
        for older, newer in pairwise([*names, None]):
            assert older is not None
            _check_diff(pool, older, images[older], newer, live[volume] if newer is None else images[newer])


def _check_diff(pool: Pool, older: str, old: bytes, newer: str | None, new: bytes) -> None:
    changed = bytearray(len(new))
    for extent in pool.diff(older, newer):
        changed[extent.offset : extent.offset + extent.length] = b"\1" * extent.length
    for start in range(0, len(new), CHUNK):
        if old[start : start + CHUNK] != new[start : start + CHUNK] and not changed[start]:
            raise ViolationError(f"the diff from {older} to {newer} leaves out chunk {start // CHUNK}")


def _go_on(pool: Pool) -> dict[str, bytes]:
    """Use the pool: it must not only look right."""
    live: dict[str, bytes] = {}
    pool.snapshot_create([f"{name}@after" for name in SIZES])
    for name in SIZES:
        before = _read_all(pool, f"{name}@after")
        device = pool.open_device(name)
        data = content(99, 1, 3 * CHUNK)
        write(device, 1000, data)
        flush(device)
        live[name] = read(device, 0, device.size)
        device.close()
        if live[name] != before[:1000] + data + before[1000 + len(data) :]:
            raise ViolationError(f"a write to {name} after the restart did not land")
        if _read_all(pool, f"{name}@after") != before:
            raise ViolationError(f"a snapshot of {name} taken after the restart has changed")
    pool.snapshot_delete([f"{info.volume}@{info.name}" for info in pool.snapshot_list() if info.volume in SIZES])
    report = pool.check(data=True)
    if not report.ok:
        raise ViolationError(f"check after use: {report.problems}")
    if _unneeded_bytes(pool) or pool.status().sharing:
        raise ViolationError("space is taken, and there are no snapshots")
    return live


def make_verify(recording: Recording, seed: int, earlier: Earlier | None = None) -> Callable[[], PoolVerifier]:
    return lambda: PoolVerifier(recording, seed, earlier)
