"""Was an origin changed while nbdsnap did not have it open?

A snapshot reads from the origin what was never overwritten.  So whoever else writes there changes the snapshot, and
nothing would say so.  A volume's *stamp* is what its file was when nbdsnap closed it.  It lies in the volume's record
exactly while no process of ours has the file open: it is written at the clean end, and removed, durably, before
the file may be written again.  After a crash there is none, and nothing can be said.

Inode, size and modification time are compared; of a block device the size alone, since it has nothing else that
tells, and only whether it is smaller: one may be enlarged to grow its volume.  Device numbers are not: another order of
the disks at boot changes them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from nbdsnap.engine.records import JsonObject, SnapshotRecord, VolumeRecord, VolumeState
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import OriginChangedError
from nbdsnap.store.index import Index, IndexWriter
from nbdsnap.store.origin import Origin

log = logging.getLogger(__name__)

SUSPECT = "the origin was changed by another program"
"""What snapshots are marked with when that was accepted."""


def stamp_of(origin: Origin) -> JsonObject:
    if origin.is_block_device:
        return {"size": origin.real_size()}
    status = os.fstat(origin.fd)
    return {"inode": status.st_ino, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def check_stamp(record: VolumeRecord, snapshots: Iterable[SnapshotRecord], origin: Origin) -> None:
    """Raise OriginChangedError where the origin is not what it was, and that matters to a snapshot."""
    live = [snapshot for snapshot in snapshots if not snapshot.deleting]
    found = stamp_of(origin)
    if record.stamp is None or not live or record.stamp == found:
        return
    if origin.is_block_device and record.stamp["size"] < found["size"]:
        return  # it was enlarged, to be grown into
    raise OriginChangedError(
        f"the origin {origin.path} of volume {record.name} was changed while nbdsnap did not run "
        f"({_differences(record.stamp, found)}), and so, perhaps, were its {len(live)} snapshots",
        hint=f"put the old file back and restart; or go on with: nbdsnap volume accept {record.name}",
    )


def _differences(old: JsonObject, new: JsonObject) -> str:
    words = [f"{key} {old.get(key)}, now {new.get(key)}" for key in ("size", "inode") if old.get(key) != new.get(key)]
    if old.get("mtime_ns") != new.get("mtime_ns"):
        words.append(f"modified {_time(new.get('mtime_ns'))}")
    return "; ".join(words)


def _time(mtime_ns: int | None) -> str:
    return "?" if mtime_ns is None else datetime.fromtimestamp(mtime_ns / 1e9, UTC).isoformat(timespec="milliseconds")


def remove_stamps(index: Index, volumes: Iterable[Volume]) -> None:
    """From here on the origins of ``volumes`` may be written."""
    _store(index, [(volume, None) for volume in volumes if volume.record.stamp is not None])


def put_stamps(index: Index, volumes: Iterable[Volume]) -> None:
    """At the clean end, when no byte of the origins of ``volumes`` changes any more."""
    stamped = [(volume, volume.origin) for volume in volumes if volume.snapshots and isinstance(volume.origin, Origin)]
    for _, origin in stamped:  # or a power cut would take the modification time back, and leave the stamp
        origin.sync_with_times()
    _store(index, [(volume, stamp_of(origin)) for volume, origin in stamped])


def _store(index: Index, stamps: list[tuple[Volume, JsonObject | None]]) -> None:
    if not stamps:
        return
    records = [replace(volume.record, stamp=stamp) for volume, stamp in stamps]

    def change(txn: IndexWriter) -> None:
        for record in records:
            txn.put_volume(record.number, record.to_json())

    index.update(change)
    for (volume, _), record in zip(stamps, records, strict=True):
        volume.record = record


def accept(index: Index, state: VolumeState) -> list[str]:
    """Forget the stamp, and mark the live snapshots, durably.  Returns the names of those."""
    record = replace(state.record, stamp=None)
    marked = [replace(snapshot, suspect=SUSPECT) for snapshot in state.snapshots]

    def change(txn: IndexWriter) -> None:
        txn.put_volume(record.number, record.to_json())
        for snapshot in marked:
            txn.put_snapshot(record.number, snapshot.epoch, snapshot.to_json())

    index.update(change)
    state.record, state.snapshots = record, marked
    return [f"{state.name}@{snapshot.name}" for snapshot in marked]
