"""The management operations, as one table: what the control API offers and what the command line calls.

An operation is a name, a request model, a response type and a function on the pool.  It may also report *events*
while it runs (a diff its extents, a check its progress), so that no answer has to fit into memory.  It runs the same
way in both places:

* in a server, on a worker thread, with the events written to the client's connection (nbdsnap.server.control);
* without a server, in the command itself, on the pool that it opened (nbdsnap.client).

``emit`` may block (a slow reader holds the operation up, not the memory), and it raises when nobody waits for the
answer any more: then the operation ends there.  An operation that takes long emits, or can't be interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, create_model

from nbdsnap.errors import NbdsnapError, ServerError, UsageError, from_wire
from nbdsnap.models import (
    CheckReport,
    Extent,
    PoolStatus,
    PruneReport,
    ReceiveReport,
    ReplicationStatus,
    RollbackReport,
    SendReport,
    SnapshotDeletion,
    SnapshotInfo,
    VolumeInfo,
    VolumeMap,
    VolumeStatus,
)

if TYPE_CHECKING:  # a client of the API needs the table, not the engine
    from nbdsnap.engine.pool import Pool
    from nbdsnap.engine.schedule import Schedule

EXTENTS_PER_EVENT = 1024
"""Some 50 KiB of JSON: large enough that the event costs nothing beside its content, small enough to be no memory."""

MAX_NAMES = 100_000
"""Snapshots named in one request; the 16 MiB that the control API accepts hold little more."""

EVENTS_AHEAD = 4
"""Events that an operation may be ahead of whoever takes them: enough to keep both busy."""

PROGRESS_INTERVAL_S = 0.1
"""Between two reports of progress: smooth to the eye, and nothing beside the work."""

Emit = Callable[[Any], None]


class AbandonedError(Exception):
    """Raised by ``emit``: nobody waits for the answer any more."""


# Requests


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _check_absolute(path: Path) -> Path:
    if not path.is_absolute():  # the server's working directory means nothing to its client
        raise ValueError("the path has to be absolute")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_check_absolute)]
Names = Annotated[list[str], Field(min_length=1, max_length=MAX_NAMES)]


class Nothing(Request):
    """No arguments."""


class VolumeCreate(Request):
    """Either ``origin``, or ``thin`` and ``size``."""

    name: str
    origin: AbsolutePath | None = None
    size: int | None = Field(default=None, gt=0)
    thin: bool = False


class CloneOf(Request):
    snapshot: str
    name: str


class VolumeFlatten(Request):
    name: str


class VolumeShow(Request):
    name: str


class MapScope(Request):
    name: str
    cells: int = 64
    rows: int = 20


class VolumeAccept(Request):
    name: str


class VolumeResize(Request):
    name: str
    size: int = Field(gt=0)
    shrink: bool = False
    dry_run: bool = False


class VolumeDelete(Request):
    name: str
    snapshots: bool = False
    dry_run: bool = False


class SnapshotCreate(Request):
    names: Names


class SnapshotList(Request):
    volume: str | None = None


class SnapshotDelete(Request):
    names: Names
    dry_run: bool = False
    wait: bool = True


class SnapshotNames(Request):
    names: Names


class SnapshotPriority(Request):
    name: str
    priority: int


class ScheduleRule(Request):
    """A schedule, as ``[[volume]] snapshots`` has it, of ``volume``."""

    volume: str
    label: str
    at: str
    keep: int


class SnapshotPrune(Request):
    """``schedules``: the configuration's."""

    schedules: list[ScheduleRule]
    dry_run: bool = False


class RollbackTo(Request):
    name: str
    force: bool = False
    dry_run: bool = False


class Send(Request):
    """``stream``: where the delta is written: a file or FIFO, or a socket (see :mod:`nbdsnap.transfer.channel`).

    ``from``: a snapshot of the same volume, as ``VOLUME@NAME``.  ``resume``: a token, instead of names.
    """

    to: str | None = None
    from_: str | None = Field(default=None, alias="from")
    stream: AbsolutePath | None = None
    compress: Literal["none", "auto", "best"] = "auto"
    rate_limit: int | None = Field(default=None, gt=0)
    resume: str | None = None
    dry_run: bool = False


