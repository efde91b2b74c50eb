"""Repair of a pool that no process has open: what is provably lost is removed, and everything else kept.

The live data of origins is never touched: it is in their files.  That of thin volumes and clones is in the store, and
where it is, in the index: see :mod:`nbdsnap.engine.repairlive`.  What is done is planned first, as data
(:class:`Plan`), and executed by writing a new index, which takes the old one's name when it is whole; the old one stays
beside it, under the name ``index.mdb.damaged``.  So a repair that fails, or is cut short, has changed nothing.

What is believed
----------------
* A preserved chunk, if its content matches its checksum, which covers its volume, number and epoch: then the record is
  right, whatever the other tables say.
* ``changed``, where all of it can be read, for what *should* be in ``preserved``.  A chunk that is missing there is
  *lost*, if anything else says that records were lost: a damaged page, or a record that matches nothing.  Otherwise
  ``changed`` is what is wrong.
* Everything else is computed anew from ``preserved``.

What becomes of the lost
------------------------
* A lost chunk stays in the index, marked as such: a snapshot that needs it gives an error for this range, where without
  the mark it would give the live data of today.  All else of the snapshot can be read; whether it is worth keeping is
  for a person to decide.  ``check`` names the range for as long as there is such a snapshot.
* Snapshots are dropped whole where nobody can say which of their chunks are lost: where ``preserved`` and ``changed``
  are both damaged.
* A volume whose record is lost is dropped: its name and its file's are not known.  So is a snapshot whose record is.
* Of the intent log, what can be read is kept, for the next start, if it is certain that it was not retired.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice

from nbdsnap.engine.check import Checker, Chunks, Served, load_records, reads_back
from nbdsnap.engine.offline import OfflinePool, OfflineSource
from nbdsnap.engine.records import SnapshotRecord, VolumeRecord, now
from nbdsnap.engine.repairlive import LivePlan, Taken, live_items, live_steps, plan_live
from nbdsnap.engine.repairlog import LogPlan, plan_log
from nbdsnap.errors import NoSpaceError
from nbdsnap.models import RepairStep
from nbdsnap.store import pagesums
from nbdsnap.store.index import Index, IndexWriter, JsonObject, NewRecords, Record
from nbdsnap.store.layout import (
    BLOCK_SHIFT,
    CHUNK,
    FORMAT_VERSION,
    LOST_SLOT,
    MAX_SLOTS,
    NEW_INDEX_FILE,
    SUMS_FILE,
    ZERO_SLOT,
)
from nbdsnap.store.salvage import Salvage, chunks_of_block

BATCH_RECORDS = 65536
"""Records written in one transaction of the new index."""

DAMAGED_SUFFIX = ".damaged"

Place = tuple[int, int]
"""``(chunk, epoch)``."""


@dataclass
class VolumePlan:
    """``lost``: records to mark, whether they are there or not.  ``bogus``: records that are none of the volume's.
    ``zeroes``: records whose slot is beyond the store's end, and whose checksum is right: so the slot is what is wrong.
    """

    volume: VolumeRecord
    snapshots: list[SnapshotRecord]
    lost: set[Place] = field(default_factory=set)
    zeroes: set[Place] = field(default_factory=set)
    bogus: set[Place] = field(default_factory=set)
    live: LivePlan = field(default_factory=lambda: LivePlan(0))


@dataclass
class Plan:
    steps: list[RepairStep] = field(default_factory=list)
    meta: JsonObject = field(default_factory=dict)
    volumes: list[VolumePlan] = field(default_factory=list)
    rewrite_index: bool = False
    log: LogPlan = field(default_factory=LogPlan)


def plan_repair(pool: OfflinePool) -> Plan:
    """What is to be done; nothing where all is well.  Reads all preserved data.  CorruptionError where the index holds
    nothing to go by."""
    plan = Plan()
    plan.log = plan_log(pool.io, pool.path)
    plan.steps.extend(plan.log.steps)
    with pool.salvage() as salvage, pool.store() as store:
        salvage.read_all()
        problems = list(Checker(OfflineSource(salvage), store, data=True).problems())
        healthy = all(problem.kind == "lost" for problem in problems)
        if healthy and not salvage.damage and not salvage.damaged_pages and salvage.meta() is not None:
            return plan
        plan.rewrite_index = True
        _plan_index(plan, salvage, store)
        if not any(step.kind != "log" for step in plan.steps):
            plan.steps.append(RepairStep(kind="rebuild", detail="the index is written anew from its preserved chunks"))
    return plan


def _plan_index(plan: Plan, salvage: Salvage, store: Chunks) -> None:
    volumes, snapshots = load_records(salvage)
    for number in sorted((salvage.numbers() | snapshots.keys()) - volumes.keys()):
        detail = f"volume number {number}: its record is lost; drop what the pool has of it (an origin's file stays)"
        plan.steps.append(RepairStep(kind="drop-volume", detail=detail))
    highest = max([0, *volumes, *snapshots, *salvage.numbers()])
    plan.meta = salvage.meta() or _new_meta(highest)
    if salvage.meta() is None:
        plan.steps.append(RepairStep(kind="rebuild", detail="the pool's own record is lost: make a new one"))
    for damage in salvage.damage:
        if damage.table == "snapshots":
            plan.steps.append(RepairStep(kind="drop-snapshot", detail=f"{damage.why}: the snapshots in it are lost"))
    for number, volume in sorted(volumes.items()):
        plan.volumes.append(_plan_volume(plan, salvage, store, volume, snapshots.get(number, [])))
    taken = Taken()
    for planned in plan.volumes:
        for record in _records(salvage, planned):
            if record.has_slot:
                taken.add(record.slot)
    for planned in plan.volumes:
        planned.live = plan_live(salvage, planned.volume, taken)
        plan.steps.extend(live_steps(planned.volume, planned.live))


def _new_meta(highest: int) -> JsonObject:
    return {
        "format": FORMAT_VERSION,
        "id": str(uuid.uuid4()),
        "created": now().isoformat(),
        "next_volume": highest + 1,
    }


def _plan_volume(
    plan: Plan, salvage: Salvage, store: Chunks, volume: VolumeRecord, snapshots: list[SnapshotRecord]
) -> VolumePlan:
    planned = VolumePlan(_with_epoch(volume, snapshots), snapshots)
    number = volume.number
    if salvage.is_damaged("preserved", number) and salvage.is_damaged("changed", number):
        for snapshot in snapshots:
            name = f"{volume.name}@{snapshot.name}"
            detail = f"{name}: which of its chunks are lost can't be told; drop it"
            plan.steps.append(RepairStep(kind="drop-snapshot", detail=detail, volume=volume.name, snapshots=[name]))
        planned.snapshots = []
        return planned
    served = Served(planned.volume, snapshots)
    changed = {(epoch, block): members for epoch, block, members in salvage.changed(number)}
    is_whole = not salvage.is_damaged("changed", number)
    buffer = memoryview(bytearray(CHUNK))
    for record in salvage.records(number):
        place = record.chunk, record.epoch
        where = record.epoch, record.chunk >> BLOCK_SHIFT
        bit = 1 << (record.chunk & ((1 << BLOCK_SHIFT) - 1))
        listed = changed.get(where, 0) & bit
        changed[where] = changed.get(where, 0) & ~bit
        if served.is_beyond(record):
            planned.bogus.add(place)
        elif record.slot != LOST_SLOT and not reads_back(store, number, record, buffer):
            (planned.lost if listed or not is_whole else planned.bogus).add(place)
        elif record.has_slot and record.slot >= store.file_slots:
            planned.zeroes.add(place)
    if planned.bogus or salvage.is_damaged("preserved", number):
        for (epoch, block), members in changed.items():
            planned.lost.update((chunk, epoch) for chunk in chunks_of_block(block, members))
        planned.lost = {place for place in planned.lost if not served.is_beyond(Record(*place, LOST_SLOT, 0))}
    plan.steps.extend(_lost_steps(salvage, planned, served))
    if planned.bogus:
        detail = f"volume {volume.name}: remove {len(planned.bogus)} records that are none of its chunks'"
        plan.steps.append(RepairStep(kind="remove", detail=detail, volume=volume.name))
    return planned


def _with_epoch(volume: VolumeRecord, snapshots: list[SnapshotRecord]) -> VolumeRecord:
    """The volume, its present epoch after all of its snapshots'."""
    volume.epoch = max([volume.epoch, *(snapshot.epoch + 1 for snapshot in snapshots)])
    return volume


