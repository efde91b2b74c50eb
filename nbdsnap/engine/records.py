"""What the index's tables ``volumes`` and ``snapshots`` hold, and the objects in memory that stand for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nbdsnap.errors import NbdsnapError

JsonObject = dict[str, Any]


def now() -> datetime:
    """The present, in whole microseconds, UTC."""
    return datetime.now(UTC)


@dataclass
class SnapshotRecord:
    """A snapshot: content as of the end of ``epoch``.

    ``deleting``: it is gone for everyone, and only its space is still being given back.
    ``suspect``: why its content may differ from what it was, for a person; None where it can't.
    ``connections``: in memory only: how many devices are open on it.
    ``id``: says that it is the same snapshot, in whichever pool; one that an earlier version took gets one when it is
    loaded.
    """

    epoch: int
    name: str
    size: int
    created: datetime
    priority: int = 0
    held: bool = False
    deleting: bool = False
    suspect: str | None = None
    connections: int = 0
    id: str = ""

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "size": self.size,
            "created": self.created.isoformat(),
            "priority": self.priority,
            "held": self.held,
            "deleting": self.deleting,
            "suspect": self.suspect,
            "id": self.id,
        }

    @classmethod
    def from_json(cls, epoch: int, value: JsonObject) -> SnapshotRecord:
        fields = {key: value[key] for key in ("name", "size", "priority", "held", "deleting")}
        created = datetime.fromisoformat(value["created"])
        return cls(epoch=epoch, created=created, suspect=value.get("suspect"), id=value.get("id", ""), **fields)

    @property
    def hidden(self) -> bool:
        """It is no user's, but the engine's own."""
        return self.name.startswith(".")


@dataclass
class VolumeRecord:
    """A volume.  ``epoch`` is the present one, which the next snapshot will get as its number; the first is 1.

    ``stamp``: what the origin file was when it was closed (:mod:`nbdsnap.engine.stamps`); None while it is open.
    ``rollback``: the epoch of the snapshot whose content the volume has, although not all of it is in place yet
    (:mod:`nbdsnap.engine.rollback`); None where no rollback is under way.
    ``base``: number of a volume and epoch of its snapshot, of which this one is a clone; None for others.
    ``deleting``: it is gone for everyone, and only its space is still being given back.
    ``receiving``: what is being received (:mod:`nbdsnap.engine.receiving`); None where nothing is.
    ``replica``: it follows another pool's volume, and takes no writes from clients.
    ``resizing``: the origin file may be longer than the volume, and has to be cut (:mod:`nbdsnap.engine.resize`).
    ``largest``: the largest size that the volume ever had: there may be records up to there.
    """

    number: int
    name: str
    kind: str
    size: int
    origin: str | None
    created: datetime = field(default_factory=now)
    epoch: int = 1
    stamp: JsonObject | None = None
    rollback: int | None = None
    base: tuple[int, int] | None = None
    deleting: bool = False
    receiving: JsonObject | None = None
    replica: bool = False
    resizing: bool = False
    largest: int = 0

    def __post_init__(self) -> None:
        self.largest = max(self.largest, self.size)

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "kind": self.kind,
            "size": self.size,
            "origin": self.origin,
            "created": self.created.isoformat(),
            "epoch": self.epoch,
            "stamp": self.stamp,
            "rollback": self.rollback,
            "base": self.base,
            "deleting": self.deleting,
            "receiving": self.receiving,
            "replica": self.replica,
            "resizing": self.resizing,
            "largest": self.largest,
        }

    @classmethod
    def from_json(cls, number: int, value: JsonObject) -> VolumeRecord:
        fields = {key: value[key] for key in ("name", "kind", "size", "origin", "epoch")}
        created = datetime.fromisoformat(value["created"])
        later: JsonObject = {key: value.get(key) for key in ("stamp", "rollback", "receiving")}
        base, deleting = value.get("base"), value.get("deleting", False)
        resizing, largest = value.get("resizing", False), value.get("largest", 0)
        return cls(
            number=number,
            created=created,
            base=None if base is None else (base[0], base[1]),
            deleting=deleting,
            replica=bool(value.get("replica")),
            resizing=resizing,
            largest=largest,
            **later,
            **fields,
        )


class VolumeState:
    """A volume as the pool knows it, whether or not its data can be reached.

    ``snapshots`` are the live ones, ascending by epoch; ``deleting`` those whose space is still being given back.
    Both lists change only on the preserver's thread, under the pool's lock.  ``connections``: devices open on the live
    volume.
    ``problem``: why the live data can't be used; then this is no :class:`~nbdsnap.engine.volume.Volume`.
    """

    def __init__(
        self, record: VolumeRecord, snapshots: list[SnapshotRecord], problem: NbdsnapError | None = None
    ) -> None:
        self.record = record
        self.set_snapshots([snapshot for snapshot in snapshots if not snapshot.deleting])
        self.deleting = [snapshot for snapshot in snapshots if snapshot.deleting]
        self.connections = 0
        self.problem = problem

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def size(self) -> int:
        return self.record.size

    def set_snapshots(self, snapshots: list[SnapshotRecord]) -> None:
        """These are the live ones now; a new list, so that a reader's is whole."""
        self.snapshots = snapshots
        self._by_name = {snapshot.name: snapshot for snapshot in snapshots}

    def add_snapshot(self, snapshot: SnapshotRecord) -> None:
        """The newest."""
        self.snapshots = [*self.snapshots, snapshot]
        self._by_name[snapshot.name] = snapshot

    @property
    def visible(self) -> list[SnapshotRecord]:
        """The snapshots that users know of."""
        return [snapshot for snapshot in self.snapshots if not snapshot.hidden]

    def find(self, name: str) -> SnapshotRecord | None:
        return self._by_name.get(name)

    @property
    def newest_epoch(self) -> int:
        """The newest live snapshot's epoch; 0 where there is none."""
        return self.snapshots[-1].epoch if self.snapshots else 0

    @property
    def epochs(self) -> list[int]:
        """Of the live snapshots, ascending."""
        return [snapshot.epoch for snapshot in self.snapshots]

    @property
    def error(self) -> str | None:
        """What is wrong with the volume, and what to do, for a person."""
        if self.problem is None:
            return None
        return f"{self.problem} ({self.problem.advice})" if self.problem.advice else str(self.problem)