class ReceiveInto(Request):
    """``stream``: where the delta is read: likewise.  ``resume``: keep what came where the stream is cut."""

    volume: str
    stream: AbsolutePath
    name: str | None = None
    create: bool = False
    force: bool = False
    resume: bool = False


class ReceiveOf(Request):
    volume: str


class ReplicaOf(Request):
    name: str


class ReplicateRun(Request):
    """``wait``: until all that was wanted is done, or has failed."""

    volume: str | None = None
    wait: bool = False


class DiffRange(Request):
    """``to`` is None for the live volume."""

    from_: str = Field(alias="from")
    to: str | None = None


class CheckScope(Request):
    data: bool = False


# Events, and responses that only operations with events have


class Progress(BaseModel):
    done: int
    total: int


class Reclaimed(BaseModel):
    """What was still to be given back when the operation began."""

    bytes: int


class DiffExtents(BaseModel):
    """The next ranges, in ascending order."""

    extents: list[Extent]


class DiffTotal(BaseModel):
    """What remains to be said when all extents have been sent."""

    from_: str = Field(alias="from", serialization_alias="from")
    to: str | None
    bytes: int

    model_config = ConfigDict(populate_by_name=True)


class ErrorReport(BaseModel):
    """:meth:`nbdsnap.errors.NbdsnapError.to_wire`, as a model."""

    kind: str
    message: str
    hint: str = ""

    def error(self) -> NbdsnapError:
        return from_wire(self.kind, self.message, self.hint)


# The table

Req = TypeVar("Req", bound=Request)
Res = TypeVar("Res")


@dataclass(frozen=True)
class Operation(Generic[Req, Res]):
    """One row.  ``event``: the model of its events; None where it has none and answers at once."""

    name: str
    summary: str
    request: type[Req]
    response: Any
    run: Callable[[Pool, Req, Emit], Res]
    event: type[BaseModel] | None = None

    @cached_property
    def response_adapter(self) -> TypeAdapter[Res]:
        return TypeAdapter(self.response)

    @cached_property
    def line_model(self) -> type[BaseModel]:
        """One line of the answer of an operation with events: exactly one of its fields is there."""
        assert self.event is not None, self.name
        fields: dict[str, Any] = {
            "event": (self.event | None, None),
            "result": (self.response | None, None),
            "error": (ErrorReport | None, None),
        }
        return create_model(f"{self.name}.line", **fields)


def _diff(pool: Pool, request: DiffRange, emit: Emit) -> DiffTotal:
    total = 0
    extents = pool.diff(request.from_, request.to)
    for batch in _batches(extents):
        total += sum(extent.length for extent in batch)
        emit(DiffExtents.model_construct(extents=batch))
    return DiffTotal.model_validate({"from": request.from_, "to": request.to, "bytes": total})


def _batches(extents: Iterator[Extent]) -> Iterator[list[Extent]]:
    while batch := list(islice(extents, EXTENTS_PER_EVENT)):
        yield batch


def _progress_to(emit: Emit) -> Callable[[int, int], None]:
    due = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due or done == total:
            due = now + PROGRESS_INTERVAL_S
            emit(Progress.model_construct(done=done, total=total))

    return progress


def _schedules(request: SnapshotPrune) -> dict[str, list[Schedule]]:
    from nbdsnap.engine.schedule import parse_schedules

    found: dict[str, list[Schedule]] = {}
    for rule in request.schedules:
        try:
            found.setdefault(rule.volume, []).extend(parse_schedules({rule.label: {"at": rule.at, "keep": rule.keep}}))
        except ValueError as error:
            raise UsageError(str(error)) from None
    return found


def _check(pool: Pool, request: CheckScope, emit: Emit) -> CheckReport:
    return pool.check(data=request.data, progress=_progress_to(emit))


def _flatten(pool: Pool, request: VolumeFlatten, emit: Emit) -> VolumeInfo:
    return pool.volume_flatten(request.name, progress=_progress_to(emit))


def _rollback(pool: Pool, request: RollbackTo, emit: Emit) -> RollbackReport:
    return pool.rollback(request.name, force=request.force, dry_run=request.dry_run, progress=_progress_to(emit))


