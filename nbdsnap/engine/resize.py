"""Resizing: a volume gets another size, live; its snapshots keep theirs.

The size changes at one instant, a transaction.  ``resizing`` in the volume's record says that the origin file may be
longer than the volume, so that a start after a crash cuts it: whatever happened, the volume has the old size or the
new one, and the file the volume's::

    grow:    the record says ``resizing``  <  the file is longer, synced  <  the record has the new size
    shrink:  what snapshots need of the cut part is preserved  <  the record has the new size, and ``resizing``
             <  the file is shorter, synced  <  the record forgets it

* The gate is closed for the short part: what was acknowledged is in place, nobody writes, and afterwards what is queued
  for behind a new end is refused (:meth:`~nbdsnap.engine.preserver.Preserver.submit`).
* What a shrink cuts off is preserved before, in steps, while writes go on: what they overwrite meanwhile is preserved
  by them.  Only a snapshot that is taken in between makes it begin again.  Holes need nothing: behind the end of the
  file there are zeroes as well.
* So behind the end of the live volume no snapshot needs anything that is not in the store, or zeroes, and growing has
  nothing to preserve.  But the part that is added has to be zeroes where a larger, older snapshot still reads it: that
  is so unless somebody has lengthened the file, which is refused then.
* A diff takes what lies behind the older one's end for changed; what was cut off and added again has records.

A thin volume or clone has no file: after the transaction its chunks behind the new end are trimmed, which leaves to the
snapshots what they need. Until that is done, ``resizing`` stands for it.

A block device is what it is: the volume may get any size up to the device's, and the part that is added has the
content that it has there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from nbdsnap.engine.device import Op, OpKind
from nbdsnap.engine.preserver import Preserver
from nbdsnap.engine.records import VolumeRecord
from nbdsnap.engine.volume import Volume
from nbdsnap.errors import NbdsnapError, OriginError, UsageError
from nbdsnap.sizes import format_size
from nbdsnap.store.index import Index
from nbdsnap.store.origin import Origin, check_size

log = logging.getLogger(__name__)

Run = Callable[[Callable[[], None]], None]

STEP_BYTES = 16 << 20
"""Preserved by one command, while other volumes' operations wait: some tens of milliseconds."""


