"""nbdkit as a client of nbdsnap and a server to others: its nbd plugin, with whatever filters the test wants."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator

from tests.support.clients import client_environment, require_client

STOP_TIMEOUT_S = 20.0


@contextlib.contextmanager
def nbdkit(*arguments: str) -> Iterator[int]:
    """Run nbdkit with ``arguments`` on a free port of 127.0.0.1; yields the port.

    The listening socket is handed over by systemd's socket activation: there is no moment at which the port is free for
    somebody else, or not yet open.  LISTEN_PID must be nbdkit's own, thus the shell that replaces itself.
    """
    require_client("nbdkit")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        script = f'exec 3<&{listener.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec nbdkit -f "$@"'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env=client_environment(),
        )
    try:
        yield port
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
