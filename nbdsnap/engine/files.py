"""A pool's files: creating them, recognising them, and refusing what is not a pool of ours.

A pool exists once its index has its name; it is made under another one, with the record ``pool`` in ``meta``.  So a
creation that was cut short leaves a folder without an index, and is begun again.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

from nbdsnap.engine.records import now
from nbdsnap.errors import CorruptionError, FormatError, NotFoundError
from nbdsnap.store import pagesums, structure
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.index import Index, IndexWriter, JsonObject
from nbdsnap.store.layout import (
    FORMAT_VERSION,
    INDEX_FILE,
    INDEX_LOCK_FILE,
    LOCK_FILE,
    LOG_FILE,
    NEW_INDEX_FILE,
    STORE_FILE,
    SUMS_FILE,
)

log = logging.getLogger(__name__)

_NEW_LOCK_FILE = INDEX_LOCK_FILE.replace(INDEX_FILE, NEW_INDEX_FILE)
_OWN_FILES = {INDEX_FILE, INDEX_LOCK_FILE, LOCK_FILE, LOG_FILE, NEW_INDEX_FILE, _NEW_LOCK_FILE, STORE_FILE, SUMS_FILE}
_FOREIGN_BUT_HARMLESS = {"lost+found"}


def prepare_folder(path: Path, *, create: bool) -> None:
    """Make sure that ``path`` is a pool's folder, or an empty one that may become it.  Changes nothing else."""
    if not path.exists():
        if not create:
            raise NotFoundError(f"there is no pool at {path}", hint="the first `nbdsnap serve` creates it")
        path.mkdir(mode=0o700, parents=True)
        return
    if not path.is_dir():
        raise FormatError(f"{path} is not a folder, so it is no pool")
    names = {entry.name for entry in path.iterdir()} - _FOREIGN_BUT_HARMLESS
    if INDEX_FILE in names:
        return
    if STORE_FILE in names:
        raise CorruptionError(
            f"the pool {path} has lost its index", hint=f"restore {INDEX_FILE} from a backup of the pool"
        )
    if names - _OWN_FILES:
        raise FormatError(
            f"the folder {path} holds something else than a pool: {min(names - _OWN_FILES)}",
            hint="name an empty or a new folder for the pool",
        )
    if not create:
        raise NotFoundError(f"there is no pool at {path}", hint="the first `nbdsnap serve` creates it")


def open_index(io: FileIO, path: Path) -> tuple[Index, JsonObject]:
    """The pool's index, created where it is not there yet, and its record ``pool``."""
    file = path / INDEX_FILE
    if not file.exists():
        _create_index(io, path)
    if not pagesums.verify(io, file):
        structure.verify(io, file)
    index = Index(file)
    try:
        with index.read() as reader:
            meta = reader.meta()
        if meta is None:
            raise CorruptionError(f"the index {file} is damaged: it does not say what pool it is of")
        if not isinstance(meta.get("format"), int) or meta["format"] > FORMAT_VERSION:
            raise FormatError(
                f"the pool {path} has format {meta.get('format')}; this nbdsnap knows up to {FORMAT_VERSION}",
                hint="use the newer nbdsnap that wrote it",
            )
    except BaseException:
        index.close()
        raise
    return index, meta


def seal_index(io: FileIO, path: Path) -> None:
    """After the index was closed: make sure that damage to it is noticed at the next start."""
    try:
        pagesums.write_sums(io, path / INDEX_FILE)
    except OSError as error:
        log.warning("damage to the index before the next start will not be noticed then: %s", error)


def _create_index(io: FileIO, path: Path) -> None:
    new = path / NEW_INDEX_FILE
    io.unlink(new)
    index = Index(new, create=True)
    try:
        _initialise(index)
    finally:
        index.close()
    io.rename(new, path / INDEX_FILE)
    io.fsync_directory(path)  # before the other files: beside them, no index means a lost one
    io.unlink(path / _NEW_LOCK_FILE)


def make_entries_durable(io: FileIO, path: Path) -> None:
    """Sync the pool's folder and the one above it: whoever made the entries, and however far it got."""
    io.fsync_directory(path)
    io.fsync_directory(path.parent)


def _initialise(index: Index) -> JsonObject:
    meta: JsonObject = {
        "format": FORMAT_VERSION,
        "id": str(uuid.uuid4()),
        "created": now().isoformat(),
        "next_volume": 1,
    }

    def change(txn: IndexWriter) -> JsonObject:
        txn.put_meta(meta)
        return meta

    return index.update(change)
