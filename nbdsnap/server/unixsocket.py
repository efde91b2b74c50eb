"""Unix sockets to listen on: with their mode from the first moment, stale ones replaced, live and foreign ones left.

A path that exists is *stale* where it is a socket that nobody listens on (its server was killed): it is removed.  Where
somebody answers it is *live*; where it is no socket it is *foreign*: both are refused, and nothing is changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from nbdsnap.errors import InUseError, ServerError

PROBE_TIMEOUT_S = 2.0
"""A local connect() answers at once, or waits for room in a full backlog: then somebody listens."""


def bind_unix_socket(path: Path, mode: int, owner: int = -1, group: int = -1) -> socket.socket:
    """A socket bound to ``path``, not listening yet; its folder is made where only that is missing.

    ``owner``, ``group``: as for chown(2).
    InUseError for a live socket or a foreign file, ServerError where the operating system refuses.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(exist_ok=True)
        _clear(path)
        listener.bind(str(path))
        try:
            if (owner, group) != (-1, -1):
                os.chown(path, owner, group)
            path.chmod(mode)  # in time: nobody can connect before listen()
        except OSError:
            path.unlink()
            raise
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InUseError(f"cannot listen on {path}: another server has just taken it") from None
        raise ServerError(f"cannot listen on {path}: {error.strerror or error}") from None
    except InUseError:
        listener.close()
        raise
    return listener


def unlink_unix_socket(path: Path, listener_inode: tuple[int, int]) -> None:
    """Remove the socket, unless another one has taken its place."""
    with contextlib.suppress(OSError):
        if socket_inode(path) == listener_inode:
            path.unlink()


def socket_inode(path: Path) -> tuple[int, int]:
    """What tells a socket in the file system from a later one at its path."""
    status = path.lstat()
    return status.st_dev, status.st_ino


def _clear(path: Path) -> None:
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise InUseError(f"cannot listen on {path}: a link that leads nowhere is there") from None
        return
    if not stat.S_ISSOCK(kind):
        raise InUseError(
            f"cannot listen on {path}: it exists and is not a socket",
            hint="move it away, or name another path in the configuration",
        )
    if _is_live(path):
        raise InUseError(
            f"cannot listen on {path}: another process listens there",
            hint="stop that process, or name another path in the configuration",
        )
    path.unlink()


def _is_live(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # no permission, another socket type, a full backlog: somebody's
            return True
    return True
