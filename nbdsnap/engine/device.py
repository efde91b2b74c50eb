"""What a server may do with an export: the contract between the engine and whoever serves it.

A :class:`Device` is a live volume or a snapshot, opened.  It is the engine's only face towards the data
path, so that the server knows nothing of snapshots, and the engine nothing of NBD or asyncio.

Two ways in, for two kinds of caller:

* ``*_now`` never waits for a disk or for another thread longer than a few microseconds.  It does the whole
  operation and returns True, or does nothing and returns False: then use the other way.  For an event loop's thread.
* ``read``, ``cache`` and all that is about extents may wait for a disk: call them on a worker thread.  ``submit``
  queues a modifying operation for the engine's own threads, and returns at once; its ``done`` is called later, on an
  engine thread.

Ranges are half-open byte ranges, of any alignment.  The caller has checked them against ``size``; length is positive.
Errors are raised (or handed to ``done``) as :class:`~nbdsnap.errors.NbdsnapError` or OSError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Protocol

Extent = tuple[int, int]
"""Length in bytes, and flags."""

STATE_HOLE = 1
STATE_ZERO = 2
"""Bits of an extent's flags: the values of NBD's ``base:allocation`` (NBD_STATE_HOLE, NBD_STATE_ZERO)."""

CHANGED = 1
"""The bit of an extent of :meth:`Device.changes`."""

PREFERRED_BLOCK = 4096
"""Bytes: the alignment at which no operation reads before it writes."""


class OpKind(IntEnum):
    WRITE = 1
    TRIM = 2
    ZERO = 3
    FLUSH = 4


Done = Callable[[BaseException | None], None]


class Op:
    """One modifying operation on its way through the engine.

    ``data``: the payload of a WRITE: bytes-like, owned by the operation until ``done``.
    ``fua``: stable storage before ``done``.  ``no_hole``: a ZERO must leave the range allocated.  ``fast``: one that
    could only be done by writing zeroes fails with ENOTSUP instead, and changes nothing.
    """

    __slots__ = ("data", "done", "fast", "fua", "kind", "length", "no_hole", "offset")

    def __init__(
        self,
        kind: OpKind,
        offset: int,
        length: int,
        done: Done,
        data: bytes | bytearray | memoryview | None = None,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.done = done
        self.data = data
        self.fua = fua
        self.no_hole = no_hole
        self.fast = fast


class Device(Protocol):
    """An opened export.  All methods are safe to call from any thread."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes.  A live volume's may grow while it is open."""

    @property
    def read_only(self) -> bool: ...

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` from memory (the page cache), or return False with its content undefined."""

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``, waiting for the disk where need be."""

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Write into the page cache, in place, where no snapshot needs the old content; else False."""

    def writes_now(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool]:
        """:meth:`write_now` for several writes ``(offset, data)``, in any order: for each, whether it was done.

        Raises nothing: what fails was not done, and fails again the other way.
        """

    def flush_now(self) -> bool:
        """True where nothing has been written since the last completed flush began."""

    def submit(self, op: Op) -> None:
        """Queue a modifying operation (FLUSH included).

        Operations submitted before their predecessors are done may be executed in any order, but for
        FLUSH: it covers every operation whose ``done`` was called, and every ``write_now`` that returned, before it.
        """

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Consecutive extents that cover the range exactly, neighbours with different flags: holes and zeroes."""

    def depths(self, offset: int, length: int) -> list[Extent]:
        """Likewise, with the layer that holds the data in place of flags.

        0: none, a hole; 1: the export's own; 2: the one below.
        """

    def changes(self, base: str, offset: int, length: int) -> Iterator[Extent]:
        """Likewise, with CHANGED where the content differs, or may differ, from the older snapshot ``base`` of the same
        volume: one of those that the device was opened with.  Found as they are asked for; neighbours may be alike."""

    def is_sparse(self) -> bool:
        """Whether it may have holes, so that ``extents`` is worth asking for before reading much."""

    def cache(self, offset: int, length: int) -> None:
        """Bring the range into the page cache, as far as that is possible."""

    def close(self) -> None:
        """Give the export back.  Idempotent.  Operations in flight still finish."""
