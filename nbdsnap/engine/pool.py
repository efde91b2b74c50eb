"""The pool: the engine's front door.

A :class:`Pool` owns a folder (under its lock), its volumes and their snapshots.  Its methods are what a user can ask
for, on names as the user types them; the work is done in the modules beside this one.

Threads.  All changes of the index, and of the lists of volumes and snapshots, happen on the preserver's thread, one
after the other.  The lists are changed and read under ``_lock``, which is never held while a disk is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nbdsnap.engine import accounting, files, stamps
from nbdsnap.engine.check import Checker
from nbdsnap.engine.clones import Clones, check_no_clones
from nbdsnap.engine.deletion import KEEP, MIN_PRIORITY, Deletions, Doomed, check_deletable
from nbdsnap.engine.device import Device
from nbdsnap.engine.diff import ChangeMap, changed_blocks, extents
from nbdsnap.engine.hooks import Hooks, at_rest
from nbdsnap.engine.live import LiveDevice
from nbdsnap.engine.lock import PoolLock
from nbdsnap.engine.map import MAX_CELLS, MAX_ROWS, volume_map
from nbdsnap.engine.names import check_name, parse_snapshot_name
from nbdsnap.engine.preserver import Preserver
from nbdsnap.engine.receiving import Arrival, Receive, Receives
from nbdsnap.engine.reclaim import END_OF_EPOCHS
from nbdsnap.engine.records import JsonObject, SnapshotRecord, VolumeRecord, VolumeState, now
from nbdsnap.engine.recovery import recover
from nbdsnap.engine.redirected import RedirectedVolume
from nbdsnap.engine.resize import Resizes
from nbdsnap.engine.rollback import Progress, Rollbacks, find_target
from nbdsnap.engine.schedule import Schedule
from nbdsnap.engine.space import Space
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import (
    AlreadyExistsError,
    InUseError,
    NbdsnapError,
    NotFoundError,
    OriginChangedError,
    OriginError,
    UsageError,
)
from nbdsnap.models import (
    CheckReport,
    Extent,
    KeptSnapshot,
    PoolStatus,
    PruneReport,
    RollbackReport,
    Sharing,
    SnapshotDeletion,
    SnapshotInfo,
    StoreStatus,
    VolumeInfo,
    VolumeMap,
    VolumeStatus,
)
from nbdsnap.sizes import format_size
from nbdsnap.store import pagesums
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.index import IndexWriter, Record
from nbdsnap.store.intentlog import IntentLog
from nbdsnap.store.layout import CHUNK, DEFAULT_LOG_SIZE, INDEX_FILE, LOG_FILE, STORE_FILE
from nbdsnap.store.origin import Origin, check_size, create_origin
from nbdsnap.store.originuse import is_written_elsewhere
from nbdsnap.store.stranded import StrandedIntents

log = logging.getLogger(__name__)

WORKERS = 8
"""Threads for writes and syncs that may wait for a disk."""

CATCH_UP_S = 1.0
"""Seconds that a report waits for acknowledged writes to be accounted for."""


PROGRESS_S = 0.25
"""Seconds between two looks at how much is left to be given back."""

ON_FULL = ("refuse-writes", "drop-snapshots")
WARN_AT = (80, 90)


@dataclass(frozen=True)
class PoolOptions:
    """``store_limit``: bytes that the exception store may take; None: as much as there is.

    ``log_size``: bytes of the intent log.
    ``on_full``: "refuse-writes" or "drop-snapshots" (:mod:`nbdsnap.engine.deletion`), when there is no space left.
    ``warn_at``: percentages of the store's capacity (:mod:`nbdsnap.engine.space`).
    ``hooks``: by volume, what to run before and after its snapshots.
    """

    store_limit: int | None = None
    log_size: int = DEFAULT_LOG_SIZE
    on_full: str = ON_FULL[0]
    warn_at: Sequence[int] = WARN_AT
    hooks: Mapping[str, Hooks] = field(default_factory=dict)


@dataclass(frozen=True)
class Export:
    """Something that a client can open."""

    name: str
    size: int
    read_only: bool
    description: str


class Pool:
    """An opened pool.  Every method but ``exports``, ``find_export`` and ``open_device`` may wait for a disk."""

    def __init__(self, path: Path, options: PoolOptions, io: FileIO) -> None:
        self.path = path
        self._io = io
        self._lock = threading.RLock()
        self._volumes: dict[str, VolumeState] = {}
        self._open_devices = 0
        self.replicator: Any = None
        """The server's, for the operations that ask for it; nothing here uses it."""
        self._hooks = options.hooks
        self._pool_lock = PoolLock(io, path)
        with contextlib.ExitStack() as undo:
            undo.callback(self._pool_lock.release)
            self._index, self._meta = files.open_index(io, path)
            undo.callback(self._index.close)
            with self._index.read() as reader:
                self._store = ChunkStore(io, path / STORE_FILE, reader.slots(), options.store_limit)
            undo.callback(self._store.close)
            self._log = IntentLog(io, path / LOG_FILE, options.log_size)
            undo.callback(self._log.close)
            pagesums.remove_sums(io, path / INDEX_FILE)
            files.make_entries_durable(io, path)
            self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="engine")
            undo.callback(self._workers.shutdown)
            self._stranded = StrandedIntents(io, path)
            self._space = Space(self._store, options.warn_at, options.log_size)
            batch = io.batch()
            if batch is not None:
                undo.callback(batch.close)
            self._preserver = Preserver(self._index, self._store, self._log, self._space, self._stranded, batch)
            self._deletions = Deletions(
                self._lock, self._volumes, self._index, self._store, self._preserver, lambda: self._open_devices > 0
            )
            self._clones = Clones(
                self._lock, self._volumes, self._index, self._store, io, self._preserver, self._workers
            )
            refuses = options.on_full == "refuse-writes"
            self._rollbacks = Rollbacks(
                self._lock, self._index, self._store, self._preserver, self._space, self._workers, refuses=refuses
            )
            self._resizes = Resizes(self._lock, self._index, self._preserver)
            if not refuses:
                self._preserver.preservation.set_make_room(self._deletions.make_room)
            self.receives = Receives(
                self._lock,
                self._index,
                self._preserver,
                self._rollbacks,
                self._deletions,
                self._workers,
                self._open_snapshot,
            )
            self._load()
            undo.pop_all()
        self._preserver.start()
        self.receives.tidy(list(self._volumes.values()))
        self._deletions.resume()
        self._clones.resume()

    @classmethod
    def open(
        cls, path: Path, options: PoolOptions | None = None, *, create: bool = False, io: FileIO | None = None
    ) -> Pool:
        """Open the pool at ``path`` and take its lock.

        Raises NotFoundError where there is none (``create`` makes one), PoolLockedError where another process has it,
        FormatError for another program's folder or a future version, CorruptionError for a damaged index.
        """
        files.prepare_folder(path, create=create)
        return cls(path, options or PoolOptions(), io or FileIO())

    def close(self) -> None:
        """Finish what is under way, make it durable, and give the pool back."""
        self._preserver.stop()
        self._deletions.stop()
        self._workers.shutdown()
        settled: list[Volume] = []
        for volume in self._live_volumes():
            try:
                volume.sync_in_place()
                if not volume.intents:
                    settled.append(volume)
            except (OSError, NbdsnapError) as error:
                log.error("volume %s: its last writes may be lost: %s", volume.name, error)
        try:
            stamps.put_stamps(self._index, settled)
        except (OSError, NbdsnapError) as error:
            log.warning("a change of the origins before the next start will not be noticed: %s", error)
        for volume in self._live_volumes():
            volume.close()
        self._log.close()
        self._store.close()
        self._index.close()
        files.seal_index(self._io, self.path)
        self._pool_lock.release()

    def _load(self) -> None:
        snapshots: dict[int, list[SnapshotRecord]] = {}
        with self._index.read() as reader:
            records = [VolumeRecord.from_json(number, value) for number, value in reader.volumes()]
            for number, epoch, value in reader.snapshots():
                one = SnapshotRecord.from_json(epoch, value)
                one.id = one.id or self._derived_id(f"{number}/{epoch}")
                snapshots.setdefault(number, []).append(one)
        for record in records:
            if record.deleting:
                self._clones.put_aside(record)
                continue
            of_volume = snapshots.get(record.number, [])
            try:
                self._volumes[record.name] = self._open_volume(record, of_volume)
            except NbdsnapError as error:
                log.info("volume %s can't be served: %s", record.name, error)  # whoever asks for it is told
                self._volumes[record.name] = VolumeState(record, of_volume, error)
        records = [record for record in records if not record.deleting]
        stamps.remove_stamps(self._index, self._live_volumes())
        volumes = {volume.record.number: volume for volume in self._live_volumes()}
        for volume in volumes.values():
            self.receives.adopt(volume)
        undone = {
            number: self._rollbacks.adopt(volume, snapshot, self._open_snapshot(volume, snapshot))
            for number, volume in volumes.items()
            if (snapshot := find_target(volume)) is not None
        }
        failures = recover(self._stranded, self._preserver, volumes, [record.number for record in records])
        for number, failure in failures.items():
            volume = volumes[number]
            problem = OriginError(
                f"volume {volume.name} can't take its acknowledged writes: {failure}",
                hint="mend that (free space, or the disk) and restart: they are kept in the pool",
            )
            self._put_aside(volume, problem)
        self._resizes.finish(self._live_volumes())
        for number in undone.keys() - failures.keys():
            try:
                self._rollbacks.resume(undone[number])
            except (OSError, NbdsnapError) as error:
                problem = OriginError(
                    f"volume {volumes[number].name} can't be rolled back to {undone[number].name}: {error}",
                    hint="that was begun; mend what is in its way (free space, or the disk) and restart",
                )
                self._put_aside(volumes[number], problem)

    def _derived_id(self, place: str) -> str:
        """Of something in this pool that was made before there were identifiers."""
        return str(uuid.uuid5(uuid.UUID(self._meta["id"]), place))

    def _put_aside(self, volume: Volume, problem: NbdsnapError) -> None:
        """Known, but not served."""
        volume.close()
        self._volumes[volume.name] = VolumeState(volume.record, volume.snapshots + volume.deleting, problem)
        for clone in self._clones.dependents(volume):
            self._reopen(clone)

    def _reopen(self, state: VolumeState) -> None:
        """A clone, whose base can be read again, or can't any more."""
        snapshots = [*state.snapshots, *state.deleting]
        try:
            reopened: VolumeState = self._open_volume(state.record, snapshots)
        except NbdsnapError as error:
            reopened = VolumeState(state.record, snapshots, error)
        with self._lock:
            reopened.deleting = state.deleting
            self._volumes[state.name] = reopened

    def _open_volume(self, record: VolumeRecord, snapshots: list[SnapshotRecord]) -> Volume:
        if record.origin is None:
            return self._clones.open(record, snapshots)
        if is_written_elsewhere(Path(record.origin)):
            log.warning(
                "volume %s: another program has %s open for writing: what it writes changes the snapshots, too",
                record.name,
                record.origin,
            )
        origin = Origin(self._io, Path(record.origin))
        try:
            if origin.size < record.size:
                raise OriginError(
                    f"the origin {origin.path} has {origin.size} bytes, but volume {record.name} {record.size}",
                    hint="it was cut short while nbdsnap did not run; restore it to its full size",
                )
            for other in self._live_volumes():
                if isinstance(other.origin, Origin) and other.origin.identity == origin.identity:
                    raise InUseError(f"{origin.path} is the origin of volume {other.name} already")
            stamps.check_stamp(record, snapshots, origin)
        except BaseException:
            origin.close()
            raise
        return Volume(record, snapshots, origin, self._io, self._preserver, self._workers)

    # Finding

    def _live_volumes(self) -> list[Volume]:
        return [volume for _, volume in sorted(self._volumes.items()) if isinstance(volume, Volume)]

    def _state(self, name: str) -> VolumeState:
        state = self._volumes.get(check_name(name))
        if state is None:
            raise NotFoundError(f"there is no volume {name}", hint="`nbdsnap volume list` shows what there is")
        return state

    def _volume(self, name: str) -> Volume:
        state = self._state(name)
        if isinstance(state, Volume):
            return state
        assert state.problem is not None
        raise state.problem

    def _snapshot(self, text: str) -> tuple[VolumeState, SnapshotRecord]:
        volume_name, name = parse_snapshot_name(text)
        state = self._state(volume_name)
        snapshot = state.find(name)
        if snapshot is not None:
            return state, snapshot
        raise NotFoundError(
            f"there is no snapshot {text}", hint=f"`nbdsnap snapshot list {volume_name}` shows what there is"
        )

    # Exports

    def exports(self) -> list[Export]:
        """Everything that can be opened: volumes by name, each before its snapshots, oldest first."""
        with self._lock:
            found: list[Export] = []
            for volume in self._live_volumes():
                found.append(_export(volume, None))
                found.extend(_export(volume, snapshot) for snapshot in volume.visible)
            return found

    def find_export(self, name: str) -> Export | None:
        """The export of that name; "" is the only volume, where there is exactly one."""
        with self._lock:
            try:
                return _export(*self._find(name))
            except NbdsnapError:
                return None

    def bases(self, name: str) -> list[str]:
        """The snapshots that an export can be compared with: all older ones of its volume, oldest first."""
        with self._lock:
            try:
                volume, snapshot = self._find(name)
            except NbdsnapError:
                return []
            return [one.name for one in volume.visible if snapshot is None or one.epoch < snapshot.epoch]

    def open_device(self, name: str, bases: Sequence[str] = ()) -> Device:
        """Open an export; it is in use until the device is closed, and so are ``bases``, the names of older snapshots
        that it is to be compared with.  NotFoundError where there is none."""
        with self._lock:
            volume, snapshot = self._find(name)
            used = [self._base(volume, snapshot, base) for base in bases]
            maps = {base.name: self._change_map(volume, base, snapshot) for base in used}
            if snapshot is None:
                with contextlib.suppress(OSError):  # without the log, writes wait for what they preserve
                    self._log.wake()
                volume.connections += 1
                self._open_devices += 1
                device: Device = LiveDevice(volume, maps, lambda: self._closed([volume, *used]))
            else:
                device = self._open_snapshot(volume, snapshot, maps, used)
            for base in used:
                base.connections += 1
            return device

    def _open_snapshot(
        self,
        volume: Volume,
        snapshot: SnapshotRecord,
        maps: Mapping[str, ChangeMap] = MappingProxyType({}),
        used: Sequence[SnapshotRecord] = (),
    ) -> Device:
        """``used``: the bases of ``maps``, which its end is the end of using."""
        snapshot.connections += 1
        self._open_devices += 1
        return self._clones.open_snapshot(volume, snapshot, maps, lambda: self._closed([snapshot, *used]))

    def _base(self, volume: Volume, snapshot: SnapshotRecord | None, name: str) -> SnapshotRecord:
        base = volume.find(name)
        if base is None or (snapshot is not None and base.epoch >= snapshot.epoch):
            raise NotFoundError(f"there is no snapshot {volume.name}@{name} that is older")
        return base

    def _change_map(self, volume: Volume, base: SnapshotRecord, snapshot: SnapshotRecord | None) -> ChangeMap:
        number = volume.record.number
        if snapshot is None:
            since = partial(_first_epoch, volume, base)
            return ChangeMap(
                self._index, number, since, END_OF_EPOCHS, base.size, lambda: volume.size, volume.pending_chunks
            )
        size = snapshot.size
        return ChangeMap(
            self._index, number, lambda: base.epoch, snapshot.epoch, base.size, lambda: size, lambda _first, _end: ()
        )

    def _find(self, name: str) -> tuple[Volume, SnapshotRecord | None]:
        if not name:
            if len(self._volumes) != 1:
                raise NotFoundError(f"there are {len(self._volumes)} volumes, so there is no default export")
            name = next(iter(self._volumes))
        volume = self._volume(name.partition("@")[0])
        return volume, self._snapshot(name)[1] if "@" in name else None

    def _closed(self, opened: Iterable[Volume | SnapshotRecord]) -> None:
        with self._lock:
            for one in opened:
                one.connections -= 1
            self._open_devices -= 1

    # Volumes

    def volume_create(
        self, name: str, origin: Path | None = None, size: int | None = None, *, thin: bool = False
    ) -> VolumeInfo:
        """Make a volume of a raw file or block device, as it is.  A missing file is created, sparse, with ``size``.

        ``thin``: without a file, ``size`` bytes of zeroes, which take space as they are written.
        """
        check_kind(origin, size, thin=thin)
        self._check_new(name)
        if origin is None:
            assert size is not None
            thin_size = check_size(size)
            return self._preserver.run(
                lambda: self._add_volume(name, lambda number: VolumeRecord(number, name, "thin", thin_size, None))
            )
        path = origin.absolute()

        def make(number: int) -> VolumeRecord:
            return VolumeRecord(number, name, "origin", origin_size(self._io, path, size), str(path))

        if size is None or path.exists():
            return self._preserver.run(lambda: self._add_volume(name, make))
        create_origin(self._io, path, size)
        try:
            return self._preserver.run(lambda: self._add_volume(name, make))
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def clone(self, snapshot: str, name: str) -> VolumeInfo:
        """A writable volume with the snapshot's content, at once.  The snapshot can't be deleted while it is there."""
        self._check_new(name)

        def add() -> VolumeInfo:
            state, base = self._snapshot(snapshot)
            place = state.record.number, base.epoch
            return self._add_volume(name, lambda n: VolumeRecord(n, name, "clone", base.size, None, base=place))

        return self._preserver.run(add)

    def volume_flatten(self, name: str, *, progress: Callable[[int, int], None] | None = None) -> VolumeInfo:
        """Copy what a clone still has from its base, and make it a thin volume, which keeps no snapshot any more.

        ``progress`` is called with (done, total) bytes.
        """
        volume = self._volume(name)
        if not isinstance(volume, RedirectedVolume) or volume.record.base is None:
            raise UsageError(f"volume {name} is no clone", hint="only a clone has a base to be freed from")
        self._clones.flatten(volume, progress)
        return self._volume_info(volume)

    def _check_new(self, name: str) -> None:
        if check_name(name) in self._volumes:
            raise AlreadyExistsError(f"volume {name} exists already")

    def _add_volume(self, name: str, make: Callable[[int], VolumeRecord]) -> VolumeInfo:
        self._check_new(name)
        meta = dict(self._meta)
        record = make(meta["next_volume"])
        volume = self._open_volume(record, [])
        meta["next_volume"] += 1

        def change(txn: IndexWriter) -> None:
            txn.put_meta(meta)
            txn.put_volume(record.number, record.to_json())

        try:
            self._index.update(change)
        except BaseException:
            volume.close()
            raise
        with self._lock:
            self._meta = meta
            self._volumes[name] = volume
        return self._volume_info(volume)

    def volume_ensure(
        self, name: str, origin: Path | None = None, size: int | None = None, *, thin: bool = False
    ) -> VolumeInfo:
        """The volume, created where the pool lacks it.  ``size`` matters only then; another origin is an error."""
        if check_name(name) not in self._volumes:
            return self.volume_create(name, origin, size, thin=thin)
        check_kind(origin, size, thin=thin)
        state = self._state(name)
        if not isinstance(state.problem, OriginChangedError):  # that one is for a person to decide; others are served
            self._volume(name)
        known = None if state.record.origin is None else Path(state.record.origin)
        if origin is None and known is None:
            return self._volume_info(state)
        if origin is None or known is None or not origin.exists() or not origin.samefile(known):
            raise OriginError(
                f"volume {name} has {_said(known)}, not {_said(origin)}",
                hint="name that one, or delete the volume first (its origin file stays)",
            )
        return self._volume_info(state)

    def volume_accept(self, name: str) -> VolumeStatus:
        """Serve a volume although its origin was changed by another program, and mark its snapshots."""
        self._preserver.run(lambda: self._accept(self._state(name)))
        return self.volume_show(name)

    def _accept(self, state: VolumeState) -> None:
        if not isinstance(state.problem, OriginChangedError):
            return
        marked = stamps.accept(self._index, state)
        log.warning("volume %s: accepted a changed origin; these may have changed: %s", state.name, ", ".join(marked))
        volume = self._open_volume(state.record, [*state.snapshots, *state.deleting])
        with self._lock:
            volume.deleting = state.deleting  # one list, whoever goes on reclaiming
            self._volumes[state.name] = volume
        for clone in self._clones.dependents(volume):
            self._reopen(clone)

    def volume_resize(self, name: str, size: int, *, shrink: bool = False, dry_run: bool = False) -> VolumeInfo:
        """Give a volume another size while it is in use; its snapshots keep theirs.  A smaller one only with
        ``shrink``."""
        volume = self._volume(name)
        if dry_run:
            self._resizes.check(volume, size, shrink=shrink)
            return self._volume_info(volume).model_copy(update={"size": size})
        self._resizes.resize(volume, size, shrink=shrink)
        return self._volume_info(volume)

    def volume_list(self) -> list[VolumeInfo]:
        with self._lock:
            return [self._volume_info(state) for _, state in sorted(self._volumes.items())]

    def volume_show(self, name: str) -> VolumeStatus:
        self._catch_up()
        return self._status_of(self._state(name))[0]

    def volume_delete(self, name: str, *, snapshots: bool = False, dry_run: bool = False) -> VolumeStatus:
        """Forget a volume, and its snapshots where ``snapshots`` says so.  Its origin file stays as it is; what a thin
        volume or clone has in the store is freed.

        Returns what was (or, with ``dry_run``, would be) deleted.
        """
        state = self._state(name)
        if isinstance(state, Volume):
            state.check_not_rolling_back()
        status = self.volume_show(name)
        if state.visible and not snapshots:
            raise InUseError(
                f"volume {name} has {len(state.visible)} snapshots", hint="delete them too with --snapshots"
            )
        _check_unused(state, name)
        doomed = [f"{name}@{snapshot.name}" for snapshot in state.visible]
        self.snapshot_delete(doomed, dry_run=dry_run)
        if not dry_run:
            self._preserver.run(lambda: self._remove_volume(state))
            if state.record.origin is None:
                self._clones.reclaim(state.record.number)
        return status

    def _remove_volume(self, state: VolumeState) -> None:
        with self._lock:
            _check_unused(state, state.name)
            if isinstance(state, Volume):
                state.check_not_rolling_back()
            if state.snapshots or state.deleting:
                raise InUseError(f"volume {state.name} still has snapshots", hint="try again in a moment")
            del self._volumes[state.name]
        try:
            if isinstance(state, Volume):
                state.close_gate()
                self._preserver.drain([state])
                state.sync_in_place()
            if state.record.origin is None:
                self._clones.mark_deleted(state)
            else:
                self._index.update(lambda txn: txn.delete_volume(state.record.number))
        except BaseException:
            with self._lock:
                self._volumes[state.name] = state
            if isinstance(state, Volume):
                state.open_gate()
            raise
        if isinstance(state, Volume):
            state.close()
        self._stranded.remove(state.record.number)

    # Snapshots

    def snapshot_create(self, names: Sequence[str]) -> list[SnapshotInfo]:
        """Take ``VOLUME@NAME``, each, at one instant: all or none; between the hooks of these volumes.

        Cost: what the origins have not written back yet is synced, and one transaction; whatever the volumes' sizes.
        """
        wanted = [parse_snapshot_name(text) for text in names]
        if len({volume for volume, _ in wanted}) != len(wanted):
            raise UsageError("one volume is named twice", hint="one instant gives one snapshot of a volume")
        hooks = {name: self._hooks[name] for name, _ in wanted if name in self._hooks}
        if hooks:
            self._check_new_snapshots(wanted)
        with at_rest(hooks, names):
            volumes = [self._volume(volume_name) for volume_name, _ in wanted]
            list(self._workers.map(_sync_early, volumes))  # the long part, while writes go on
            return self._preserver.run(lambda: self._take(wanted))

    def _check_new_snapshots(self, wanted: list[tuple[str, str]]) -> list[Volume]:
        """The volumes; refused where a snapshot can't be taken."""
        volumes: list[Volume] = []
        for volume_name, name in wanted:
            volume = self._volume(volume_name)
            volume.check_not_rolling_back()
            if volume.find(name) is not None:
                raise AlreadyExistsError(f"snapshot {volume_name}@{name} exists already")
            volumes.append(volume)
        return volumes

    def _take(self, wanted: list[tuple[str, str]]) -> list[SnapshotInfo]:
        volumes = self._check_new_snapshots(wanted)
        created = now()
        taken = [
            SnapshotRecord(volume.record.epoch, name, volume.size, created, id=str(uuid.uuid4()))
            for volume, (_, name) in zip(volumes, wanted, strict=True)
        ]
        bumped = [replace(volume.record, epoch=volume.record.epoch + 1) for volume in volumes]

        def change(txn: IndexWriter) -> None:
            for record, snapshot in zip(bumped, taken, strict=True):
                txn.put_snapshot(record.number, snapshot.epoch, snapshot.to_json())
                txn.put_volume(record.number, record.to_json())

        try:
            for volume in volumes:
                volume.close_gate()
            self._preserver.drain(volumes)
            for volume in volumes:
                volume.sync_latest()
            self._index.update(change)
            with self._lock:
                for volume, record, snapshot in zip(volumes, bumped, taken, strict=True):
                    volume.record = record
                    volume.add_snapshot(snapshot)
                    volume.forget_exclusive()
        finally:
            for volume in volumes:
                volume.open_gate()
        return [_snapshot_info(volume, snapshot) for volume, snapshot in zip(volumes, taken, strict=True)]

    def snapshot_list(self, volume: str | None = None) -> list[SnapshotInfo]:
        """Oldest first; of all volumes where none is named."""
        self._catch_up()
        states = [self._state(volume)] if volume is not None else list(self._volumes.values())
        found = [snapshot for state in states for snapshot in self._status_of(state)[0].snapshots]
        return sorted(found, key=lambda info: info.created)

    def snapshot_delete(self, names: Sequence[str], *, dry_run: bool = False, wait: bool = True) -> SnapshotDeletion:
        """Delete snapshots, all or none, and give back what only they needed: in the background, where not ``wait``."""
        doomed = self._deletable(names)
        self._catch_up()
        freed = self._deletions.would_free(doomed)
        if not dry_run:
            marked = self._preserver.run(lambda: self._deletions.mark(lambda: self._deletable(names)))
            started = [self._deletions.start(state.name, snapshots) for state, snapshots in marked.items()]
            for one in started if wait else ():
                one.result()
        return SnapshotDeletion(names=list(names), freed_bytes=freed)

    def snapshot_names(self, volume: str) -> tuple[datetime, list[str]]:
        """When the volume was created, and the names of its snapshots."""
        with self._lock:
            state = self._state(volume)
            return state.record.created, [snapshot.name for snapshot in state.visible]

    def prune(self, schedules: Mapping[str, Sequence[Schedule]], *, dry_run: bool = False) -> PruneReport:
        """Delete what schedules (by volume) do not keep any more, in the background.

        What is held or in use stays, whatever a schedule says.
        """
        doomed: list[str] = []
        kept: list[KeptSnapshot] = []
        for volume, rules in schedules.items():
            names = self.snapshot_names(volume)[1] if volume in self._volumes else []
            for name in (f"{volume}@{name}" for schedule in rules for name in schedule.excess(names)):
                try:
                    self._deletable([name])
                    doomed.append(name)
                except InUseError as error:
                    kept.append(KeptSnapshot(name=name, reason=str(error)))
        freed = self.snapshot_delete(doomed, dry_run=dry_run, wait=False).freed_bytes if doomed else 0
        return PruneReport(names=doomed, freed_bytes=freed, kept=kept)

    def reclaim(self, progress: Progress | None = None) -> int:
        """Wait until the space of deleted snapshots is given back, and return how much that was since the call.

        ``progress`` is called with (done, total) bytes."""
        total = self._deletions.unneeded_bytes()

        def report() -> None:
            if progress is not None:
                progress(max(0, total - self._deletions.unneeded_bytes()), total)

        self._deletions.wait(report, PROGRESS_S)
        return total

    def _deletable(self, names: Sequence[str]) -> Doomed:
        """The snapshots of ``names``, each once; refused where one can't be deleted."""
        with self._lock:
            found = self._group(names)
            clones = self._clones.names_by_base()
            for state, snapshots in found.items():
                for snapshot in snapshots:
                    check_no_clones(clones, state, snapshot)
                    check_deletable(state, snapshot)
        return found

    def _group(self, names: Sequence[str]) -> Doomed:
        """The snapshots of ``names`` by volume, each once, ascending.  Under the lock."""
        found: Doomed = {}
        for name in dict.fromkeys(names):
            state, snapshot = self._snapshot(name)
            found.setdefault(state, []).append(snapshot)
        for snapshots in found.values():
            snapshots.sort(key=lambda snapshot: snapshot.epoch)
        return found

    def rollback(
        self, name: str, *, force: bool = False, dry_run: bool = False, progress: Progress | None = None
    ) -> RollbackReport:
        """Give the live volume the content of its snapshot ``name``; all snapshots stay as they are.

        Refused where clients have the volume open, but for ``force``: they see the new content then.  ``progress`` is
        called with (done, total) bytes; where it raises, what has begun is finished without it.
        """
        volume_name, _ = parse_snapshot_name(name)
        with self._lock:
            volume = self._volume(volume_name)
            if volume.record.receiving is not None:
                volume.check_not_rolling_back()
            snapshot = self._snapshot(name)[1]
            if not dry_run:
                device = self._open_snapshot(volume, snapshot)
        if dry_run:
            self._catch_up()
            return self._rollbacks.plan(volume, snapshot)
        return self._rollbacks.roll_back(volume, snapshot, device, force=force, progress=progress)

    # Sending and receiving (nbdsnap.transfer)

    def find_snapshots(self, identifier: str) -> list[str]:
        """``VOLUME@NAME`` of all snapshots with that identifier."""
        with self._lock:
            return [
                f"{state.name}@{snapshot.name}"
                for state in self._volumes.values()
                for snapshot in state.visible
                if snapshot.id == identifier
            ]

    def snapshots_of(self, volume: str) -> list[SnapshotInfo]:
        """As they were taken, the oldest first; without what it takes to count their space."""
        with self._lock:
            state = self._state(volume)
            return [_snapshot_info(state, snapshot) for snapshot in state.visible]

    def is_blank(self, volume: str) -> bool:
        """It has no snapshots, and nothing but zeroes."""
        return self.receives.is_blank(self._volume(volume))

    def volume_demote(self, name: str) -> VolumeStatus:
        """Make it a replica: it takes no more writes from clients, and follows another pool's volume."""
        return self._set_replica(name, True)

    def volume_promote(self, name: str) -> VolumeStatus:
        """Make a replica a volume like any other.  What has come of a snapshot that is not there yet is undone."""
        state = self._volume(name)
        if state.record.receiving is not None:
            self.receives.abort(state)
        return self._set_replica(name, False)

    def _set_replica(self, name: str, replica: bool) -> VolumeStatus:
        def change() -> None:
            volume = self._volume(name)
            if replica and not volume.record.replica and volume.connections:
                raise InUseError(
                    f"volume {name} is open: {volume.connections} connections", hint="disconnect its clients first"
                )
            record = replace(volume.record, replica=replica)
            self._index.update(lambda txn: txn.put_volume(record.number, record.to_json()))
            with self._lock:
                volume.record = record

        self._preserver.run(change)
        return self.volume_show(name)

    def volume_id(self, name: str) -> str:
        return self._derived_id(f"{self._state(name).record.number}")

    def snapshot_info(self, name: str) -> SnapshotInfo:
        """Without what it takes to count its space."""
        return _snapshot_info(*self._snapshot(name))

    def receive_begin(
        self, volume: str, arrival: Arrival, *, name: str | None = None, force: bool = False, resumable: bool = False
    ) -> Receive:
        """Prepare the volume to receive a snapshot, as ``name`` where one is given: :mod:`nbdsnap.engine.receiving`."""
        chosen = check_name(name if name is not None else arrival.name)
        return self.receives.begin(self._volume(volume), arrival, name=chosen, force=force, resumable=resumable)

    def receive_state(self, volume: str) -> JsonObject | None:
        """What is being received, or was begun to be; None where nothing is."""
        return self._volume(volume).record.receiving

    def receive_abort(self, volume: str) -> None:
        """Give up what was begun to be received: the volume is as it was before."""
        self.receives.abort(self._volume(volume))

    def snapshot_hold(self, names: Sequence[str], *, held: bool = True) -> list[SnapshotInfo]:
        """Keep snapshots from being deleted or dropped, or (``held=False``) let them be again: all or none."""
        return self._preserver.run(lambda: self._change_snapshots(names, lambda one: replace(one, held=held)))

    def snapshot_priority(self, name: str, priority: int) -> SnapshotInfo:
        """How much a snapshot matters when a full store has to drop some: the lowest goes first, and KEEP never."""
        if not MIN_PRIORITY <= priority <= KEEP:
            raise UsageError(f"priority {priority} is out of range: {MIN_PRIORITY} to {KEEP}")
        infos = self._preserver.run(lambda: self._change_snapshots([name], lambda one: replace(one, priority=priority)))
        return infos[0]

    def _change_snapshots(
        self, names: Sequence[str], change: Callable[[SnapshotRecord], SnapshotRecord]
    ) -> list[SnapshotInfo]:
        with self._lock:
            chosen = [(state, snapshot) for state, snapshots in self._group(names).items() for snapshot in snapshots]

        def put(txn: IndexWriter) -> None:
            for state, snapshot in chosen:
                txn.put_snapshot(state.record.number, snapshot.epoch, change(snapshot).to_json())

        self._index.update(put)
        with self._lock:
            for _, snapshot in chosen:
                changed = change(snapshot)
                snapshot.held, snapshot.priority = changed.held, changed.priority
        infos = {(info.volume, info.name): info for state, _ in chosen for info in self._status_of(state)[0].snapshots}
        return [infos[state.name, snapshot.name] for state, snapshot in chosen]

    # Looking

    def diff(self, older: str, newer: str | None = None) -> Iterator[Extent]:
        """What changed from snapshot ``older`` to snapshot ``newer`` of the same volume, or to the live volume."""
        state, base = self._snapshot(older)
        end_epoch, size = END_OF_EPOCHS, state.size
        if newer is not None:
            other, target = self._snapshot(newer)
            if other is not state:
                raise UsageError(f"{older} and {newer} are of different volumes")
            if target.epoch < base.epoch:
                raise UsageError(f"{older} is newer than {newer}", hint="name the older one first")
            end_epoch, size = target.epoch, target.size
        if newer is None and isinstance(state, Volume):
            self._preserver.run(state.check_not_stalled)  # what was acknowledged before is in the index then
        with self._index.read() as reader:
            blocks = changed_blocks(reader, state.record.number, base.epoch, end_epoch)
        for offset, length in extents(blocks, size, base.size):
            yield Extent(offset=offset, length=length)

    def _catch_up(self) -> None:
        """Wait, but not for long, until what was acknowledged before is in the index."""
        with contextlib.suppress(TimeoutError):
            self._preserver.run(_nothing, timeout=CATCH_UP_S)

    def status(self) -> PoolStatus:
        self._catch_up()
        unneeded = 0
        sharing: dict[int, int] = {}
        volumes: list[VolumeStatus] = []
        for _, state in sorted(self._volumes.items()):
            status, shares = self._status_of(state)
            volumes.append(status)
            unneeded += shares.unneeded
            for sharers, size in shares.histogram.items():
                sharing[sharers] = sharing.get(sharers, 0) + size
        store = StoreStatus(
            used_bytes=self._store.used_bytes,
            limit_bytes=self._store.limit,
            allocated_bytes=self._store.allocated_bytes,
            index_bytes=self._index.file_bytes,
            free_bytes=self._space.free_bytes(),
            warning=self._space.warning(),
            reclaiming_bytes=unneeded,
        )
        shared = [Sharing(shared_by=sharers, bytes=size) for sharers, size in sorted(sharing.items())]
        return PoolStatus(
            path=str(self.path), volumes=volumes, store=store, sharing=shared, problem=self._preserver.obstacle
        )

    def volume_map(self, name: str, cells: int, rows: int) -> VolumeMap:
        """Where on the volume its changes lie, and how much is shared there: :mod:`nbdsnap.engine.map`."""
        if not (1 <= cells <= MAX_CELLS and 1 <= rows <= MAX_ROWS):
            raise UsageError(f"a map has 1 to {MAX_CELLS} cells and 1 to {MAX_ROWS} rows")
        self._catch_up()
        with self._lock:
            state = self._state(name)
            epochs = [(snapshot.epoch, snapshot.name) for snapshot in state.visible]
        with self._index.read() as reader:
            return volume_map(reader, state.record.number, name, state.size, epochs, cells, rows)

    def _status_of(self, state: VolumeState) -> tuple[VolumeStatus, accounting.Shares]:
        """A volume with its snapshots, and who shares how much of what."""
        with self._index.read() as reader:
            usage = list(reader.usage(state.record.number))
            live = None if state.record.origin is not None else reader.live_slots(state.record.number) * CHUNK
        with self._lock:
            shares = accounting.shares(usage, state.epochs)
            infos = [
                _snapshot_info(state, snapshot, exclusive, shared)
                for snapshot, exclusive, shared in zip(state.snapshots, shares.exclusive, shares.shared, strict=True)
                if not snapshot.hidden
            ]
            clones = self._clones.names_by_base()
            for info, snapshot in zip(infos, state.visible, strict=True):
                info.clones = clones.get((state.record.number, snapshot.epoch), [])
            volume = self._volume_info(state).model_dump(exclude={"snapshots"})
        return VolumeStatus(**volume, snapshots=infos, live_bytes=live), shares

    def _volume_info(self, state: VolumeState) -> VolumeInfo:
        record = state.record
        return VolumeInfo(
            name=record.name,
            kind=record.kind,
            size=record.size,
            origin=record.origin,
            base=self._clones.base_name(record),
            created=record.created,
            snapshots=len(state.visible),
            connections=state.connections,
            error=state.error,
            replica=record.replica,
            receiving=None if record.receiving is None else str(record.receiving["name"]),
        )

    def settle(self) -> None:
        """Wait until all that was acknowledged before is in place, and durable there: the raw files are current."""
        self._preserver.run(lambda: self._preserver.drain([]))
        for volume in self._live_volumes():
            volume.sync_in_place()

    def check(self, *, data: bool = False, progress: Callable[[int, int], None] | None = None) -> CheckReport:
        """Verify every invariant, and with ``data`` every checksum.  ``progress`` is called with (done, total)
        slots."""
        checker = Checker(self._index, self._store, data=data, progress=progress, newer=self._newer_record)
        problems = list(checker.problems())
        return CheckReport(ok=not problems, problems=problems)

    def _newer_record(self, volume: int, record: Record) -> Record | None:
        with self._index.read() as reader:
            return reader.cursor(volume).around(record.chunk, record.epoch)[1]


