"""The model disk: which states a power cut can leave, from a recording and a moment.

Fault model
-----------
* A file's content is kept by the sector of 512 bytes.  A sector is never torn; anything larger may be.
* An operation that is not yet durable is in the page cache, from which any sector may reach the disk at any moment,
  independently of all others.  What is written is the sector as it was in the cache at that moment: so a sector has
  *versions*, and the disk holds one of them.
* The file's size has versions of its own.  A size on disk without its data reads as zeroes; data beyond the size is
  not there.
* fsync and fdatasync make durable all versions that were complete when the call began, from when it has returned; a
  write through O_DSYNC its own range.  sync_file_range promises nothing.
* The modification time has versions of its own, too, which fsync makes durable, and fdatasync does not.
* A directory entry has versions, too, durable after fsync of its *directory* (POSIX promises no more); both names of
  a rename change together.  A file whose entry is lost is lost, synced or not.

These are more states than any one file system leaves, on purpose.  What is left out: sectors that rot or are written
to a wrong place, a disk that lies about a flush, stale content of other files in blocks newly allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.crash.recording import Kind, Operation, Recording

SECTOR = 512
SIZE, MODIFIED = -1, -2
"""In place of a sector's number."""

UNSEEN = 1
"""A modification time, in nanoseconds, that is like no other."""

_NOTHING = bytes(SECTOR)

Chooser = Callable[["Volatile"], int]
"""Which version of a thing is on the disk: an index into its versions; 0 is the durable one."""


def parent_of(path: str) -> str:
    """The directory of an entry; "" is the recorded folder itself."""
    return path.rpartition("/")[0]


class Volatile:
    """The versions of one sector, size or directory entry that are not durable, oldest first.

    ``where``: ``(inode, sector)``, ``(inode, SIZE)``, ``(inode, MODIFIED)``, ``(path,)`` for an entry.
    """

    __slots__ = ("operations", "values", "where")

    def __init__(self, where: tuple[int | str, ...]) -> None:
        self.where = where
        self.operations: list[Operation] = []
        self.values: list[bytes | int] = []

    @property
    def inode(self) -> int | str:
        return self.where[0]

    def add(self, operation: Operation, value: bytes | int) -> None:
        self.operations.append(operation)
        self.values.append(value)

    def take(self, count: int) -> bytes | int:
        """Make the first ``count`` versions durable; the last of them is the new content."""
        value = self.values[count - 1]
        del self.operations[:count]
        del self.values[:count]
        return value

    def complete_before(self, time: int) -> int:
        """How many versions a sync that began at ``time`` covers."""
        for index in range(len(self.operations), 0, -1):
            if self.operations[index - 1].end <= time:
                return index
        return 0


Times = dict[tuple[int, int], int]
"""``(inode, start of an operation)`` -> the modification time that the operation left, where the program saw it."""


