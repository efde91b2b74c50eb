"""A pool that no process has open, looked at without trusting any of it.

To open a pool is to replay its log, and to let LMDB read its index, which may end the process where a page is damaged.
So here the lock is taken, and everything else only read: the index page by page (:mod:`nbdsnap.store.salvage`), against
the checksums that a clean stop left; the log and the files of stranded intents; the store.  Nothing is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nbdsnap.engine.check import Checker, Progress, Served, load_records
from nbdsnap.engine.lock import PoolLock
from nbdsnap.engine.records import SnapshotRecord, VolumeRecord
from nbdsnap.errors import CorruptionError, FormatError, NbdsnapError, NotFoundError
from nbdsnap.models import CheckReport, Problem
from nbdsnap.store.chunkstore import ChunkStore
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.intentlog import PAGE, IntentLog, read_intents
from nbdsnap.store.layout import (
    DEFAULT_LOG_SIZE,
    FORMAT_VERSION,
    INDEX_FILE,
    LOG_FILE,
    MAX_SLOTS,
    STORE_FILE,
    STRANDED_FILE,
)
from nbdsnap.store.pagesums import damaged_blocks
from nbdsnap.store.salvage import Damage, Salvage


class OfflinePool:
    """Holds the pool's lock from :meth:`open` to :meth:`close`."""

    def __init__(self, path: Path, io: FileIO | None = None) -> None:
        self.path = path
        self.io = io or FileIO()
        self.index_path = path / INDEX_FILE
        if not (path / INDEX_FILE).exists() and not (path / STORE_FILE).exists():
            raise NotFoundError(f"there is no pool at {path}", hint="the first `nbdsnap serve` creates it")
        self._lock = PoolLock(self.io, path)

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> OfflinePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def salvage(self) -> Iterator[Salvage]:
        """The index, as far as it can be read.  CorruptionError where not even its tables can be found, FormatError
        where it is of a future version."""
        if not self.index_path.exists():
            raise CorruptionError(f"the pool {self.path} has lost its index")
        damaged = damaged_blocks(self.io, self.index_path)
        salvage = Salvage(self.io, self.index_path, damaged or ())
        try:
            meta = salvage.meta()
            if meta is not None and meta["format"] > FORMAT_VERSION:
                raise FormatError(
                    f"the pool {self.path} has format {meta['format']}; this nbdsnap knows {FORMAT_VERSION}"
                )
            yield salvage
        finally:
            salvage.close()

    @contextlib.contextmanager
    def store(self) -> Iterator[ChunkStore | NoStore]:
        """The preserved chunks, to be read."""
        try:
            store = ChunkStore(self.io, self.path / STORE_FILE, read_only=True)
        except CorruptionError as error:
            yield NoStore(error)
            return
        try:
            yield store
        finally:
            store.close()

    def check(self, *, data: bool = False, progress: Progress | None = None) -> CheckReport:
        problems = self._check_log()
        try:
            with self.salvage() as salvage, self.store() as store:
                salvage.read_all()
                problems += index_problems(salvage)
                if isinstance(store, NoStore) and any(True for _ in salvage.slots()):
                    problems.append(Problem(kind="store", detail=str(store.error)))
                problems += Checker(OfflineSource(salvage), store, data=data, progress=progress).problems()
        except CorruptionError as error:
            problems.append(Problem(kind="index", detail=str(error)))
        return CheckReport(ok=not problems, problems=problems)

    def _check_log(self) -> list[Problem]:
        problems = []
        with contextlib.suppress(FileNotFoundError):
            damage = log_damage(self.io, self.path / LOG_FILE)
            if damage is not None:
                problems.append(Problem(kind="log", detail=f"{damage}: acknowledged writes may be lost"))
        for path in stranded_files(self.path):
            _, damage = read_intents(self.io, path)
            if damage is not None:
                problems.append(Problem(kind="log", detail=f"{damage}: acknowledged writes are lost"))
        return problems


class NoStore:
    """In place of a store whose file is not there."""

    file_slots = MAX_SLOTS

    def __init__(self, error: CorruptionError) -> None:
        self.error = error

    def read_into(self, buffer: memoryview, slot: int) -> None:
        raise FileNotFoundError(str(self.error))


class OfflineSource:
    """For a :class:`~nbdsnap.engine.check.Checker`: the same at each look."""

    def __init__(self, salvage: Salvage) -> None:
        self._salvage = salvage

    @contextlib.contextmanager
    def read(self) -> Iterator[Salvage]:
        yield self._salvage


def log_damage(io: FileIO, path: Path) -> str | None:
    """What is wrong with the intent log, where something is.  FileNotFoundError where there is none."""
    if path.stat().st_size < PAGE or _is_blank(path):
        return None  # a creation that was cut short: it is begun again
    try:
        log = IntentLog(io, path, DEFAULT_LOG_SIZE)
    except NbdsnapError as error:
        return str(error)
    try:
        for _ in log.replay():
            pass
    except CorruptionError as error:
        return str(error)
    finally:
        io.close(log.fd)
    return None


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(file.read(64))


def stranded_files(pool: Path) -> list[Path]:
    return sorted(pool.glob(STRANDED_FILE.format("*")))


def index_problems(salvage: Salvage) -> list[Problem]:
    """The index's damage, and what it affects."""
    volumes, snapshots = load_records(salvage)
    served = {number: Served(volume, snapshots.get(number, [])) for number, volume in volumes.items()}
    problems = [problem for damage in salvage.damage for problem in _problems_of(damage, served, snapshots)]
    lost = sorted(salvage.numbers() - volumes.keys())
    problems += [Problem(kind="index", detail=f"the record of volume number {number} is lost") for number in lost]
    if salvage.meta() is None:
        problems.append(Problem(kind="index", detail="the pool's own record is lost"))
    if salvage.damaged_pages and not problems:
        detail = f"{salvage.damaged_pages} pages of the index that are not in use changed while no server ran"
        problems.append(Problem(kind="index", detail=detail))
    return problems


def _problems_of(
    damage: Damage, served: dict[int, Served], snapshots: dict[int, list[SnapshotRecord]]
) -> Iterator[Problem]:
    """One for each volume that is affected; one in all where it is of none, or can't be told."""
    numbers = [damage.volume] if damage.volume is not None else sorted(served)
    what = f"{damage.why} (table {damage.table})"
    known = [number for number in numbers if number in served]
    if damage.table not in ("preserved", "changed", "snapshots", "current") or not known:
        yield Problem(kind="index", detail=what)
        return
    for number in known:
        volume: VolumeRecord = served[number].volume
        names = [f"{volume.name}@{one.name}" for one in snapshots.get(number, []) if not one.deleting]
        if damage.table == "current":
            if volume.origin is None:
                offset, length = served[number].bytes(damage.first, damage.end)
                detail = f"{what}: live data of {volume.name}, somewhere in bytes {offset} to {offset + length - 1}"
                yield Problem(
                    kind="index", detail=detail, volume=volume.name, snapshots=names, offset=offset, length=length
                )
            continue
        if damage.table != "preserved":
            yield Problem(kind="index", detail=f"{what}: volume {volume.name}", volume=volume.name, snapshots=names)
            continue
        offset, length = served[number].bytes(damage.first, damage.end)
        detail = f"{what}: {', '.join(names) or volume.name}, somewhere in bytes {offset} to {offset + length - 1}"
        yield Problem(kind="index", detail=detail, volume=volume.name, snapshots=names, offset=offset, length=length)
