"""A pool against the simplest model of it: whatever is done, every volume and snapshot reads as the model says.

After each example the pool is checked, the raw files must hold what the live volumes do, and the space taken must be
exactly what the snapshots need.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from nbdsnap.engine import preserver, reclaim
from nbdsnap.engine.device import STATE_HOLE, STATE_ZERO, Device, OpKind
from nbdsnap.errors import AlreadyExistsError, InUseError, ServerError
from tests.model.image import CHUNK, Image, content, shares
from tests.support.deadline import wait_until
from tests.support.device import flush, read, submit, wait_all, write
from tests.support.targets import Target

MIB = 1 << 20
SIZES = {"small": 100 * 1024 + 1, "large": 33 * MIB + 700}
"""One volume ends inside a chunk; the other crosses two blocks of the index's chunk sets, and ends inside a sector."""

WINDOW = 20 * CHUNK
"""Operations fall into windows of this size, so that they meet."""

WINDOWS = {
    "small": [0, SIZES["small"] - WINDOW],
    "large": [0, 16 * MIB - WINDOW // 2, 32 * MIB - WINDOW // 2, SIZES["large"] - WINDOW],
}

SLICE_CHUNKS = 7
"""The engine preserves and reclaims in slices; small ones, so that operations span several."""

lengths = st.one_of(st.integers(1, 4).map(lambda chunks: chunks * CHUNK), st.integers(1, WINDOW))
names = st.sampled_from(sorted(SIZES))


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, int, int]:
    """``(volume, offset, length)``: aligned half of the time."""
    volume = draw(names)
    start = draw(st.sampled_from(WINDOWS[volume]))
    inside = draw(st.one_of(st.integers(0, WINDOW // CHUNK - 1).map(lambda c: c * CHUNK), st.integers(0, WINDOW - 1)))
    length = min(draw(lengths), WINDOW - inside)
    return volume, start + inside, length


@dataclass
class Volume:
    live: Image
    operated: Image
    """The same operations, but zeroing counts as a change even where zeroes were before."""
    snapshots: dict[str, tuple[Image, Image]] = field(default_factory=dict)
    """Name -> both images, oldest first."""


class PoolMachine(RuleBasedStateMachine):
    """``target_type`` says where the pool is; ``connections``: to each volume, used in turn."""

    target_type: Callable[[Path, Mapping[str, int]], Target]
    connections = 1

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(preserver, "SLICE_CHUNKS", SLICE_CHUNKS)
        self.patches.setattr(reclaim, "SLICE_CHUNKS", SLICE_CHUNKS)
        self.folder = Path(tempfile.mkdtemp(prefix="nbdsnap-model-"))
        self.number = 0
        self.volumes = {name: Volume(Image(size), Image(size)) for name, size in SIZES.items()}
        self.opened: dict[str, Device] = {}
        self.live: dict[str, list[Device]] = {}

    # --- the pool ---

    @initialize()
    def create(self) -> None:
        self.target = self.target_type(self.folder, SIZES)
        self._open_live()
        for name, starts in WINDOWS.items():  # something to lose, from the first step on
            for start in starts:
                number = self._next()
                data = content(0, number, WINDOW)
                write(self._live(name), start, data)
                self._model_write(name, start, data, number)
        self._snapshot(sorted(SIZES))

    def _open_live(self) -> None:
        self.live = {name: [self.target.open(name) for _ in range(self.connections)] for name in SIZES}

    def _close_all(self) -> None:
        for device in [device for devices in self.live.values() for device in devices] + [*self.opened.values()]:
            self.target.close(device)
        self.live.clear()
        self.opened.clear()

    def _live(self, name: str) -> Device:
        """One of the volume's connections, each in turn."""
        devices = self.live[name]
        return devices[self.number % len(devices)]

    @rule()
    def restart(self) -> None:
        self._close_all()
        self.target.restart()
        self._open_live()

    # --- changing ---

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _model_write(self, name: str, offset: int, data: bytes, number: int) -> None:
        self.volumes[name].live.write(offset, data, number)
        self.volumes[name].operated.write(offset, data, number)

    def _model_zero(self, name: str, offset: int, length: int, number: int) -> None:
        self.volumes[name].live.zero(offset, length, number)
        self.volumes[name].operated.write(offset, bytes(length), number)

    @rule(where=ranges(), now=st.booleans(), fua=st.booleans())
    def write(self, where: tuple[str, int, int], now: bool, fua: bool) -> None:
        name, offset, length = where
        number = self._next()
        data = content(0, number, length)
        write(self._live(name), offset, data, now=now, fua=fua)
        self._model_write(name, offset, data, number)
        assert read(self._live(name), offset, length) == data

    @rule(where=ranges(), now=st.booleans(), count=st.integers(2, 5))
    def write_again(self, where: tuple[str, int, int], now: bool, count: int) -> None:
        """Again and again, each a little shorter, and read back at once."""
        name, offset, length = where
        for part in range(count):
            number = self._next()
            data = content(0, number, max(1, length - part * length // count))
            write(self._live(name), offset, data, now=now)
            self._model_write(name, offset, data, number)
        assert read(self._live(name), offset, length) == self.volumes[name].live.read(offset, length)

    @rule(where=ranges())
    def write_zeroes_as_data(self, where: tuple[str, int, int]) -> None:
        name, offset, length = where
        write(self._live(name), offset, bytes(length))
        self._model_write(name, offset, bytes(length), self._next())

    @rule(where=ranges(), kind=st.sampled_from([OpKind.TRIM, OpKind.ZERO]), no_hole=st.booleans(), fua=st.booleans())
    def zero(self, where: tuple[str, int, int], kind: OpKind, no_hole: bool, fua: bool) -> None:
        name, offset, length = where
        submit(self._live(name), kind, offset, length, fua=fua, no_hole=no_hole and kind == OpKind.ZERO).wait()
        self._model_zero(name, offset, length, self._next())

    @rule(where=ranges())
    def cut_off(self, where: tuple[str, int, int]) -> None:
        """Shrink a volume, and grow it again: zeroes come back, and the snapshots keep what was there."""
        name, offset, length = where
        cut = max(offset, 1)
        self.target.resize(name, cut)
        self._model_zero(name, cut, SIZES[name] - cut, self._next())
        model = self.volumes[name]
        for snapshot in list(model.snapshots)[-1:]:
            self._check_snapshot(name, snapshot, offset, length)
        self.target.resize(name, SIZES[name])
        assert read(self._live(name), offset, length) == model.live.read(offset, length)

    @rule(
        name=names,
        window=st.integers(0, 3),
        cuts=st.lists(st.integers(1, WINDOW - 1), min_size=1, max_size=12, unique=True),
        kinds=st.lists(st.sampled_from(list(OpKind)), min_size=13, max_size=13),
    )
    def burst(self, name: str, window: int, cuts: list[int], kinds: list[OpKind]) -> None:
        """Many operations at once, whose ranges touch but do not overlap."""
        start = WINDOWS[name][window % len(WINDOWS[name])]
        borders = [0, *sorted(cuts), WINDOW]
        pending = []
        for kind, (low, high) in zip(kinds, pairwise(borders), strict=False):
            offset, length = start + low, high - low
            number = self._next()
            if kind == OpKind.WRITE:
                data = content(0, number, length)
                pending.append(submit(self._live(name), kind, offset, data=data))
                self._model_write(name, offset, data, number)
            elif kind == OpKind.FLUSH:
                pending.append(submit(self._live(name), kind))
            else:
                pending.append(submit(self._live(name), kind, offset, length))
                self._model_zero(name, offset, length, number)
        wait_all(pending)

    @rule(name=names)
    def flush(self, name: str) -> None:
        flush(self._live(name))

    # --- snapshots ---

    @rule(volumes=st.sets(names, min_size=1))
    def snapshot(self, volumes: set[str]) -> None:
        self._snapshot(sorted(volumes))

    def _snapshot(self, volumes: list[str]) -> None:
        name = f"s{self._next()}"
        taken = self.target.snapshot_create([f"{volume}@{name}" for volume in volumes])
        assert [(info.volume, info.name) for info in taken] == [(volume, name) for volume in volumes]
        for volume in volumes:
            model = self.volumes[volume]
            model.snapshots[name] = model.live.copy(), model.operated.copy()

    def _names(self) -> list[str]:
        return [f"{volume}@{name}" for volume, model in self.volumes.items() for name in model.snapshots]

    @precondition(lambda self: self._names())
    @rule(data=st.data())
    def snapshot_twice(self, data: st.DataObject) -> None:
        """A taken name is refused, and nothing at all is done."""
        taken = data.draw(st.sampled_from(self._names()))
        others = [f"{volume}@new" for volume in SIZES if volume != taken.partition("@")[0]]
        with pytest.raises(AlreadyExistsError):
            self.target.snapshot_create([*others, taken])

    @precondition(lambda self: self._names())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        doomed = data.draw(st.lists(st.sampled_from(self._names()), min_size=1, max_size=4, unique=True))
        before = self.target.status().store.used_bytes
        if set(doomed) & self.opened.keys():
            with pytest.raises(InUseError):
                self.target.snapshot_delete(doomed)
            assert self.target.status().store.used_bytes == before
            return
        promised = self.target.snapshot_delete(doomed, dry_run=True).freed_bytes
        freed = self.target.snapshot_delete(doomed).freed_bytes
        self._forget(doomed)
        assert promised == freed == before - self.target.status().store.used_bytes

    @precondition(lambda self: self._names())
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        """The live volume is the snapshot again; whoever has it open sees that, and all snapshots stay."""
        text = data.draw(st.sampled_from(self._names()))
        volume, _, name = text.partition("@")
        with pytest.raises(InUseError):
            self.target.rollback(text)
        promised = self.target.rollback(text, dry_run=True)
        before = self.target.status().store.used_bytes
        done = self.target.rollback(text, force=True)
        assert (done.bytes, done.preserved_bytes) == (promised.bytes, promised.preserved_bytes)
        assert self.target.status().store.used_bytes <= before + done.preserved_bytes
        assert self._roll_back_model(volume, name) * CHUNK <= done.bytes + CHUNK
        for start in WINDOWS[volume]:
            assert read(self._live(volume), start, WINDOW) == self.volumes[volume].live.read(start, WINDOW)

    def _roll_back_model(self, volume: str, name: str) -> int:
        """How many chunks differed."""
        model = self.volumes[volume]
        image = model.snapshots[name][0]
        differing = len(model.live.differing(image))
        if name == list(model.snapshots)[-1]:  # nothing differs from it any more, and nothing is kept for it
            model.live, model.operated = (one.copy() for one in model.snapshots[name])
            return differing
        number = self._next()
        for chunk in model.live.touched_since(image):
            offset = chunk * CHUNK
            content = image.read(offset, min(CHUNK, image.size - offset))
            if image.is_zero(chunk):
                self._model_zero(volume, offset, len(content), number)
            else:
                self._model_write(volume, offset, content, number)
        return differing

    @precondition(lambda self: self._names())
    @rule(data=st.data())
    def open_snapshot(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._names()))
        if name not in self.opened:
            self.opened[name] = self.target.open(name)

    @precondition(lambda self: self.opened)
    @rule(data=st.data())
    def close_snapshot(self, data: st.DataObject) -> None:
        self.target.close(self.opened.pop(data.draw(st.sampled_from(sorted(self.opened)))))

    # --- kills ---

    @precondition(lambda self: self.target.can_be_killed() and self._names())
    @rule(data=st.data(), delay_ms=st.integers(0, 25))
    def kill(self, data: st.DataObject, delay_ms: int) -> None:
        """In the middle of a command: it was done, or not at all; and nothing that was acknowledged is lost.

        Where it was not, it is done now: what follows must not depend on the moment.
        """
        closed = [name for name in self._names() if name not in self.opened]
        kinds = ["snapshot", "rollback", "delete"] if closed else ["snapshot", "rollback"]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "snapshot":
            name = f"s{self._next()}"
            group = [f"{volume}@{name}" for volume in SIZES]
            acknowledged = self._kill_during(lambda: self.target.snapshot_create(group), delay_ms)
            if not self._all_or_none(group):
                assert not acknowledged
                self.target.snapshot_create(group)
            for model in self.volumes.values():
                model.snapshots[name] = model.live.copy(), model.operated.copy()
        elif kind == "delete":
            doomed = data.draw(st.lists(st.sampled_from(closed), min_size=1, max_size=4, unique=True))
            acknowledged = self._kill_during(lambda: self.target.snapshot_delete(doomed), delay_ms)
            if self._all_or_none(doomed):
                assert not acknowledged
                self.target.snapshot_delete(doomed)
            self._forget(doomed)
            wait_until(self._has_nothing_unneeded, "the space of deleted snapshots to be given back")
        else:
            volume, _, name = data.draw(st.sampled_from(self._names())).partition("@")
            acknowledged = self._kill_during(lambda: self.target.rollback(f"{volume}@{name}", force=True), delay_ms)
            model = self.volumes[volume]
            found = read(self._live(volume), 0, SIZES[volume])
            if found == model.live.read(0, SIZES[volume]):  # as before, or there is no difference
                assert not (acknowledged and model.live.differing(model.snapshots[name][0]))
                self.target.rollback(f"{volume}@{name}", force=True)
            self._roll_back_model(volume, name)
            assert read(self._live(volume), 0, SIZES[volume]) == model.live.read(0, SIZES[volume])
        assert {f"{info.volume}@{info.name}" for info in self.target.snapshot_list()} == set(self._names())

    def _kill_during(self, command: Callable[[], object], delay_ms: int) -> bool:
        """Whether ``command`` was acknowledged before."""
        acknowledged: list[object] = []

        def run() -> None:
            with contextlib.suppress(ServerError):
                acknowledged.append(command())

        thread = threading.Thread(target=run)
        thread.start()
        threading.Event().wait(delay_ms / 1000)  # the moment of the kill is what this rule is about
        self.target.kill()
        thread.join()
        self.live.clear()
        self.opened.clear()
        self.target.start()
        self._open_live()
        return bool(acknowledged)

    def _all_or_none(self, names: list[str]) -> bool:
        """Whether the snapshots are there."""
        found = {f"{info.volume}@{info.name}" for info in self.target.snapshot_list()} & set(names)
        assert not found or found == set(names)
        return bool(found)

    def _has_nothing_unneeded(self) -> bool:
        status = self.target.status()
        return status.store.used_bytes == sum(entry.bytes for entry in status.sharing)

    # --- looking ---

    def _device(self, name: str) -> tuple[Device, bool]:
        """An opened snapshot, and whether to close it after use."""
        return (self.opened[name], False) if name in self.opened else (self.target.open(name), True)

    @rule(where=ranges(), now=st.booleans(), data=st.data())
    def read(self, where: tuple[str, int, int], now: bool, data: st.DataObject) -> None:
        volume, offset, length = where
        model = self.volumes[volume]
        assert read(self._live(volume), offset, length, now=now) == model.live.read(offset, length)
        if model.snapshots:
            name = data.draw(st.sampled_from(sorted(model.snapshots)))
            self._check_snapshot(volume, name, offset, length, now)

    def _check_snapshot(self, volume: str, name: str, offset: int, length: int, now: bool = True) -> None:
        device, close = self._device(f"{volume}@{name}")
        image = self.volumes[volume].snapshots[name][0]
        assert (device.size, device.read_only) == (image.size, True)
        assert read(device, offset, length, now=now) == image.read(offset, length), f"{volume}@{name}"
        _check_extents(device, image, offset, length)
        _check_depths(device, offset, length)
        if close:
            self.target.close(device)

    @rule(where=ranges())
    def extents(self, where: tuple[str, int, int]) -> None:
        name, offset, length = where
        _check_extents(self._live(name), self.volumes[name].live, offset, length)

    @precondition(lambda self: self._names())
    @rule(data=st.data())
    def diff(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(self._names()))
        volume, _, name = text.partition("@")
        model = self.volumes[volume]
        later = list(model.snapshots)[list(model.snapshots).index(name) :]
        self._check_diff(volume, name, data.draw(st.sampled_from([None, *later])))

    def _check_diff(self, volume: str, older: str, newer: str | None) -> None:
        model = self.volumes[volume]
        old, old_operated = model.snapshots[older]
        new, new_operated = (model.live, model.operated) if newer is None else model.snapshots[newer]
        found = self._diff_chunks(f"{volume}@{older}", None if newer is None else f"{volume}@{newer}", new.size)
        if newer != older:
            name = volume if newer is None else f"{volume}@{newer}"
            assert self._mapped_chunks(name, older, new.size) == found, "the metadata context says something else"
        assert new.differing(old) <= found, "a change is missing"
        assert found <= new_operated.touched_since(old_operated), "a chunk that nobody wrote"

    def _diff_chunks(self, older: str, newer: str | None, size: int) -> set[int]:
        found: set[int] = set()
        end = -1
        for extent in self.target.diff(older, newer):
            assert extent.offset > end, "extents must ascend and not touch"
            assert extent.length > 0
            assert extent.offset % CHUNK == 0
            end = extent.offset + extent.length
            assert end <= size
            assert end == size or end % CHUNK == 0
            found.update(range(extent.offset // CHUNK, (end + CHUNK - 1) // CHUNK))
        return found

    def _mapped_chunks(self, name: str, base: str, size: int) -> set[int]:
        device = self.target.open(name, [base])
        found: set[int] = set()
        offset = 0
        for length, flags in device.changes(base, 0, size):
            assert length > 0
            if flags:
                assert offset % CHUNK == 0
                found.update(range(offset // CHUNK, (offset + length + CHUNK - 1) // CHUNK))
            offset += length
        assert offset == size
        self.target.close(device)
        return found

    @rule()
    def accounts(self) -> None:
        status = self.target.status()
        histogram: Counter[int] = Counter()
        for volume in status.volumes:
            model = self.volumes[volume.name]
            assert [info.name for info in volume.snapshots] == list(model.snapshots)
            needed = shares(model.live, [image for image, _ in model.snapshots.values()])
            for position, info in enumerate(volume.snapshots):
                mine = [sharers for sharers in needed if position in sharers]
                assert info.exclusive_bytes == CHUNK * sum(len(sharers) == 1 for sharers in mine)
                assert info.shared_bytes == CHUNK * sum(len(sharers) > 1 for sharers in mine)
            histogram.update(len(sharers) for sharers in needed)
        assert {entry.shared_by: entry.bytes for entry in status.sharing} == {
            n: c * CHUNK for n, c in histogram.items()
        }
        assert status.store.used_bytes == CHUNK * histogram.total()
        assert status.store.allocated_bytes <= status.store.used_bytes + 64 * 1024, "freed space was not given back"

    # --- the end ---

    def teardown(self) -> None:
        try:
            if self.live:
                self._verify_everything()
        finally:
            if hasattr(self, "target"):
                self.target.abandon()
            self.patches.undo()
            shutil.rmtree(self.folder)

    def _verify_everything(self) -> None:
        self.accounts()
        for volume, model in self.volumes.items():
            for name in model.snapshots:
                for start in WINDOWS[volume]:
                    self._check_snapshot(volume, name, start, WINDOW)
            for older, newer in pairwise([*model.snapshots, None]):
                assert older is not None
                self._check_diff(volume, older, newer)
            whole = read(self._live(volume), 0, SIZES[volume])
            assert whole == model.live.read(0, SIZES[volume])
        report = self.target.check()
        assert report.ok, report.problems
        self._close_all()
        self._delete_everything()
        self.target.stop()
        for volume, model in self.volumes.items():
            assert self.target.raw(volume).read_bytes() == model.live.read(0, SIZES[volume])

    def _delete_everything(self) -> None:
        """One after the other, from the middle: what the others share must stay."""
        while names := self._names():
            doomed = names[len(names) // 2]
            self.target.snapshot_delete([doomed])
            self._forget([doomed])
            self.accounts()
            for volume, model in self.volumes.items():
                for name in model.snapshots:
                    for start in WINDOWS[volume]:
                        self._check_snapshot(volume, name, start, WINDOW)
        report = self.target.check()
        assert report.ok, report.problems

    def _forget(self, names: list[str]) -> None:
        for text in names:
            volume, _, name = text.partition("@")
            del self.volumes[volume].snapshots[name]


def _check_depths(device: Device, offset: int, length: int) -> None:
    """Of a snapshot: a hole is where the other map says so."""
    holes = [(size, not depth) for size, depth in device.depths(offset, length)]
    merged: list[tuple[int, bool]] = []
    for size, hole in holes:
        if merged and merged[-1][1] == hole:
            size += merged.pop()[0]
        merged.append((size, hole))
    assert merged == [(size, bool(flags & STATE_HOLE)) for size, flags in device.extents(offset, length)]


def _check_extents(device: Device, image: Image, offset: int, length: int) -> None:
    extents = device.extents(offset, length)
    assert sum(size for size, _ in extents) == length
    assert all(size > 0 for size, _ in extents)
    assert all(flags != following for (_, flags), (_, following) in pairwise(extents))
    for size, flags in extents:
        assert not flags & ~(STATE_HOLE | STATE_ZERO)
        if flags & STATE_ZERO:
            assert image.read(offset, size) == bytes(size), "data in what is said to be zeroes"
        offset += size