def _lost_steps(salvage: Salvage, planned: VolumePlan, served: Served) -> Iterator[RepairStep]:
    """What the snapshots lose, as ranges: one step for each, neighbours together."""
    first: Place | None = None
    end = interval = None
    for chunk, epoch, before in _intervals(salvage, planned):
        if (chunk, epoch) not in planned.lost or served.is_useless(before, epoch):
            continue
        if first is None or chunk != end or (before, epoch) != interval:
            if first is not None and interval is not None:
                yield _lost_step(served, first[0], end, interval)
            first, interval = (chunk, epoch), (before, epoch)
        end = chunk + 1
    if first is not None and interval is not None:
        yield _lost_step(served, first[0], end, interval)


def _lost_step(served: Served, first: int, end: int | None, interval: tuple[int, int]) -> RepairStep:
    offset, length = served.bytes(first, end)
    names = served.names(*interval)
    return RepairStep(
        kind="lost",
        detail=f"{', '.join(names)}, bytes {offset} to {offset + length - 1}: lost; mark them, so that reads fail",
        volume=served.volume.name,
        snapshots=names,
        offset=offset,
        length=length,
    )


def _intervals(salvage: Salvage, planned: VolumePlan) -> Iterator[tuple[int, int, int]]:
    """``(chunk, epoch, previous epoch)`` of the records that will be, useless ones included."""
    previous: Place = (-1, 0)
    for record in _records(salvage, planned):
        yield record.chunk, record.epoch, previous[1] if previous[0] == record.chunk else 0
        previous = record.chunk, record.epoch


