"""Does another program hold an origin open for writing?  Whatever it writes there changes the snapshots, unseen.

The system can tell for a regular file: a read lease (fcntl(2), F_SETLEASE) is given only while nobody has the file
open for writing.  It is asked for and given back at once, before the file is opened for writing here.  A mounted block
device refuses O_EXCL (open(2)).  Elsewhere (another's file, some network file systems) the answer is that it is not
known, which counts as no.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from pathlib import Path


def is_written_elsewhere(path: Path) -> bool:
    """Whether some program, or the kernel itself, certainly has ``path`` open for writing (a device: in use)."""
    try:
        is_device = stat.S_ISBLK(path.stat().st_mode)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_EXCL if is_device else 0))
    except OSError as error:
        return error.errno == errno.EBUSY
    try:
        return not is_device and _refuses_lease(fd)
    finally:
        os.close(fd)


def _refuses_lease(fd: int) -> bool:
    try:
        # whoever opens the file while the lease is held makes the kernel send this: one that is ignored by default
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return False
