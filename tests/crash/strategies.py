"""Ways to choose one disk state among the many that a moment allows.

Random choice alone finds little: of a hundred unsynced sectors, nearly every random subset is a mess that any
recovery notices. Bugs in the order of syncs show where one file, or one operation, is ahead of or behind all others;
bugs in checksums and commit records where one operation is torn.  So there is a strategy for each.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.crash.disk import Chooser, Disk, Volatile
from tests.crash.recording import Operation

PAGE_SECTORS = 8


def _included(chosen: set[int]) -> Chooser:
    """On the disk: each thing as the last of the ``chosen`` operations (by id) on it left it."""

    def choose(versions: Volatile) -> int:
        for index in range(len(versions.operations), 0, -1):
            if id(versions.operations[index - 1]) in chosen:
                return index
        return 0

    return choose


def _ids(operations: list[Operation]) -> set[int]:
    return {id(operation) for operation in operations}


def lost(disk: Disk, rng: random.Random) -> Chooser:
    """Nothing that is not synced."""
    return lambda versions: 0


def kept(disk: Disk, rng: random.Random) -> Chooser:
    """Everything that was begun: what a killed process leaves."""
    return lambda versions: len(versions.operations)


def _paths(operations: list[Operation]) -> list[str]:
    return sorted({operation.path for operation in operations})


def one_file_kept(disk: Disk, rng: random.Random) -> Chooser:
    """One file is ahead of all others."""
    operations = disk.volatile()
    path = rng.choice(_paths(operations) or [""])
    return _included(_ids([operation for operation in operations if operation.path == path]))


def one_file_lost(disk: Disk, rng: random.Random) -> Chooser:
    """One file is behind all others."""
    operations = disk.volatile()
    path = rng.choice(_paths(operations) or [""])
    return _included(_ids([operation for operation in operations if operation.path != path]))


def prefixes(disk: Disk, rng: random.Random) -> Chooser:
    """Each file as it was at a moment of its own."""
    operations = disk.volatile()
    chosen: list[Operation] = []
    for path in _paths(operations):
        own = [operation for operation in operations if operation.path == path]
        chosen += own[: rng.randint(0, len(own))]
    return _included(_ids(chosen))


def one_operation_kept(disk: Disk, rng: random.Random) -> Chooser:
    operations = disk.volatile()
    return _included(_ids([rng.choice(operations)] if operations else []))


def one_operation_lost(disk: Disk, rng: random.Random) -> Chooser:
    operations = disk.volatile()
    missing = rng.choice(operations) if operations else None
    return _included(_ids([operation for operation in operations if operation is not missing]))


def subset(disk: Disk, rng: random.Random) -> Chooser:
    """Each operation or not, few or many of them."""
    share = rng.choice((0.1, 0.5, 0.9))
    return _included(_ids([operation for operation in disk.volatile() if rng.random() < share]))


def torn_operation(disk: Disk, rng: random.Random) -> Chooser:
    """Everything, or nothing, but for one operation, of which some sectors have reached the disk."""
    operations = disk.volatile()
    torn = rng.choice(operations) if operations else None
    others = rng.random() < 0.5
    rest = _included(_ids([operation for operation in operations if operation is not torn and others]))
    whole = _included(_ids([operation for operation in operations if operation is torn or others]))
    return lambda versions: (whole if rng.random() < 0.5 else rest)(versions)


def torn_pages(disk: Disk, rng: random.Random) -> Chooser:
    """Each page at a moment of its own."""
    moments: dict[tuple[int | str, int], float] = {}

    def choose(versions: Volatile) -> int:
        sector = versions.where[1] if len(versions.where) > 1 else -1
        page = versions.inode, int(sector) // PAGE_SECTORS
        moment = moments.setdefault(page, rng.random())
        return round(moment * len(versions.operations))

    return choose


def torn_sectors(disk: Disk, rng: random.Random) -> Chooser:
    """Each sector, size and entry at a moment of its own."""
    return lambda versions: rng.randint(0, len(versions.operations))


def _is_sector(versions: Volatile) -> bool:
    return len(versions.where) > 1 and int(versions.where[1]) >= 0


def sizes_kept(disk: Disk, rng: random.Random) -> Chooser:
    """Files have grown and shrunk, and have entries, but their data is not there."""
    return lambda versions: 0 if _is_sector(versions) else len(versions.operations)


def sizes_lost(disk: Disk, rng: random.Random) -> Chooser:
    return lambda versions: len(versions.operations) if _is_sector(versions) or len(versions.where) == 1 else 0


STRATEGIES: dict[str, Callable[[Disk, random.Random], Chooser]] = {
    strategy.__name__: strategy
    for strategy in (
        lost,
        kept,
        one_file_kept,
        one_file_lost,
        prefixes,
        one_operation_kept,
        one_operation_lost,
        subset,
        torn_operation,
        torn_pages,
        torn_sectors,
        sizes_kept,
        sizes_lost,
    )
}