class _File:
    __slots__ = ("durable", "durable_modified", "latest", "modified", "number", "sectors", "size", "times")

    def __init__(self, number: int, times: Times, content: bytes = b"", modified: int = 0) -> None:
        self.number = number
        self.durable = bytearray(content)
        self.latest = bytearray(content)
        self.sectors: dict[int, Volatile] = {}
        self.size = Volatile((number, SIZE))
        self.times = times
        self.durable_modified = modified
        self.modified = Volatile((number, MODIFIED))

    def change(self, operation: Operation) -> None:
        """Enter an operation that begins into the versions."""
        self._touch(operation)
        latest = self.latest
        old_size = len(latest)
        if operation.kind is Kind.SIZE:
            self._resize(operation, operation.size)
            self._versions(operation, min(old_size, operation.size), old_size)
            return
        start, length = operation.offset, operation.length or len(operation.data)
        end = start + length
        if operation.size > old_size:
            self._resize(operation, operation.size)
        end = min(end, len(latest))
        if start < end:
            latest[start:end] = operation.data[: end - start] or bytes(end - start)
            self._versions(operation, start, end)

    def _touch(self, operation: Operation) -> None:
        """A new modification time.  Only those that the program saw are told from one another."""
        modified = self.modified
        if modified.operations and modified.values[-1] == UNSEEN:
            modified.operations.pop()
            modified.values.pop()
        modified.add(operation, self.times.get((self.number, operation.start), UNSEEN))

    def _resize(self, operation: Operation, size: int) -> None:
        if size < len(self.latest):
            del self.latest[size:]
        else:
            self.latest.extend(bytes(size - len(self.latest)))
        self.size.add(operation, size)

    def _versions(self, operation: Operation, start: int, end: int) -> None:
        for number in range(start // SECTOR, (end + SECTOR - 1) // SECTOR):
            content = bytes(self.latest[number * SECTOR : (number + 1) * SECTOR])
            versions = self.sectors.get(number)
            if versions is None:
                versions = self.sectors[number] = Volatile((self.number, number))
            versions.add(operation, content + _NOTHING[len(content) :])

    def settle(self, began: int, metadata: bool) -> None:
        """Make durable what was complete when a sync began."""
        if metadata:
            count = self.modified.complete_before(began)
            if count:
                self.durable_modified = int(self.modified.take(count))
        count = self.size.complete_before(began)
        if count:
            _set_size(self.durable, int(self.size.take(count)))
        for number in list(self.sectors):
            self._settle_sector(number, self.sectors[number].complete_before(began))

    def settle_write(self, operation: Operation) -> None:
        """Make durable what one durable write needs: its sectors, and the size up to it."""
        if operation in self.size.operations:
            _set_size(self.durable, int(self.size.take(self.size.operations.index(operation) + 1)))
        elif len(self.durable) < operation.offset + len(
            operation.data
        ):  # another's growth, which this one's data lies in
            _set_size(self.durable, operation.offset + len(operation.data))
        first, last = operation.offset // SECTOR, (operation.offset + len(operation.data) - 1) // SECTOR
        for number in range(first, last + 1):
            versions = self.sectors.get(number)
            if versions is not None and operation in versions.operations:
                self._settle_sector(number, versions.operations.index(operation) + 1)

    def _settle_sector(self, number: int, count: int) -> None:
        if not count:
            return
        versions = self.sectors[number]
        _put(self.durable, number, versions.take(count))
        if not versions.operations:
            del self.sectors[number]

    def state(self, choose: Chooser) -> tuple[bytearray, int]:
        """Content and modification time."""
        modified = self.durable_modified
        if self.modified.operations:
            index = choose(self.modified)
            if index:
                modified = int(self.modified.values[index - 1])
        content = bytearray(self.durable)
        if self.size.operations:
            index = choose(self.size)
            if index:
                _set_size(content, int(self.size.values[index - 1]))
        for number, versions in self.sectors.items():
            index = choose(versions)
            if index:
                _put(content, number, versions.values[index - 1])
        return content, modified


def _set_size(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _put(content: bytearray, sector: int, value: bytes | int) -> None:
    """Put a sector's content where it lies inside the file; what lies beyond its size is not there."""
    assert isinstance(value, bytes)
    start = sector * SECTOR
    count = min(SECTOR, len(content) - start)
    if count > 0:
        content[start : start + count] = value[:count]


@dataclass
class DiskState:
    """One possible content of the folder after a power cut."""

    files: dict[str, bytearray] = field(default_factory=dict)
    modified: dict[str, int] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)


def _observed_times(recording: Recording) -> Times:
    """Whose modification times are known: of the last operation on a file before the program looked."""
    times: Times = {}
    for moment, path, nanoseconds in recording.observed:
        earlier = [o for o in recording.operations if o.path == path and o.start < moment and o.kind in _CHANGES]
        if earlier:
            times[earlier[-1].inode, earlier[-1].start] = nanoseconds
    return times


_CHANGES = (Kind.WRITE, Kind.ZERO, Kind.SIZE)

_DIRECTORY = 0
"""What an entry of a directory names, in place of an inode."""

_ABSENT = -1


@dataclass
class _Entry:
    durable: int = _ABSENT
    versions: Volatile = field(default_factory=lambda: Volatile(("",)))


class Disk:
    """The disk under a recorded run, moved forward through its timeline by :meth:`advance`."""

    def __init__(self, recording: Recording, dropped: Callable[[Operation], bool] = lambda operation: False) -> None:
        """``dropped``: the syncs that are to be taken for not done (a durable write counts as a plain one)."""
        self.time = 0
        self._times = _observed_times(recording)
        self._files: dict[int, _File] = {}
        self._entries: dict[str, _Entry] = {}
        for name in recording.directories:
            self._entry(name).durable = _DIRECTORY
        for name, content in recording.files.items():
            number = recording.inodes[name]
            self._entry(name).durable = number
            self._files[number] = _File(number, self._times, content, recording.modified[name])
        events: list[tuple[int, int, Operation]] = []
        for order, operation in enumerate(recording.operations):
            drop = operation.is_sync and dropped(operation)
            if drop and operation.kind is not Kind.WRITE:
                continue
            if not operation.is_sync or operation.kind is Kind.WRITE:
                events.append((operation.start, 2 * order, operation))
            if operation.is_sync and not drop:
                events.append((operation.end, 2 * order + 1, operation))
        self._events = sorted(events, key=lambda event: event[:2])
        self._next = 0

    def _entry(self, path: str) -> _Entry:
        entry = self._entries.get(path)
        if entry is None:
            entry = self._entries[path] = _Entry(versions=Volatile((path,)))
        return entry

    def advance(self, time: int) -> None:
        """Go to ``time``: operations that start before it may have happened, those that ended by it have."""
        assert time >= self.time
        self.time = time
        while self._next < len(self._events):
            moment, order, operation = self._events[self._next]
            ends = bool(order & 1)
            if moment > time or (moment == time and not ends):
                return
            self._next += 1
            if ends:
                self._sync(operation)
            else:
                self._begin(operation)

    def _begin(self, operation: Operation) -> None:
        if operation.kind is Kind.LINK:
            if operation.inode and operation.inode not in self._files:
                self._files[operation.inode] = _File(operation.inode, self._times)
            self._entry(operation.path).versions.add(operation, operation.inode or _DIRECTORY)
        elif operation.kind is Kind.UNLINK:
            self._entry(operation.path).versions.add(operation, _ABSENT)
        elif operation.kind is Kind.RENAME:
            self._entry(operation.path).versions.add(operation, _ABSENT)
            self._entry(operation.target).versions.add(operation, operation.inode)
        else:
            self._files[operation.inode].change(operation)

    def _sync(self, operation: Operation) -> None:
        if operation.kind is Kind.WRITE:
            self._files[operation.inode].settle_write(operation)
        elif operation.kind is Kind.SYNC:
            self._files[operation.inode].settle(operation.start, operation.metadata)
        else:
            everything = operation.kind is Kind.SYNC_ALL
            for path, entry in self._entries.items():
                if everything or parent_of(path) == operation.path:
                    count = entry.versions.complete_before(operation.start)
                    if count:
                        entry.durable = int(entry.versions.take(count))
            if everything:
                for file in self._files.values():
                    file.settle(operation.start, True)

    # --- states ---

    def volatile(self) -> list[Operation]:
        """The operations that are not durable, or not all of them, in their order of begin."""
        found: dict[int, Operation] = {}
        for versions in self._all_versions():
            for operation in versions.operations:
                found[id(operation)] = operation
        return sorted(found.values(), key=lambda operation: operation.start)

    def _all_versions(self) -> Iterable[Volatile]:
        for file in self._files.values():
            yield file.size
            yield file.modified
            yield from file.sectors.values()
        for entry in self._entries.values():
            yield entry.versions

    def latest(self) -> DiskState:
        """Everything that was begun has reached the disk."""
        return self.state(lambda versions: len(versions.operations))

    def state(self, choose: Chooser) -> DiskState:
        """The state where each volatile thing has the version that ``choose`` says."""
        bound = self._bind_renames(choose)
        namespace: dict[str, int] = {}
        for path, entry in self._entries.items():
            index = bound.get(path, 0)
            namespace[path] = entry.durable if not index else int(entry.versions.values[index - 1])
        state = DiskState()
        for path in sorted(namespace):
            number = namespace[path]
            parent = parent_of(path)
            if number == _ABSENT or (parent and namespace.get(parent) != _DIRECTORY):
                continue
            if number == _DIRECTORY:
                state.directories.append(path)
            else:
                state.files[path], state.modified[path] = self._files[number].state(choose)
        return state

    def _bind_renames(self, choose: Chooser) -> dict[str, int]:
        """The version of each entry, such that both names of a rename have changed, or neither."""
        chosen = {path: choose(entry.versions) for path, entry in self._entries.items() if entry.versions.operations}
        settled = False
        while not settled:
            settled = True
            for path in list(chosen):
                for operation in self._entries[path].versions.operations[: chosen[path]]:
                    if operation.kind is not Kind.RENAME:
                        continue
                    for name in (operation.path, operation.target):
                        needed = self._entries[name].versions.operations.index(operation) + 1
                        if chosen[name] < needed:
                            chosen[name] = needed
                            settled = False
        return chosen