def _records(salvage: Salvage, planned: VolumePlan) -> Iterator[Record]:
    """What ``preserved`` will hold of the volume: what is intact, and marks for what is lost.  Ascending."""
    lost, bogus, zeroes = planned.lost, planned.bogus, planned.zeroes
    kept = (
        Record(record.chunk, record.epoch, ZERO_SLOT, record.checksum)
        if (record.chunk, record.epoch) in zeroes
        else record
        for record in salvage.records(planned.volume.number)
        if (record.chunk, record.epoch) not in lost and (record.chunk, record.epoch) not in bogus
    )
    marks = (Record(chunk, epoch, LOST_SLOT, 0) for chunk, epoch in sorted(lost))
    return merge(kept, marks, key=lambda record: (record.chunk, record.epoch))


# Executing


def repair(pool: OfflinePool, plan: Plan) -> None:
    """Do what is planned."""
    plan.log.execute()
    if not plan.rewrite_index:
        return
    new = pool.path / NEW_INDEX_FILE
    new_lock = new.with_name(f"{new.name}-lock")
    for path in (new, new_lock):
        pool.io.unlink(path)
    try:
        index = Index(new, create=True)
        try:
            with pool.salvage() as salvage:
                index.update(lambda txn: _write_records(txn, plan))
                for planned in plan.volumes:
                    _write_volume(index, salvage, planned)
        finally:
            index.close()
        _install(pool)
    except (NoSpaceError, OSError):
        pool.io.unlink(new)
        raise
    finally:
        pool.io.unlink(new_lock)


def _install(pool: OfflinePool) -> None:
    """The new index takes the name of the old one, which gets another."""
    old = pool.index_path.with_name(f"{pool.index_path.name}{DAMAGED_SUFFIX}")
    pool.io.unlink(old)
    pool.io.unlink(pool.path / SUMS_FILE)
    pool.io.link(pool.index_path, old)
    pool.io.fsync_directory(pool.path)
    pool.io.rename(pool.path / NEW_INDEX_FILE, pool.index_path)
    pool.io.fsync_directory(pool.path)
    pagesums.write_sums(pool.io, pool.index_path)


def _write_records(txn: IndexWriter, plan: Plan) -> None:
    txn.put_meta(plan.meta)
    for planned in plan.volumes:
        txn.put_volume(planned.volume.number, planned.volume.to_json())
        for snapshot in planned.snapshots:
            txn.put_snapshot(planned.volume.number, snapshot.epoch, snapshot.to_json())


def _write_volume(index: Index, salvage: Salvage, planned: VolumePlan) -> None:
    """The records that serve a snapshot, and what the other tables say of them."""
    number = planned.volume.number
    served = Served(planned.volume, planned.snapshots)
    useful = _useful(_records(salvage, planned), served)
    while batch := list(islice(useful, BATCH_RECORDS)):
        _write_batch(index, number, batch)
    items = live_items(salvage, planned.volume, planned.live)
    while part := list(islice(items, BATCH_RECORDS)):
        index.update(lambda txn, part=part: _write_live(txn, number, part))  # type: ignore[misc]


def _write_live(txn: IndexWriter, number: int, items: list[tuple[int, int]]) -> None:
    txn.current(number).change(items)
    txn.change_slots(used=[slot for _, slot in items if slot < MAX_SLOTS])


def _write_batch(index: Index, number: int, batch: list[tuple[Record, int]]) -> None:
    usage: dict[tuple[int, int], int] = {}
    for record, before in batch:
        if record.has_slot:
            usage[before, record.epoch] = usage.get((before, record.epoch), 0) + 1

    by_epoch: dict[int, list[Record]] = {}
    for record, _ in batch:
        by_epoch.setdefault(record.epoch, []).append(record)

    def change(txn: IndexWriter) -> None:
        for epoch, records in by_epoch.items():
            txn.preserve(number, NewRecords.of(epoch, records))
        txn.change_slots(used=[record.slot for record, _ in batch if record.has_slot])
        txn.add_usage(number, usage)

    index.update(change)


def _useful(records: Iterator[Record], served: Served) -> Iterator[tuple[Record, int]]:
    """The records that serve a snapshot, each with the epoch of the one before it."""
    chunk, before = -1, 0
    for record in records:
        if record.chunk != chunk:
            chunk, before = record.chunk, 0
        if not served.is_useless(before, record.epoch):
            yield record, before
            before = record.epoch
