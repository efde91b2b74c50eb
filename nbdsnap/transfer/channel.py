"""How a command hands its standard input or output over to whoever does its work: the server, or itself.

A request of the management API names a *stream* by its path.  A file or a FIFO is opened there.  A socket is connected
to: whoever listens there sends one byte, and with it, as SCM_RIGHTS (unix(7)), the descriptor to use.  So the server
writes straight into the command's pipe, and no byte is copied by way of the command.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from nbdsnap.errors import NotFoundError, ServerError

TIMEOUT_S = 10.0
"""For two processes of one machine to meet."""

MAX_PATH = 107


@contextlib.contextmanager
def opened_stream(path: Path, *, write: bool) -> Iterator[int]:
    """The descriptor of the stream that a request names."""
    fd = _open(path, write=write)
    try:
        yield fd
    finally:
        os.close(fd)


def _open(path: Path, *, write: bool) -> int:
    try:
        is_socket = stat.S_ISSOCK(path.stat().st_mode)
    except FileNotFoundError:
        if not write:
            raise NotFoundError(f"{path} does not exist") from None
        is_socket = False
    if not is_socket:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if write else os.O_RDONLY
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(TIMEOUT_S)
        try:
            peer.connect(str(path))
            _, fds, _, _ = socket.recv_fds(peer, 1, 1)
        except OSError as error:
            raise ServerError(f"cannot take over the stream at {path}: {error.strerror or error}") from None
    if not fds:
        raise ServerError(f"what listens on {path} handed over no stream")
    os.set_inheritable(fds[0], False)
    return fds[0]


@contextlib.contextmanager
def offered(fd: int, control: Path) -> Iterator[Path]:
    """A path by which the server on ``control`` (or this process) gets ``fd``, once.

    It lies beside the control socket: that folder is one that both can see, whatever else is hidden from a service.
    """
    folder = control.parent if control.exists() and os.access(control.parent, os.W_OK) else Path(tempfile.gettempdir())
    path = folder / f".s-{secrets.token_hex(4)}"
    if len(os.fsencode(path)) > MAX_PATH:
        path = Path(tempfile.gettempdir()) / path.name
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        try:
            with contextlib.suppress(OSError):  # we are root, and the server is not
                owner = control.stat()
                os.chown(path, owner.st_uid, owner.st_gid)
            listener.listen(1)
            thread = threading.Thread(target=_hand_over, args=(listener, fd), name="stream", daemon=True)
            thread.start()
            yield path
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, where nobody came


def _hand_over(listener: socket.socket, fd: int) -> None:
    with contextlib.suppress(OSError):
        peer, _ = listener.accept()
        with peer:
            socket.send_fds(peer, [b"\0"], [fd])
