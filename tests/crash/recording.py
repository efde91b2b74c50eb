"""A recording: every modifying file operation of a run below one folder, and the marks, in one timeline.

Times are positions in the trace, as integers.  An operation occupies ``[start, end)``: it may take effect at any
moment of it, and has taken effect at ``end``.  A crash *at* time ``t`` means: what starts before ``t`` may have
happened, what ended at or before ``t`` has.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

NEVER = 1 << 62
"""The ``end`` of an operation that was under way when its process died."""


class Kind(Enum):
    WRITE = "write"
    """``data`` at ``offset``."""
    ZERO = "zero"
    """``length`` bytes at ``offset`` read as zeroes from now on; the size stays, unless ``size`` says more."""
    SIZE = "size"
    """The file is ``size`` bytes from now on."""
    SYNC = "sync"
    """Content and size are durable: what ended before this started."""
    SYNC_DIRECTORY = "sync-directory"
    """Likewise the entries of the directory ``path``."""
    SYNC_ALL = "sync-all"
    """Everything is durable."""
    LINK = "link"
    """The file ``inode``, which is new or has another name already (or, where 0, a new directory) is at ``path``."""
    UNLINK = "unlink"
    """Nothing is at ``path`` any more."""
    RENAME = "rename"
    """What was at ``path`` is at ``target``."""


@dataclass(eq=False)
class Operation:
    kind: Kind
    start: int
    end: int
    path: str
    """Relative to the recorded folder; "" is the folder itself."""
    inode: int = 0
    offset: int = 0
    length: int = 0
    size: int = -1
    data: bytes = b""
    durable: bool = False
    """A WRITE through O_DSYNC or RWF_DSYNC: durable at ``end``."""
    metadata: bool = False
    """A SYNC of everything about the file: fsync, not fdatasync."""
    target: str = ""
    site: str = ""
    """The place in the code that did it, where the program named it."""

    @property
    def is_sync(self) -> bool:
        return self.durable or self.kind in (Kind.SYNC, Kind.SYNC_DIRECTORY, Kind.SYNC_ALL)

    @property
    def name(self) -> str:
        """What to call it, where syncs are told apart: its place, or how and where it syncs."""
        return self.site or f"{'durable write' if self.durable else self.kind.value} {self.path or '.'}"


@dataclass
class Mark:
    time: int
    fields: dict[str, Any]


@dataclass(repr=False)
class Recording:
    """What a run did to a folder, whose content before the run was ``files`` and ``directories``, all of it durable."""

    files: dict[str, bytes]
    directories: list[str]
    inodes: dict[str, int]
    """The inode of each of ``files``; operations create the others."""
    modified: dict[str, int] = field(default_factory=dict)
    """The modification time of each of ``files``, in nanoseconds."""
    operations: list[Operation] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    observed: list[tuple[int, str, int]] = field(default_factory=list)
    """``(time, path, nanoseconds)``: modification times as the program saw them."""
    attachments: dict[str, bytes] = field(default_factory=dict)
    """What the program kept with the recording, by name."""
    end: int = 0

    def points(self) -> list[int]:
        """The moments to cut the power at: between any two events of operations, as late as can be, and at the end."""
        times = {operation.start for operation in self.operations}
        times.update(operation.end for operation in self.operations if operation.end < NEVER)
        times.add(self.end)
        return sorted(times)

    def marks_before(self, time: int) -> Iterator[Mark]:
        return (mark for mark in self.marks if mark.time < time)

    def syncs(self) -> dict[str, int]:
        """The syncs of the run by :attr:`Operation.name`, with how often each was done."""
        counts: dict[str, int] = {}
        for operation in self.operations:
            if operation.is_sync:
                counts[operation.name] = counts.get(operation.name, 0) + 1
        return counts

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(self))

    @staticmethod
    def load(path: Path) -> Recording:
        recording = pickle.loads(path.read_bytes())
        if not isinstance(recording, Recording):
            raise TypeError(f"{path} is no recording")
        return recording
