"""A pool as its users see it, in this process or behind a server: what the model and load tests are written against."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from nbdsnap import operations
from nbdsnap.client import RemoteClient
from nbdsnap.engine.device import Device
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import NotFoundError
from nbdsnap.models import CheckReport, Extent, PoolStatus, RollbackReport, SnapshotDeletion, SnapshotInfo
from tests.support import nbdwire
from tests.support.client import RefusedError
from tests.support.deadline import wait_until
from tests.support.nbddevice import NbdDevice
from tests.support.server import Server, Volume

LOG_SIZE = 256 << 10
"""Small, so that the intent log wraps and fills up."""


class Target(Protocol):
    """A pool with volumes over ``folder/NAME.img``, which are created sparse where they are not there."""

    def raw(self, volume: str) -> Path: ...

    def open(self, name: str, bases: Sequence[str] = ()) -> Device: ...

    def close(self, device: Device) -> None: ...

    def snapshot_create(self, names: Sequence[str]) -> list[SnapshotInfo]: ...

    def snapshot_list(self) -> list[SnapshotInfo]: ...

    def snapshot_delete(self, names: Sequence[str], *, dry_run: bool = False) -> SnapshotDeletion: ...

    def rollback(self, name: str, *, force: bool = False, dry_run: bool = False) -> RollbackReport: ...

    def thin_create(self, name: str, size: int) -> None: ...

    def clone(self, snapshot: str, name: str) -> None: ...

    def flatten(self, name: str) -> None: ...

    def volume_delete(self, name: str) -> None:
        """With its snapshots."""

    def diff(self, older: str, newer: str | None = None) -> list[Extent]: ...

    def resize(self, volume: str, size: int) -> None: ...

    def status(self) -> PoolStatus: ...

    def check(self) -> CheckReport: ...

    def restart(self) -> None:
        """Stop cleanly and start again.  All devices are closed."""

    def can_be_killed(self) -> bool: ...

    def kill(self) -> None:
        """At once, with whatever is under way.  What is open breaks."""

    def start(self) -> None:
        """After :meth:`kill`."""

    def stop(self) -> None:
        """Cleanly."""

    def abandon(self) -> None:
        """After a failure: leave nothing running."""


class EngineTarget:
    """The engine itself."""

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._stopped = False
        self._open()

    def _open(self) -> None:
        self.pool = Pool.open(self._folder / "pool", PoolOptions(log_size=LOG_SIZE), create=True)
        for name, size in self._sizes.items():
            self.pool.volume_ensure(name, self.raw(name), size)

    def raw(self, volume: str) -> Path:
        return self._folder / f"{volume}.img"

    def open(self, name: str, bases: Sequence[str] = ()) -> Device:
        return self.pool.open_device(name, bases)

    def close(self, device: Device) -> None:
        device.close()

    def snapshot_create(self, names: Sequence[str]) -> list[SnapshotInfo]:
        return self.pool.snapshot_create(names)

    def snapshot_list(self) -> list[SnapshotInfo]:
        return self.pool.snapshot_list()

    def snapshot_delete(self, names: Sequence[str], *, dry_run: bool = False) -> SnapshotDeletion:
        return self.pool.snapshot_delete(names, dry_run=dry_run)

    def rollback(self, name: str, *, force: bool = False, dry_run: bool = False) -> RollbackReport:
        return self.pool.rollback(name, force=force, dry_run=dry_run)

    def thin_create(self, name: str, size: int) -> None:
        self.pool.volume_create(name, None, size, thin=True)

    def clone(self, snapshot: str, name: str) -> None:
        self.pool.clone(snapshot, name)

    def flatten(self, name: str) -> None:
        self.pool.volume_flatten(name)

    def volume_delete(self, name: str) -> None:
        self.pool.volume_delete(name, snapshots=True)

    def diff(self, older: str, newer: str | None = None) -> list[Extent]:
        return list(self.pool.diff(older, newer))

    def resize(self, volume: str, size: int) -> None:
        self.pool.volume_resize(volume, size, shrink=True)

    def status(self) -> PoolStatus:
        return self.pool.status()

    def check(self) -> CheckReport:
        return self.pool.check(data=True)

    def restart(self) -> None:
        self.pool.close()
        self._open()

    def can_be_killed(self) -> bool:
        return False

    def kill(self) -> None:
        raise AssertionError("that would kill the test")

    def start(self) -> None:
        raise AssertionError("it was never killed")

    def stop(self) -> None:
        self.pool.close()
        self._stopped = True

    def abandon(self) -> None:
        if not self._stopped:
            self.pool.close()


class ServerTarget:
    """A real server, its exports over NBD, its commands over the control API.

    Devices are opened over the unix socket and TCP in turn, with structured replies and extended headers in turn.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._connections = 0
        self._open: Counter[str] = Counter()
        self._devices: set[NbdDevice] = set()
        volumes = [Volume(name, self.raw(name), size) for name, size in sizes.items()]
        self.server = Server(folder, volumes)
        self._start()

    def _start(self) -> None:
        self.server.start()
        self._control = RemoteClient(self.server.control)

    def raw(self, volume: str) -> Path:
        return self._folder / f"{volume}.img"

    def open(self, name: str, bases: Sequence[str] = ()) -> Device:
        with self._lock:
            self._connections += 1
            self._open[name] += 1
            number = self._connections
        try:
            device = self.connect(name, number, bases)
            self._devices.add(device)
            return device
        except RefusedError as error:
            with self._lock:
                self._open[name] -= 1
            if error.reply == nbdwire.UNKNOWN:
                raise NotFoundError(error.text) from None
            raise

    def connect(self, name: str, number: int, bases: Sequence[str] = ()) -> NbdDevice:
        """A connection; ``number`` chooses how."""
        address: Path | tuple[str, int] = ("127.0.0.1", self.server.port) if number % 2 else self.server.socket
        return NbdDevice(address, name, "extended" if number % 4 < 2 else "structured", tuple(bases))

    def close(self, device: Device) -> None:
        """The server, too, must see that it is closed, before anything else is asked of it."""
        device.close()
        assert isinstance(device, NbdDevice)
        with self._lock:
            self._devices.discard(device)
            self._open[device.name] -= 1
        wait_until(lambda: self._is_closed(device.name), f"the server to see that {device.name} is closed")

    def _is_closed(self, name: str) -> bool:
        volume, _, snapshot = name.partition("@")
        status = self._control.call(operations.VOLUME_SHOW, operations.VolumeShow(name=volume))
        known = {info.name: info.connections for info in status.snapshots} if snapshot else {"": status.connections}
        return known.get(snapshot, 0) <= self._open[name]

    def snapshot_create(self, names: Sequence[str]) -> list[SnapshotInfo]:
        return self._control.call(operations.SNAPSHOT_CREATE, operations.SnapshotCreate(names=list(names)))

    def snapshot_list(self) -> list[SnapshotInfo]:
        return self._control.call(operations.SNAPSHOT_LIST, operations.SnapshotList())

    def snapshot_delete(self, names: Sequence[str], *, dry_run: bool = False) -> SnapshotDeletion:
        request = operations.SnapshotDelete(names=list(names), dry_run=dry_run)
        return self._control.call(operations.SNAPSHOT_DELETE, request)

    def rollback(self, name: str, *, force: bool = False, dry_run: bool = False) -> RollbackReport:
        request = operations.RollbackTo(name=name, force=force, dry_run=dry_run)
        return self._control.call(operations.ROLLBACK, request)

    def thin_create(self, name: str, size: int) -> None:
        self._control.call(operations.VOLUME_CREATE, operations.VolumeCreate(name=name, size=size, thin=True))

    def clone(self, snapshot: str, name: str) -> None:
        self._control.call(operations.CLONE, operations.CloneOf(snapshot=snapshot, name=name))

    def flatten(self, name: str) -> None:
        self._control.call(operations.VOLUME_FLATTEN, operations.VolumeFlatten(name=name))

    def volume_delete(self, name: str) -> None:
        self._control.call(operations.VOLUME_DELETE, operations.VolumeDelete(name=name, snapshots=True))

    def diff(self, older: str, newer: str | None = None) -> list[Extent]:
        extents: list[Extent] = []
        request = operations.DiffRange.model_validate({"from": older, "to": newer})
        self._control.call(operations.DIFF, request, lambda event: extents.extend(event.extents))
        return extents

    def resize(self, volume: str, size: int) -> None:
        self._control.call(operations.VOLUME_RESIZE, operations.VolumeResize(name=volume, size=size, shrink=True))

    def status(self) -> PoolStatus:
        return self._control.call(operations.STATUS, operations.Nothing())

    def check(self) -> CheckReport:
        return self._control.call(operations.CHECK, operations.CheckScope(data=True))

    def restart(self) -> None:
        self.stop()
        self._start()

    def can_be_killed(self) -> bool:
        return True

    def kill(self) -> None:
        self.server.kill()
        for device in list(self._devices):
            device.abandon()
        self._devices.clear()

    def start(self) -> None:
        self._close_control()
        self._open.clear()
        self._start()

    def stop(self) -> None:
        self._close_control()
        self.server.stop()

    def abandon(self) -> None:
        self.server.kill()

    def _close_control(self) -> None:
        self._control.__exit__(None, None, None)
