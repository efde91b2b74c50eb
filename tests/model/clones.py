"""Thin volumes, clones, clones of clones and their snapshots against the simplest model of them.

Volumes come and go here; :mod:`tests.model.machine` has fixed ones, and knows the space that each snapshot takes.  What
is known of space here is that nothing is lost: the store holds what the snapshots and the live volumes have, what a
deletion promises is what it gives back, and when all is gone, nothing is left.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from nbdsnap.engine import flatten, preserver, reclaim
from nbdsnap.engine.device import STATE_ZERO, Device, OpKind
from nbdsnap.errors import InUseError, ServerError
from tests.model.image import CHUNK, Image, content
from tests.support.deadline import wait_until
from tests.support.device import flush, read, submit, wait_all, write
from tests.support.targets import Target

MIB = 1 << 20
SIZES = {"origin": 16 * MIB + 100 * 1024 + 1, "thin": 16 * MIB + 37 * CHUNK}
"""One block of the index's chunk sets, and some more; one ends inside a chunk."""

WINDOW = 20 * CHUNK
STARTS = (0, 16 * MIB - WINDOW // 2)
MAX_CLONES = 6
SLICE_CHUNKS = 7


@st.composite
def places(draw: st.DrawFn) -> tuple[int, int]:
    """Offset and length: aligned half of the time."""
    start = draw(st.sampled_from(STARTS))
    inside = draw(st.one_of(st.integers(0, WINDOW // CHUNK - 1).map(lambda c: c * CHUNK), st.integers(0, WINDOW - 1)))
    length = draw(st.one_of(st.integers(1, 4).map(lambda chunks: chunks * CHUNK), st.integers(1, WINDOW)))
    return start + inside, min(length, WINDOW - inside)


@dataclass
class Volume:
    live: Image
    base: str | None = None
    snapshots: dict[str, Image] = field(default_factory=dict)
    """Oldest first."""


class CloneMachine(RuleBasedStateMachine):
    """``target_type`` says where the pool is."""

    target_type: Callable[[Path, Mapping[str, int]], Target]

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        for module in (preserver, reclaim):
            self.patches.setattr(module, "SLICE_CHUNKS", SLICE_CHUNKS)
        self.patches.setattr(flatten, "STEP_CHUNKS", SLICE_CHUNKS)
        self.folder = Path(tempfile.mkdtemp(prefix="nbdsnap-clones-"))
        self.number = 0
        self.volumes = {name: Volume(Image(size)) for name, size in SIZES.items()}
        self.devices: dict[str, Device] = {}

    @initialize()
    def create(self) -> None:
        self.target = self.target_type(self.folder, {"origin": SIZES["origin"]})
        self.target.thin_create("thin", SIZES["thin"])
        for name in SIZES:
            for start in STARTS:
                self._write(name, start, WINDOW - CHUNK)
        self._snapshot(sorted(SIZES))
        self._clone(self._names()[0], f"c{self._next()}")

    # --- the model ---

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _names(self) -> list[str]:
        return [f"{volume}@{name}" for volume, model in self.volumes.items() for name in model.snapshots]

    def _image(self, name: str) -> Image:
        volume, _, snapshot = name.partition("@")
        return self.volumes[volume].snapshots[snapshot] if snapshot else self.volumes[volume].live

    def _bases(self) -> set[str | None]:
        return {model.base for model in self.volumes.values()}

    def _clones(self) -> list[str]:
        return [name for name, model in self.volumes.items() if model.base is not None]

    def _is_base(self, volume: str) -> bool:
        return any(base is not None and base.startswith(f"{volume}@") for base in self._bases())

    def _live(self, name: str) -> Device:
        if name not in self.devices:
            self.devices[name] = self.target.open(name)
        return self.devices[name]

    def _close(self, name: str) -> None:
        if name in self.devices:
            self.target.close(self.devices.pop(name))

    def _draw(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.volumes)))

    # --- changing ---

    def _write(self, name: str, offset: int, length: int, *, now: bool = True, fua: bool = False) -> None:
        number = self._next()
        data = content(0, number, length)
        write(self._live(name), offset, data, now=now, fua=fua)
        self.volumes[name].live.write(offset, data, number)

    @rule(data=st.data(), place=places(), now=st.booleans(), fua=st.booleans(), count=st.integers(1, 3))
    def write(self, data: st.DataObject, place: tuple[int, int], now: bool, fua: bool, count: int) -> None:
        name = self._draw(data)
        for part in range(count):
            self._write(name, place[0], max(1, place[1] - part * 1000), now=now, fua=fua)
        assert read(self._live(name), *place) == self.volumes[name].live.read(*place)

    @rule(data=st.data(), place=places(), kind=st.sampled_from([OpKind.TRIM, OpKind.ZERO]), no_hole=st.booleans())
    def zero(self, data: st.DataObject, place: tuple[int, int], kind: OpKind, no_hole: bool) -> None:
        name = self._draw(data)
        submit(self._live(name), kind, *place, no_hole=no_hole and kind == OpKind.ZERO).wait()
        self.volumes[name].live.zero(*place, self._next())

    @rule(
        data=st.data(),
        start=st.sampled_from(STARTS),
        cuts=st.lists(st.integers(1, WINDOW - 1), min_size=1, max_size=12, unique=True),
        kinds=st.lists(st.sampled_from(list(OpKind)), min_size=13, max_size=13),
    )
    def burst(self, data: st.DataObject, start: int, cuts: list[int], kinds: list[OpKind]) -> None:
        """Many operations at once, whose ranges touch but do not overlap."""
        name = self._draw(data)
        pending = []
        for kind, (low, high) in zip(kinds, pairwise([0, *sorted(cuts), WINDOW]), strict=False):
            offset, length, number = start + low, high - low, self._next()
            if kind == OpKind.WRITE:
                payload = content(0, number, length)
                pending.append(submit(self._live(name), kind, offset, data=payload))
                self.volumes[name].live.write(offset, payload, number)
            elif kind == OpKind.FLUSH:
                pending.append(submit(self._live(name), kind))
            else:
                pending.append(submit(self._live(name), kind, offset, length))
                self.volumes[name].live.zero(offset, length, number)
        wait_all(pending)

    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        flush(self._live(self._draw(data)))

    @rule()
    def restart(self) -> None:
        for name in list(self.devices):
            self._close(name)
        self.target.restart()

    # --- snapshots and clones ---

    @rule(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        self._snapshot(sorted(data.draw(st.sets(st.sampled_from(sorted(self.volumes)), min_size=1))))

    def _snapshot(self, volumes: list[str]) -> None:
        name = f"s{self._next()}"
        self.target.snapshot_create([f"{volume}@{name}" for volume in volumes])
        for volume in volumes:
            self.volumes[volume].snapshots[name] = self.volumes[volume].live.copy()

    def _clone(self, snapshot: str, name: str) -> None:
        self.target.clone(snapshot, name)
        self.volumes[name] = Volume(self._image(snapshot).copy(), snapshot)

    @precondition(lambda self: self._names() and len(self.volumes) < MAX_CLONES + len(SIZES))
    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        self._clone(data.draw(st.sampled_from(self._names())), f"c{self._next()}")

    @precondition(lambda self: self._names())
    @rule(data=st.data())
    def delete_snapshots(self, data: st.DataObject) -> None:
        doomed = data.draw(st.lists(st.sampled_from(self._names()), min_size=1, max_size=3, unique=True))
        before = self.target.status().store.used_bytes
        if self._bases() & set(doomed):
            with pytest.raises(InUseError, match="has clones"):
                self.target.snapshot_delete(doomed)
            return
        promised = self.target.snapshot_delete(doomed, dry_run=True).freed_bytes
        assert self.target.snapshot_delete(doomed).freed_bytes == promised
        self._forget(doomed)
        assert self.target.status().store.used_bytes == before - promised

    def _forget(self, names: list[str]) -> None:
        for text in names:
            volume, _, name = text.partition("@")
            del self.volumes[volume].snapshots[name]

    @precondition(lambda self: self._clones())
    @rule(data=st.data())
    def delete_volume(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._clones()))
        self._close(name)
        if self._is_base(name):
            with pytest.raises(InUseError, match="has clones"):
                self.target.volume_delete(name)
        else:
            self.target.volume_delete(name)
            del self.volumes[name]

    @precondition(lambda self: self._clones())
    @rule(data=st.data())
    def flatten(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._clones()))
        self.target.flatten(name)
        self.volumes[name].base = None
        self._compare(name)

    @precondition(lambda self: self._names())
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(self._names()))
        self.target.rollback(text, force=True)
        volume = self.volumes[text.partition("@")[0]]
        volume.live = self._image(text).copy()
        self._compare(text.partition("@")[0])

    # --- kills ---

    @precondition(lambda self: self.target.can_be_killed())
    @rule(
        data=st.data(),
        delay_ms=st.integers(0, 20),
        kind=st.sampled_from(["clone", "flatten", "delete", "rollback", "nothing"]),
    )
    def kill(self, data: st.DataObject, delay_ms: int, kind: str) -> None:
        """In the middle of a command: it was done, or not at all; and nothing that was acknowledged is lost."""
        new = f"c{self._next()}"
        deletable = [name for name in self._clones() if not self._is_base(name)]
        if kind == "clone" and self._names() and len(self.volumes) < MAX_CLONES + len(SIZES):
            base = data.draw(st.sampled_from(self._names()))
            acknowledged = self._kill_during(lambda: self.target.clone(base, new), delay_ms)
            if acknowledged or self._is_there(new):
                self.volumes[new] = Volume(self._image(base).copy(), base)
        elif kind == "flatten" and self._clones():
            name = data.draw(st.sampled_from(self._clones()))
            acknowledged = self._kill_during(lambda: self.target.flatten(name), delay_ms)
            (flat,) = (one.base is None for one in self.target.status().volumes if one.name == name)
            assert flat or not acknowledged
            if flat:
                self.volumes[name].base = None
        elif kind == "rollback" and self._names():
            text = data.draw(st.sampled_from(self._names()))
            acknowledged = self._kill_during(lambda: self.target.rollback(text, force=True), delay_ms)
            name = text.partition("@")[0]
            model = self.volumes[name]
            if all(read(self._live(name), start, WINDOW) == model.live.read(start, WINDOW) for start in STARTS):
                assert not (acknowledged and model.live.differing(self._image(text)))
                self.target.rollback(text, force=True)
            model.live = self._image(text).copy()
        elif kind == "delete" and deletable:
            name = data.draw(st.sampled_from(deletable))
            self._close(name)
            acknowledged = self._kill_during(lambda: self.target.volume_delete(name), delay_ms)
            there = self._is_there(name)
            assert not (there and acknowledged)
            if not there:
                del self.volumes[name]
            else:  # its snapshots went first, all or none of them
                found = {info.name for info in self.target.snapshot_list() if info.volume == name}
                assert found in (set(), self.volumes[name].snapshots.keys())
                self._forget([f"{name}@{one}" for one in self.volumes[name].snapshots.keys() - found])
        else:
            self._kill_during(lambda: None, 0)
        assert {info.name for info in self.target.status().volumes} == self.volumes.keys()
        wait_until(self._adds_up, "what was begun to be finished")
        for name in self.volumes:
            self._compare(name)

    def _is_there(self, name: str) -> bool:
        return any(info.name == name for info in self.target.status().volumes)

    def _kill_during(self, command: Callable[[], object], delay_ms: int) -> bool:
        """Whether ``command`` was acknowledged before."""
        acknowledged: list[bool] = []

        def run() -> None:
            with contextlib.suppress(ServerError):
                command()
                acknowledged.append(True)

        thread = threading.Thread(target=run)
        thread.start()
        threading.Event().wait(delay_ms / 1000)  # the moment of the kill is what this rule is about
        self.target.kill()
        thread.join()
        for device in self.devices.values():
            device.close()
        self.devices.clear()
        self.target.start()
        return bool(acknowledged)

    # --- looking ---

    def _adds_up(self) -> bool:
        status = self.target.status()
        live = sum(volume.live_bytes or 0 for volume in status.volumes)
        return status.store.used_bytes == live + sum(entry.bytes for entry in status.sharing)

    @rule()
    def accounts(self) -> None:
        assert self._adds_up()
        for volume in self.target.status().volumes:
            model = self.volumes[volume.name]
            assert volume.base == model.base
            assert [info.name for info in volume.snapshots] == list(model.snapshots)
            for info in volume.snapshots:
                clones = [name for name, one in self.volumes.items() if one.base == f"{volume.name}@{info.name}"]
                assert info.clones == sorted(clones)

    @rule(data=st.data(), place=places(), now=st.booleans())
    def read(self, data: st.DataObject, place: tuple[int, int], now: bool) -> None:
        self._compare_range(self._draw(data), *place, now=now)
        if self._names():
            self._compare_range(data.draw(st.sampled_from(self._names())), *place, now=now)

    def _compare(self, name: str) -> None:
        for start in STARTS:
            self._compare_range(name, start, WINDOW)

    def _compare_range(self, name: str, offset: int, length: int, *, now: bool = True) -> None:
        device = self.target.open(name)
        image = self._image(name)
        assert device.size == image.size
        assert read(device, offset, length, now=now) == image.read(offset, length), f"{name} at {offset}"
        position = offset
        for size, flags in device.extents(offset, length):
            if flags & STATE_ZERO:
                assert image.read(position, size) == bytes(size), f"{name}: data in what is said to be zeroes"
            position += size
        assert position == offset + length
        assert sum(size for size, _ in device.depths(offset, length)) == length
        self.target.close(device)

    @precondition(lambda self: self._names())
    @rule(data=st.data())
    def diff(self, data: st.DataObject) -> None:
        older = data.draw(st.sampled_from(self._names()))
        volume, _, name = older.partition("@")
        later = list(self.volumes[volume].snapshots)
        newer = data.draw(st.sampled_from([None, *later[later.index(name) :]]))
        text = None if newer is None else f"{volume}@{newer}"
        found: set[int] = set()
        for extent in self.target.diff(older, text):
            found.update(range(extent.offset // CHUNK, (extent.offset + extent.length + CHUNK - 1) // CHUNK))
        assert self._image(text or volume).differing(self._image(older)) <= found, "a change is missing"

    # --- the end ---

    def teardown(self) -> None:
        try:
            if hasattr(self, "target"):
                self._verify_everything()
        finally:
            if hasattr(self, "target"):
                self.target.abandon()
            self.patches.undo()
            shutil.rmtree(self.folder)

    def _verify_everything(self) -> None:
        for name in [*self.volumes, *self._names()]:
            self._compare(name)
        report = self.target.check()
        assert report.ok, report.problems
        for name in list(self.devices):
            self._close(name)
        while len(self.volumes) > 1:  # clones first, from the middle: what the others share must stay
            free = [name for name in self.volumes if name != "origin" and not self._is_base(name)]
            name = free[len(free) // 2]
            self.target.volume_delete(name)
            del self.volumes[name]
            for other in [*self.volumes, *self._names()]:
                self._compare(other)
        self.target.snapshot_delete(self._names()) if self._names() else None
        assert self.target.status().store.used_bytes == 0
        report = self.target.check()
        assert report.ok, report.problems
        self.target.stop()
        live = self.volumes["origin"].live
        assert self.target.raw("origin").read_bytes() == live.read(0, live.size)
