"""What would keep a configuration's volumes from being served, found out before anything is created.

A start that fails because of its second volume must not leave the first one behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nbdsnap.engine.pool import Pool, check_kind, origin_size
from nbdsnap.errors import InUseError, NotFoundError
from nbdsnap.models import VolumeInfo
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.origin import check_size

WantedVolume = tuple[str, Path | None, int | None]
"""Name, origin (None: a thin volume), size: the arguments of :meth:`Pool.volume_ensure`."""


def check_volumes(pool: Pool | None, wanted: Iterable[WantedVolume]) -> None:
    """Raise what ``volume_ensure`` of any of them would raise, and change nothing.  ``pool``: None where it is new."""
    existing = {} if pool is None else {info.name: info for info in pool.volume_list()}
    for name, origin, size in wanted:
        if pool is not None and name in existing:
            pool.volume_ensure(name, origin, size, thin=origin is None)  # creates nothing, since the volume is there
        elif origin is None:
            check_kind(origin, size, thin=True)
            check_size(size or 0)
        else:
            _check_free(origin, existing.values())
            _check_origin(origin, size)


def _check_free(origin: Path, existing: Iterable[VolumeInfo]) -> None:
    for info in existing:
        other = Path(info.origin) if info.origin is not None else None
        if other is not None and origin.exists() and other.exists() and origin.samefile(other):
            raise InUseError(f"{origin} is the origin of volume {info.name} already")


def _check_origin(origin: Path, size: int | None) -> None:
    if size is None or origin.exists():
        origin_size(FileIO(), origin, size)
        return
    check_size(size)
    if not origin.parent.is_dir():
        raise NotFoundError(f"{origin} can't be created: there is no folder {origin.parent}")