def _sync_early(volume: Volume) -> None:
    volume.sync_in_place()


def _nothing() -> None:
    """A command that only waits for what was submitted before it."""


def origin_size(io: FileIO, path: Path, size: int | None) -> int:
    """The bytes of the file or device, which ``size``, where given, must agree with."""
    origin = Origin(io, path)
    origin.close()
    if size is not None and size != origin.size:
        raise OriginError(
            f"{path} has {origin.size} bytes, not {size}", hint="leave the size out to take the file as it is"
        )
    return check_size(origin.size)


def check_kind(origin: Path | None, size: int | None, *, thin: bool) -> None:
    """UsageError where it is not told what a volume is to be."""
    if thin == (origin is not None):
        raise UsageError("a volume has an origin, or is thin", hint="give it one of both")
    if thin and size is None:
        raise UsageError("a thin volume needs a size")


def _said(origin: Path | None) -> str:
    return "no origin (its data is in the pool)" if origin is None else f"the origin {origin}"


def _check_unused(opened: VolumeState | SnapshotRecord, name: str) -> None:
    if opened.connections:
        raise InUseError(f"{name} is open: {opened.connections} connections", hint="disconnect its clients first")


def _first_epoch(volume: Volume, base: SnapshotRecord) -> int:
    """Where the differences of the live volume from ``base`` begin: while it is being rolled back to an older snapshot,
    its content is that one's already."""
    rollback = volume.record.rollback
    return base.epoch if rollback is None else min(base.epoch, rollback)


def _export(volume: Volume, snapshot: SnapshotRecord | None) -> Export:
    if snapshot is None:
        return Export(volume.name, volume.size, volume.record.replica, f"live volume, {format_size(volume.size)}")
    taken = snapshot.created.isoformat(timespec="seconds")
    return Export(f"{volume.name}@{snapshot.name}", snapshot.size, True, f"snapshot taken {taken}")


def _snapshot_info(
    state: VolumeState, snapshot: SnapshotRecord, exclusive_bytes: int = 0, shared_bytes: int = 0
) -> SnapshotInfo:
    return SnapshotInfo(
        volume=state.name,
        name=snapshot.name,
        created=snapshot.created,
        size=snapshot.size,
        priority=snapshot.priority,
        held=snapshot.held,
        exclusive_bytes=exclusive_bytes,
        shared_bytes=shared_bytes,
        connections=snapshot.connections,
        problem=snapshot.suspect,
        id=snapshot.id,
    )
