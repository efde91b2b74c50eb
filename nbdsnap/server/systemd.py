"""What systemd and its like agree on with a service: sockets that are there already, and word of how it goes.

Sockets (sd_listen_fds(3)): ``LISTEN_FDS`` of them, from descriptor 3 on, where ``LISTEN_PID`` is this process.
Notification (sd_notify(3)): datagrams to the socket that ``NOTIFY_SOCKET`` names.  Neither needs a library.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import MutableMapping

from nbdsnap.errors import ServerError

log = logging.getLogger(__name__)

FIRST_FD = 3


def inherited_sockets(environment: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets that this process was started with; none, as a rule.

    The variables are removed, so that no child takes them for its own.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets: list[socket.socket] = []
    try:
        for fd in range(FIRST_FD, FIRST_FD + int(count)):
            adopted = _adopt(fd)
            sockets.append(adopted)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _adopt(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ServerError(f"descriptor {fd}, which LISTEN_FDS announces, is no socket: {error.strerror}") from None
    if sock.type != socket.SOCK_STREAM or not listens:
        sock.close()
        raise ServerError(
            f"descriptor {fd}, which LISTEN_FDS announces, does not listen for streams",
            hint="a systemd socket unit for nbdsnap has ListenStream= and Accept=no",
        )
    os.set_inheritable(fd, False)
    return sock


def notify(*lines: str) -> None:
    """Tell who started us, where there is such a one: ``READY=1``, ``STOPPING=1``, ``STATUS=…``.  Never an error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto("\n".join(lines).encode(), address)


def notify_reloading() -> None:
    """``Type=notify-reload`` wants the time, too."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