def _send(pool: Pool, request: Send, emit: Emit) -> SendReport:
    from nbdsnap.delta.choice import Compression
    from nbdsnap.transfer.channel import opened_stream
    from nbdsnap.transfer.pace import Progress as Pace
    from nbdsnap.transfer.pace import RateLimit
    from nbdsnap.transfer.send import Sender, select
    from nbdsnap.transfer.streams import Sink

    pace = Pace(_emit_to(emit))
    with Sender(pool, select(pool, request.to, request.from_, request.resume), Compression(request.compress)) as sender:
        if request.dry_run:
            return sender.report()
        if request.stream is None:
            raise UsageError("there is nowhere to send it to", hint="name a `stream`")
        with opened_stream(request.stream, write=True) as fd, closing(Sink(fd, pace.tick)) as sink:
            return sender.send(sink, pace, RateLimit(request.rate_limit, pace.tick))


def _receive(pool: Pool, request: ReceiveInto, emit: Emit) -> ReceiveReport:
    from nbdsnap.transfer.channel import opened_stream
    from nbdsnap.transfer.pace import Progress as Pace
    from nbdsnap.transfer.receive import nothing_came, receive
    from nbdsnap.transfer.streams import Source

    pace = Pace(_emit_to(emit))
    with opened_stream(request.stream, write=False) as fd:
        source = Source(fd, pace.tick)
        if request.resume and (known := nothing_came(pool, request.volume, source)) is not None:
            return known
        return receive(
            pool,
            request.volume,
            source,
            pace,
            name=request.name,
            create=request.create,
            force=request.force,
            resumable=request.resume,
        )


def _receive_abort(pool: Pool, request: ReceiveOf, _: Emit) -> VolumeStatus:
    pool.receive_abort(request.volume)
    return pool.volume_show(request.volume)


def _replicator(pool: Pool) -> Any:
    if pool.replicator is None:
        raise ServerError("no server replicates this pool", hint="replication runs inside `nbdsnap serve`")
    return pool.replicator


def _replicate_run(pool: Pool, request: ReplicateRun, emit: Emit) -> list[ReplicationStatus]:
    def tick() -> None:
        if pace.due():
            statuses = replicator.status()
            done, total = sum(one.done for one in statuses), sum(one.total for one in statuses)
            emit(Progress.model_construct(done=done, total=total))

    replicator = _replicator(pool)
    pace = _Pace()
    found: list[ReplicationStatus] = replicator.run(request.volume, tick if request.wait else None)
    return found


class _Pace:
    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        moment = time.monotonic()
        if moment < self._next:
            return False
        self._next = moment + PROGRESS_INTERVAL_S
        return True


def _emit_to(emit: Emit) -> Callable[[int, int], None]:
    return lambda done, total: emit(Progress.model_construct(done=done, total=total))


