"""The pool's volumes and snapshots, as the handshake asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from nbdsnap.engine.device import Device
from nbdsnap.nbd.session import ExportInfo
from nbdsnap.server.maps import base_of, context_names


class Export(Protocol):
    """What :meth:`Pool.exports` has of each volume and snapshot."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def description(self) -> str: ...


class ExportPool(Protocol):
    """What the data path needs of a pool.  In memory, quick enough for an event loop."""

    def exports(self) -> Sequence[Export]: ...
    def find_export(self, name: str) -> Export | None: ...
    def bases(self, name: str) -> Sequence[str]: ...
    def open_device(self, name: str, bases: Sequence[str] = ()) -> Device: ...


class PoolExports:
    """An :class:`~nbdsnap.nbd.session.ExportSource`: always the pool's present state, since it keeps none."""

    def __init__(self, pool: ExportPool) -> None:
        self._pool = pool

    def list(self) -> Iterator[ExportInfo]:
        return map(_info, self._pool.exports())

    def find(self, name: str) -> ExportInfo | None:
        export = self._pool.find_export(name)
        return None if export is None else _info(export)

    def open(self, name: str, contexts: Sequence[str]) -> Device | None:
        export = self._pool.find_export(name)
        if export is None:
            return None
        bases = [base for base in map(base_of, contexts) if base is not None]
        return self._pool.open_device(export.name, list(dict.fromkeys(bases)))

    def meta_contexts(self, name: str) -> Sequence[str]:
        export = self._pool.find_export(name)
        return () if export is None else context_names(self._pool.bases(export.name))


def _info(export: Export) -> ExportInfo:
    return ExportInfo(export.name, export.size, export.description, export.read_only)
