"""The JSON that scripts read, as pydantic models: what commands print with ``--json`` and what the
management API carries.

Offsets, lengths and sizes are integers, in bytes.  Times are RFC 3339, UTC.  Fields may be added;
none changes its meaning.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field


class VolumeInfo(BaseModel):
    name: str
    kind: str
    size: int
    origin: str | None
    base: str | None = None
    """The snapshot that a clone was made of, as VOLUME@NAME."""
    created: datetime
    snapshots: int = 0
    connections: int = 0
    error: str | None = None
    """Why the volume can't be served (or written) now; None where all is well."""
    replica: bool = False
    """It follows another pool's volume, and takes no writes from clients."""
    receiving: str | None = None
    """The snapshot that it is receiving, or has begun to; None where there is none."""


class SnapshotInfo(BaseModel):
    volume: str
    name: str
    created: datetime
    size: int
    priority: int = 0
    held: bool = False
    exclusive_bytes: int = 0
    shared_bytes: int = 0
    connections: int = 0
    clones: list[str] = []
    """Volumes that are clones of it."""
    problem: str | None = None
    """Why its content may differ from what it was, or can't all be read; None where all is well."""
    id: str = ""
    """Two snapshots with the same one have the same content, whichever pools they are in."""


class Extent(BaseModel):
    offset: int
    length: int


class Diff(BaseModel):
    """The ranges that changed: ascending, disjoint, not adjacent.  ``to`` is None for the live volume."""

    from_: str = Field(alias="from", serialization_alias="from")
    to: str | None
    bytes: int
    extents: list[Extent]

    model_config = {"populate_by_name": True}


class VolumeStatus(BaseModel):
    name: str
    kind: str
    size: int
    origin: str | None
    base: str | None = None
    created: datetime
    connections: int = 0
    error: str | None = None
    replica: bool = False
    receiving: str | None = None
    live_bytes: int | None = None
    """What the live data of a thin volume or clone takes in the store; None for an origin."""
    snapshots: list[SnapshotInfo]


class StoreStatus(BaseModel):
    used_bytes: int
    limit_bytes: int | None
    allocated_bytes: int
    index_bytes: int
    free_bytes: int = 0
    """What the store can still take, by its limit and its file system."""
    reclaiming_bytes: int = 0
    """Of the used ones: what deletions under way have yet to give back."""
    warning: str | None = None
    """Set where it is fuller than the configuration wants to be told."""


class Sharing(BaseModel):
    """How many preserved bytes are needed by exactly ``shared_by`` snapshots."""

    shared_by: int
    bytes: int


class PoolStatus(BaseModel):
    path: str
    volumes: list[VolumeStatus]
    store: StoreStatus
    sharing: list[Sharing]
    problem: str | None = None
    """Why the pool can't do its work, such as a disk that fails; None where all is well."""


class MapRow(BaseModel):
    """What was changed from the snapshot ``since`` to the next one, or to the live volume: bytes by cell."""

    since: str
    changed_bytes: list[int]


class VolumeMap(BaseModel):
    """A volume in cells of ``cell_bytes``, the last one perhaps shorter.

    ``sharers``: by cell, how many snapshots share what is preserved there, on average (of a sample, where there is
    much); 0 where nothing is.
    """

    volume: str
    size: int
    cell_bytes: int
    rows: list[MapRow]
    sharers: list[float]


class Problem(BaseModel):
    """One violated invariant, as ``check`` reports it; ``kind`` is a stable word, ``detail`` is for a person.

    The rest is what it affects, where that can be told: the snapshots (as ``VOLUME@NAME``) whose content of that range
    of bytes can't be read, or may be wrong.
    """

    kind: str
    detail: str
    volume: str | None = None
    snapshots: list[str] = []
    offset: int | None = None
    length: int | None = None


class RepairStep(BaseModel):
    """One thing that a repair does (or would do); the fields as of a :class:`Problem`."""

    kind: str
    detail: str
    volume: str | None = None
    snapshots: list[str] = []
    offset: int | None = None
    length: int | None = None


class RepairReport(BaseModel):
    """``done``: whether the steps were taken, not only planned."""

    done: bool
    steps: list[RepairStep]


class CheckReport(BaseModel):
    ok: bool
    problems: list[Problem]


class RollbackReport(BaseModel):
    """A rollback to ``snapshot``: ``bytes`` of the volume are (or would be) written over, and of these newer snapshots
    need at most ``preserved_bytes``, which the store takes."""

    snapshot: str
    bytes: int
    preserved_bytes: int
    done: bool


class KeptSnapshot(BaseModel):
    """One that its schedule would drop, and why it stays."""

    name: str
    reason: str


class PruneReport(BaseModel):
    """What schedules do not keep any more: deleted (or, in a dry run, to be deleted), and kept all the same."""

    names: list[str]
    freed_bytes: int
    kept: list[KeptSnapshot]


class SnapshotDeletion(BaseModel):
    """What was deleted, or would be: names as ``VOLUME@NAME``, and the bytes of the store that it gives back."""

    names: list[str]
    freed_bytes: int


class DeltaPoint(BaseModel):
    """A snapshot as a delta names it: equal ids, wherever they are, mean equal content."""

    name: str
    id: str
    size: int


class DeltaEncoding(BaseModel):
    """What is stored one way in a delta: ``bytes`` of the volume, which take ``stored_bytes``."""

    extents: int
    bytes: int
    stored_bytes: int


class DeltaInfo(BaseModel):
    """What a delta stream holds.  ``base`` is None where it holds all of the snapshot.

    ``start``: not 0 where it goes on for a stream that was cut there.  ``digest``: SHA-256 of the whole stream.
    """

    volume: str
    volume_id: str
    to: DeltaPoint
    base: DeltaPoint | None
    created: datetime
    start: int
    stream_bytes: int
    frames: int
    extents: int
    bytes: int
    encodings: dict[str, DeltaEncoding]
    digest: str


class SendReport(BaseModel):
    """What was sent, or would be.  ``bytes``: of the volume that are looked at: as much as there is to send, at most.

    ``stream_bytes``: written; 0 where nothing was.
    """

    snapshot: str
    base: str | None
    size: int
    bytes: int
    extents: int
    stream_bytes: int
    digest: str
    done: bool


class ReceiveReport(BaseModel):
    """What was received.  ``token``: where nothing came now, what the rest of an earlier stream is asked for with."""

    snapshot: str
    size: int
    stream_bytes: int
    bytes: int
    digest: str
    done: bool
    token: str | None = None


class ApplyReport(BaseModel):
    """What was written to a raw file or device."""

    target: str
    volume: str
    snapshot: str
    base: str | None
    extents: int
    bytes: int
    stream_bytes: int
    digest: str


class ReplicationStatus(BaseModel):
    """How far a target is.  ``state``: starting, idle, sending or failing.

    ``snapshot`` and ``point``: the newest snapshot that it has, and when that was taken.  ``lag_seconds``: how old that
    is, 0 where nothing was written since; ``lag_bytes``: how much that was.  ``rate``: bytes of stream per second, of
    the last one.  ``failures``: in a row.
    """

    volume: str
    target: str
    state: str
    snapshot: str | None
    point: datetime | None
    lag_seconds: float | None
    lag_bytes: int | None
    sending: str | None
    done: int
    total: int
    rate: int
    sent_bytes: int
    sent_snapshots: int
    failures: int
    error: str | None
    next_in_s: float