VOLUME_CREATE: Operation[VolumeCreate, VolumeInfo] = Operation(
    "volume.create",
    "Add a volume: its live data is the raw file or block device `origin`, or in the pool where it is `thin`.",
    VolumeCreate,
    VolumeInfo,
    lambda pool, request, _: pool.volume_create(request.name, request.origin, request.size, thin=request.thin),
)
CLONE: Operation[CloneOf, VolumeInfo] = Operation(
    "clone",
    "Make a writable volume with the content of a snapshot, which it keeps from being deleted.",
    CloneOf,
    VolumeInfo,
    lambda pool, request, _: pool.clone(request.snapshot, request.name),
)
VOLUME_FLATTEN: Operation[VolumeFlatten, VolumeInfo] = Operation(
    "volume.flatten",
    "Copy what a clone still has from its base, which it frees.",
    VolumeFlatten,
    VolumeInfo,
    _flatten,
    Progress,
)
VOLUME_LIST: Operation[Nothing, list[VolumeInfo]] = Operation(
    "volume.list",
    "All volumes.",
    Nothing,
    list[VolumeInfo],
    lambda pool, _request, _: pool.volume_list(),
)
VOLUME_SHOW: Operation[VolumeShow, VolumeStatus] = Operation(
    "volume.show",
    "One volume with its snapshots.",
    VolumeShow,
    VolumeStatus,
    lambda pool, request, _: pool.volume_show(request.name),
)
VOLUME_MAP: Operation[MapScope, VolumeMap] = Operation(
    "volume.map",
    "Where on a volume its changes lie, between its newest snapshots, and how much is shared there.",
    MapScope,
    VolumeMap,
    lambda pool, request, _: pool.volume_map(request.name, request.cells, request.rows),
)
VOLUME_ACCEPT: Operation[VolumeAccept, VolumeStatus] = Operation(
    "volume.accept",
    "Serve a volume although its origin was changed while no server ran; its snapshots are marked.",
    VolumeAccept,
    VolumeStatus,
    lambda pool, request, _: pool.volume_accept(request.name),
)
VOLUME_RESIZE: Operation[VolumeResize, VolumeInfo] = Operation(
    "volume.resize",
    "Give a volume another size while it is in use; its snapshots keep theirs. A smaller one only with `shrink`. "
    "With `dry_run`, only say whether that is possible.",
    VolumeResize,
    VolumeInfo,
    lambda pool, request, _: pool.volume_resize(
        request.name, request.size, shrink=request.shrink, dry_run=request.dry_run
    ),
)
VOLUME_DELETE: Operation[VolumeDelete, VolumeStatus] = Operation(
    "volume.delete",
    "Forget a volume, with its snapshots only where `snapshots` is true; its raw file stays. "
    "With `dry_run`, only say what would go.",
    VolumeDelete,
    VolumeStatus,
    lambda pool, request, _: pool.volume_delete(request.name, snapshots=request.snapshots, dry_run=request.dry_run),
)
SNAPSHOT_CREATE: Operation[SnapshotCreate, list[SnapshotInfo]] = Operation(
    "snapshot.create",
    "Take snapshots: all or none, all at one instant.",
    SnapshotCreate,
    list[SnapshotInfo],
    lambda pool, request, _: pool.snapshot_create(request.names),
)
SNAPSHOT_LIST: Operation[SnapshotList, list[SnapshotInfo]] = Operation(
    "snapshot.list",
    "The snapshots of one volume, or of all, oldest first.",
    SnapshotList,
    list[SnapshotInfo],
    lambda pool, request, _: pool.snapshot_list(request.volume),
)
SNAPSHOT_DELETE: Operation[SnapshotDelete, SnapshotDeletion] = Operation(
    "snapshot.delete",
    "Delete snapshots: all or none. With `dry_run`, only say what that would free. "
    "Without `wait`, their space is given back after the answer.",
    SnapshotDelete,
    SnapshotDeletion,
    lambda pool, request, _: pool.snapshot_delete(request.names, dry_run=request.dry_run, wait=request.wait),
)
SNAPSHOT_RECLAIM: Operation[Nothing, Reclaimed] = Operation(
    "snapshot.reclaim",
    "Wait until the space of deleted snapshots has been given back.",
    Nothing,
    Reclaimed,
    lambda pool, _, emit: Reclaimed(bytes=pool.reclaim(_progress_to(emit))),
    Progress,
)
SNAPSHOT_HOLD: Operation[SnapshotNames, list[SnapshotInfo]] = Operation(
    "snapshot.hold",
    "Keep snapshots from being deleted, or dropped for want of space: all or none.",
    SnapshotNames,
    list[SnapshotInfo],
    lambda pool, request, _: pool.snapshot_hold(request.names),
)
SNAPSHOT_RELEASE: Operation[SnapshotNames, list[SnapshotInfo]] = Operation(
    "snapshot.release",
    "End the hold of snapshots: all or none.",
    SnapshotNames,
    list[SnapshotInfo],
    lambda pool, request, _: pool.snapshot_hold(request.names, held=False),
)
SNAPSHOT_PRIORITY: Operation[SnapshotPriority, SnapshotInfo] = Operation(
    "snapshot.priority",
    "Set how much a snapshot matters when a full store has to drop some: -128 (drop first) to 127 (never).",
    SnapshotPriority,
    SnapshotInfo,
    lambda pool, request, _: pool.snapshot_priority(request.name, request.priority),
)
SNAPSHOT_PRUNE: Operation[SnapshotPrune, PruneReport] = Operation(
    "snapshot.prune",
    "Delete the snapshots that schedules do not keep any more, but what is held or in use; their space is given back "
    "after the answer. With `dry_run`, only say which.",
    SnapshotPrune,
    PruneReport,
    lambda pool, request, _: pool.prune(_schedules(request), dry_run=request.dry_run),
)
ROLLBACK: Operation[RollbackTo, RollbackReport] = Operation(
    "rollback",
    "Give the live volume the content of its snapshot `name`; every snapshot stays. Refused while clients have the "
    "volume open, but with `force`. With `dry_run`, only say how much that would change.",
    RollbackTo,
    RollbackReport,
    _rollback,
    Progress,
)
SEND: Operation[Send, SendReport] = Operation(
    "send",
    "Write a delta stream to `stream`: the snapshot `to`, whole, or as what differs from the older one `from`; or the "
    "rest of a stream that was cut, which the token `resume` tells. With `dry_run`, only say how much that would be.",
    Send,
    SendReport,
    _send,
    Progress,
)
RECEIVE: Operation[ReceiveInto, ReceiveReport] = Operation(
    "receive",
    "Read a delta stream from `stream` into a volume. The snapshot appears, as `name` where one is given, when all of "
    "it has come and was verified; else nothing changes. With `force`, the volume is rolled back to the base first. "
    "With `resume`, what came of a stream that is cut is kept, and an empty stream is answered by its `token`.",
    ReceiveInto,
    ReceiveReport,
    _receive,
    Progress,
)
RECEIVE_ABORT: Operation[ReceiveOf, VolumeStatus] = Operation(
    "receive.abort",
    "Undo what has come of a stream that was cut.",
    ReceiveOf,
    VolumeStatus,
    _receive_abort,
)
VOLUME_PROMOTE: Operation[ReplicaOf, VolumeStatus] = Operation(
    "volume.promote",
    "Make a replica a volume like any other: it can be written, and does not follow any more.",
    ReplicaOf,
    VolumeStatus,
    lambda pool, request, _: pool.volume_promote(request.name),
)
VOLUME_DEMOTE: Operation[ReplicaOf, VolumeStatus] = Operation(
    "volume.demote",
    "Make a volume a replica: it takes no writes, and gives up what it has when another pool replicates to it.",
    ReplicaOf,
    VolumeStatus,
    lambda pool, request, _: pool.volume_demote(request.name),
)
REPLICATE_STATUS: Operation[Nothing, list[ReplicationStatus]] = Operation(
    "replicate.status",
    "How far the targets of this server's volumes are.",
    Nothing,
    list[ReplicationStatus],
    lambda pool, _request, _: _replicator(pool).status(),
)
REPLICATE_RUN: Operation[ReplicateRun, list[ReplicationStatus]] = Operation(
    "replicate.run",
    "Bring the targets of `volume`, or of all, up to date now; with `wait`, answer when that is done, or has failed.",
    ReplicateRun,
    list[ReplicationStatus],
    _replicate_run,
    Progress,
)
DIFF: Operation[DiffRange, DiffTotal] = Operation(
    "diff",
    "The ranges that changed from the snapshot `from` to the snapshot `to`, or to the live volume.",
    DiffRange,
    DiffTotal,
    _diff,
    DiffExtents,
)
STATUS: Operation[Nothing, PoolStatus] = Operation(
    "status",
    "Volumes, space and sharing.",
    Nothing,
    PoolStatus,
    lambda pool, _request, _: pool.status(),
)
CHECK: Operation[CheckScope, CheckReport] = Operation(
    "check",
    "Verify the pool's invariants; with `data`, every checksum too.",
    CheckScope,
    CheckReport,
    _check,
    Progress,
)

OPERATIONS: dict[str, Operation[Any, Any]] = {
    operation.name: operation
    for operation in (
        VOLUME_CREATE,
        VOLUME_LIST,
        VOLUME_SHOW,
        VOLUME_MAP,
        VOLUME_ACCEPT,
        VOLUME_RESIZE,
        VOLUME_DELETE,
        VOLUME_FLATTEN,
        SNAPSHOT_CREATE,
        SNAPSHOT_LIST,
        SNAPSHOT_DELETE,
        SNAPSHOT_RECLAIM,
        SNAPSHOT_HOLD,
        SNAPSHOT_RELEASE,
        SNAPSHOT_PRIORITY,
        CLONE,
        SNAPSHOT_PRUNE,
        ROLLBACK,
        SEND,
        RECEIVE,
        RECEIVE_ABORT,
        VOLUME_PROMOTE,
        VOLUME_DEMOTE,
        REPLICATE_STATUS,
        REPLICATE_RUN,
        DIFF,
        STATUS,
        CHECK,
    )
}