class Resizes:
    """Of one pool, whose ``lock`` this is."""

    def __init__(self, lock: threading.RLock, index: Index, preserver: Preserver) -> None:
        self._lock = lock
        self._index = index
        self._preserver = preserver
        self._turn = threading.Lock()
        """One at a time."""

    def check(self, volume: Volume, size: int, *, shrink: bool) -> None:
        """Raise what :meth:`resize` would raise before it changes anything, as far as that is known."""
        check_size(size)
        volume.check_not_rolling_back()
        if size < volume.size and not shrink:
            kept = format_size(size)
            raise UsageError(
                f"volume {volume.name} has {format_size(volume.size)}: what is behind {kept} would be lost",
                hint="say --shrink if that is meant; snapshots keep it",
            )
        origin = volume.origin
        if isinstance(origin, Origin) and origin.is_block_device:
            _check_device(origin, size)

    def resize(self, volume: Volume, size: int, *, shrink: bool) -> None:
        """Nothing happens where it has that size; UsageError where it would lose data without ``shrink``."""
        with self._turn:
            self.check(volume, size, shrink=shrink)
            if size < volume.size:
                while not self._shrink(volume, size):
                    pass
            elif size > volume.size:
                self._preserver.run(lambda: self._grow(volume, size))

    def finish(self, volumes: Iterable[Volume]) -> None:
        """At start, before the preserver's thread: cut what was under way when an earlier process ended."""
        for volume in volumes:
            if not volume.record.resizing:
                continue
            try:
                if isinstance(volume.origin, Origin):
                    volume.origin.truncate(volume.size)
                else:
                    self._trim(volume, _run_here)
                self._put(volume, replace(volume.record, resizing=False))
            except (OSError, NbdsnapError) as error:  # it can be served without that
                log.warning("volume %s: what is behind its end is cut at the next start: %s", volume.name, error)

    def _grow(self, volume: Volume, size: int) -> None:
        with self._closed(volume):
            if isinstance(volume.origin, Origin):
                self._lengthen(volume, volume.origin, size)
            elif volume.record.resizing:
                self._trim(volume, _run_here)
            self._put(
                volume, replace(volume.record, size=size, resizing=False, largest=max(size, volume.record.largest))
            )

    def _lengthen(self, volume: Volume, origin: Origin, size: int) -> None:
        if origin.is_block_device:
            return
        if not volume.record.resizing and origin.real_size() > volume.size:
            _check_lengthened(volume, origin, size)
            return
        self._put(volume, replace(volume.record, resizing=True))
        try:
            origin.truncate(volume.size)
            origin.truncate(size)
        except BaseException:
            with contextlib.suppress(OSError, NbdsnapError):
                origin.truncate(volume.size)
                self._put(volume, replace(volume.record, resizing=False))
            raise

    def _shrink(self, volume: Volume, size: int) -> bool:
        """False where it has to be tried again."""
        epoch = volume.record.epoch
        if isinstance(volume.origin, Origin):
            for offset, length in _steps(size, volume.size):
                self._preserver.run(partial(self._preserve, volume, offset, length))
            return self._preserver.run(lambda: self._cut(volume, size, epoch))
        self._preserver.run(lambda: self._cut(volume, size, None))
        self._trim(volume, self._preserver.run)
        self._preserver.run(lambda: self._put(volume, replace(volume.record, resizing=False)))
        return True

    def _trim(self, volume: Volume, run: Run) -> None:
        """Give back what a thin volume or clone has behind its end."""
        for offset, length in _steps(volume.size, volume.record.largest):
            run(partial(self._trim_step, volume, offset, length))

    def _trim_step(self, volume: Volume, offset: int, length: int) -> None:
        failures: list[BaseException | None] = []
        self._preserver.execute(volume, [Op(OpKind.TRIM, offset, length, failures.append)])
        for failure in failures:
            if failure is not None:
                raise failure

    def _preserve(self, volume: Volume, offset: int, length: int) -> None:
        volume.check_not_rolling_back()
        cut = Op(OpKind.TRIM, offset, length, _nobody)
        self._preserver.preservation.make_way([(volume, cut)]).check(volume, cut)

    def _cut(self, volume: Volume, size: int, epoch: int | None) -> bool:
        """False where there is a snapshot since ``epoch`` that nothing was preserved for."""
        with self._closed(volume):
            if epoch not in (None, volume.record.epoch):
                return False
            origin = volume.origin
            if isinstance(origin, Origin) and origin.is_block_device:
                self._put(volume, replace(volume.record, size=size))
                return True
            self._put(volume, replace(volume.record, size=size, resizing=True))
            if isinstance(origin, Origin):
                try:
                    origin.truncate(size)
                    self._put(volume, replace(volume.record, resizing=False))
                except (OSError, NbdsnapError) as error:  # the volume has its new size
                    log.warning("volume %s: %s is cut at the next start: %s", volume.name, origin.path, error)
        return True

    @contextlib.contextmanager
    def _closed(self, volume: Volume) -> Iterator[None]:
        """Nothing of the volume is under way.  From a command."""
        volume.check_not_rolling_back()
        volume.close_gate()
        try:
            self._preserver.drain([volume])
            yield
        finally:
            volume.open_gate()

    def _put(self, volume: Volume, record: VolumeRecord) -> None:
        self._index.update(lambda txn: txn.put_volume(record.number, record.to_json()))
        with self._lock:
            resized = record.size != volume.size
            volume.record = record
            if resized:
                volume.resized()


def _steps(offset: int, end: int) -> Iterator[tuple[int, int]]:
    """``(offset, length)``."""
    return ((start, min(STEP_BYTES, end - start)) for start in range(offset, end, STEP_BYTES))


def _run_here(command: Callable[[], None]) -> None:
    command()


def _check_device(origin: Origin, size: int) -> None:
    if size > origin.real_size():
        raise OriginError(
            f"the device {origin.path} has {format_size(origin.real_size())}, less than {format_size(size)}",
            hint="make the device larger first",
        )


def _check_lengthened(volume: Volume, origin: Origin, size: int) -> None:
    """The file is longer than the volume, and not by us."""
    real = origin.real_size()
    if any(snapshot.size > volume.size for snapshot in volume.snapshots):
        raise OriginError(
            f"{origin.path} has {real} bytes, and a larger snapshot of {volume.name} needs what is behind "
            f"{volume.size} to be zeroes",
            hint=f"cut the file first: truncate -s {volume.size} {origin.path}",
        )
    if real < size:
        origin.truncate(size)


def _nobody(_: BaseException | None) -> None:
    """Whom a cut answers to: it is only preserved for."""
