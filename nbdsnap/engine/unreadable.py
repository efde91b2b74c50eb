"""Old content that its disk can't read any more.

A write is about to overwrite a chunk that a snapshot shares with the live volume, and the disk does not give the chunk
back: a bad sector.  Its content is lost already, to the snapshot as to the live volume.  To hold up the write would
save nothing, and it is what mends the sector.  So the chunk is preserved as what it is: its record says *lost*
(LOST_SLOT), the write goes on, and whoever reads the chunk in the snapshot gets an error, as before.  The snapshots
concerned are marked, for ``status`` and ``snapshot list``; ``check`` names the range; the log says it at once.

Only where the disk answers otherwise: a disk that is gone gives no old content either, and may come back with it.
Then nothing is marked, and the write waits, or fails (:mod:`nbdsnap.engine.preserver`: stalls).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import replace

from nbdsnap.engine.records import SnapshotRecord
from nbdsnap.engine.volume import Volume
from nbdsnap.store.index import IndexWriter
from nbdsnap.store.layout import CHUNK, CHUNK_SHIFT

log = logging.getLogger(__name__)

UNREADABLE_ERRNOS = (errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ)
"""A medium's error, and what file systems make of one (a checksum of Btrfs or XFS that is wrong)."""

SUSPECT = "some of its data could not be read from the origin, and is lost: `nbdsnap check` says what"
"""What the snapshots concerned are marked with."""

PROBE_CHUNKS = 256
"""How far from an unreadable chunk, on either side, another one is read from the disk: 1 MiB."""

Loss = tuple[int, int]
"""A chunk, and its previous record's epoch."""


def is_unreadable(error: OSError) -> bool:
    return error.errno in UNREADABLE_ERRNOS


def read_again(volume: Volume, buffer: memoryview, first: int) -> list[int]:
    """Read the chunks from ``first`` on into ``buffer``, one by one; the positions of those that can't be read.

    Raises the error where the disk does not answer at all.
    """
    failures: dict[int, OSError] = {}
    for position in range(len(buffer) >> CHUNK_SHIFT):
        error = _try(volume, buffer, first, position)
        if error is not None:
            failures[position] = error
    if failures and not any(_disk_answers(volume, first + position) for position in (min(failures), max(failures))):
        raise failures[min(failures)]
    return [position for position in failures if _try(volume, buffer, first, position) is not None]


def _try(volume: Volume, buffer: memoryview, first: int, position: int) -> OSError | None:
    part = buffer[position << CHUNK_SHIFT : (position + 1) << CHUNK_SHIFT]
    try:
        volume.origin.read_into(part, (first + position) << CHUNK_SHIFT)
    except OSError as error:
        if not is_unreadable(error):
            raise
        return error
    return None


def _disk_answers(volume: Volume, chunk: int) -> bool:
    """Whether the disk takes a sync, and gives back any other data near the chunk; where there is none, the sync
    decides."""
    volume.sync_in_place()
    probe = memoryview(bytearray(CHUNK))
    tried = False
    for other in _near(volume, chunk):
        tried = True
        try:
            volume.origin.drop_cached(other << CHUNK_SHIFT, CHUNK)
            volume.origin.read_into(probe, other << CHUNK_SHIFT)
            return True
        except OSError:
            continue
    return not tried


def _near(volume: Volume, chunk: int) -> Iterator[int]:
    """A few chunks on either side that hold data: a hole can be read without the disk."""
    for low, high in ((chunk - PROBE_CHUNKS, chunk), (chunk + 1, chunk + PROBE_CHUNKS)):
        start, end = max(low, 0) << CHUNK_SHIFT, min(high << CHUNK_SHIFT, volume.size)
        if start >= end:
            continue
        for data, stop in volume.origin.data_extents(start, end - start):
            first, last = data >> CHUNK_SHIFT, (stop - 1) >> CHUNK_SHIFT
            yield from sorted({first, (first + last) // 2, last})
            break


def put_marks(txn: IndexWriter, volume: Volume, losses: list[Loss]) -> None:
    """In the transaction that records the losses."""
    for snapshot in _concerned(volume, losses):
        txn.put_snapshot(volume.record.number, snapshot.epoch, replace(snapshot, suspect=SUSPECT).to_json())


def mark_snapshots(volume: Volume, losses: list[Loss]) -> None:
    """After it was committed."""
    for snapshot in _concerned(volume, losses):
        snapshot.suspect = SUSPECT
    for chunk, previous in losses:
        names = ", ".join(f"{volume.name}@{one.name}" for one in volume.snapshots if one.epoch > previous)
        log.error(
            "volume %s, offset %d: %s can't be read there: these %d bytes are lost to %s",
            *(volume.name, chunk << CHUNK_SHIFT, volume.origin.path, CHUNK, names),
        )


def _concerned(volume: Volume, losses: list[Loss]) -> list[SnapshotRecord]:
    """The snapshots that share a lost chunk and are not marked with anything yet."""
    if not losses:
        return []
    oldest = min(previous for _, previous in losses)
    return [one for one in volume.snapshots if one.epoch > oldest and one.suspect is None]
