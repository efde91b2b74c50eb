"""The pool's format: numbers that lie on disk.  Changing one here is a new format version.

A pool is a directory of these files:

=================  ==========================================================
``index.mdb``      LMDB: the tables of :mod:`nbdsnap.store.index`
``index.sums``     checksums of the index's pages, while no process has the pool open: :mod:`nbdsnap.store.pagesums`
``index.mdb-lock`` LMDB's reader table; holds nothing that outlives a process
``store.data``     preserved chunks, and the live ones of thin volumes and clones, in slots of CHUNK bytes
``intent.log``     acknowledged writes on their way: :mod:`nbdsnap.store.intentlog`
``intents-N.log``  intents of volume number N that could not be applied yet: likewise
``lock``           flock(2)ed by the process that owns the pool; its pid, as text
=================  ==========================================================
"""

from __future__ import annotations

FORMAT_VERSION = 1

CHUNK_SHIFT = 12
CHUNK = 1 << CHUNK_SHIFT
"""Bytes: what one first overwrite preserves.  The page size, so that no write of a page reads more than the page."""

BLOCK_SHIFT = 12
BLOCK = 1 << BLOCK_SHIFT
"""Chunks (or slots) in one value of the tables ``changed`` and ``slots``: a bitmap of 512 bytes at most, which LMDB
keeps inside a leaf page."""

MAX_CHUNKS = 1 << 40
"""Chunk and slot numbers take five bytes: volumes and stores up to 4 PiB."""

ZERO_SLOT = MAX_CHUNKS - 1
"""In place of a slot: the preserved chunk is all zeroes, and takes no space."""

LOST_SLOT = MAX_CHUNKS - 2
"""In place of a slot: the preserved chunk was lost to damage, and removed by a repair.  Reading it is an error."""

BASE_SLOT = MAX_CHUNKS - 3
"""In place of a slot: the chunk was never written in this volume, a clone, so it is what the clone's base holds."""

MAX_VOLUME_SIZE = (MAX_CHUNKS - 1) << CHUNK_SHIFT
MAX_SLOTS = MAX_CHUNKS - 3
"""Numbers from here on are none of the store's."""

INDEX_FILE = "index.mdb"
NEW_INDEX_FILE = "index.mdb.new"
"""An index that is being made.  It gets its name when it is whole, since LMDB's first pages are not written as one."""

INDEX_LOCK_FILE = "index.mdb-lock"
SUMS_FILE = "index.sums"
STORE_FILE = "store.data"
DEFAULT_LOG_SIZE = 64 << 20
"""Bytes of the intent log's ring: what can be acknowledged and not yet be in place, and what a start after a crash
replays."""

LOG_FILE = "intent.log"
STRANDED_FILE = "intents-{}.log"
LOCK_FILE = "lock"


def chunk_count(size: int) -> int:
    """Chunks that ``size`` bytes take; the last may be partial."""
    return (size + CHUNK - 1) >> CHUNK_SHIFT
