"""A real ``nbdsnap serve`` in a folder of its own, and the real command line against it.

Invariants, checked whenever a server ends through :meth:`Server.stop`: it exits 0, within a deadline, and its standard
error holds no traceback.  So each test that uses it is a test of clean shutdown, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import pytest

from nbdsnap import operations
from nbdsnap.client import RemoteClient
from nbdsnap.operations import Operation, Request
from tests.support.deadline import Deadline

Req = TypeVar("Req", bound=Request)
Res = TypeVar("Res")

NBDSNAP = Path(sys.executable).parent / "nbdsnap"
"""The installed console script: what a user runs, not the package's inside."""

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 60.0

_READY = re.compile(
    r"^ready nbds?://127\.0\.0\.1:(?P<port>\d+) nbds?\+unix:///\?socket=(?P<socket>\S+) control=(?P<control>\S+)"
    r"(?: replication=(?P<replication>\d+))?$"
)


@dataclass(frozen=True)
class Volume:
    """A ``[[volume]]`` table of the configuration."""

    name: str
    origin: Path
    size: int | None = None

    def toml(self) -> str:
        size = "" if self.size is None else f"size = {self.size}\n"
        return f'[[volume]]\nname = "{self.name}"\norigin = "{self.origin}"\n{size}'


class Server:
    """``nbdsnap serve`` on 127.0.0.1 (a free port) and on a unix socket, with its pool below ``folder``.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`.  It can be started again, on the same pool.
    """

    def __init__(
        self,
        folder: Path,
        volumes: Sequence[Volume] = (),
        pool_keys: str = 'log_size = "2MiB"',
        server_keys: str = "",
        sections: str = "",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.pool = folder / "pool"
        self.socket = folder / "nbd.sock"
        self.control = folder / "control.sock"
        self.config = folder / "nbdsnap.toml"
        self.stderr_path = folder / "stderr.log"
        self.port = 0
        self.replication_port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.config.write_text(
            f'[server]\nlisten = ["tcp://127.0.0.1:0", "unix://{self.socket}"]\n'
            f'control = "{self.control}"\n{server_keys}\n'
            f'[pool]\npath = "{self.pool}"\n{pool_keys}\n' + "".join(volume.toml() for volume in volumes) + sections
        )

    # --- the process ---

    def start(self) -> Server:
        assert self.process is None, "it runs already"
        with self.stderr_path.open("ab") as stderr:
            self.process = subprocess.Popen(
                [NBDSNAP, "serve", "--config", self.config],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        line = self._read_ready_line()
        match = _READY.match(line)
        if match is None:
            self.kill()
            raise AssertionError(f"not a ready line: {line!r}\n{self.stderr()}")
        self.port = int(match["port"])
        self.replication_port = int(match["replication"] or 0)
        assert match["socket"] == str(self.socket)
        assert match["control"] == str(self.control)
        return self

    def _read_ready_line(self) -> str:
        """The first line of standard output; whatever there is of it when the server ends or the deadline passes."""
        assert self.process is not None
        assert self.process.stdout is not None
        deadline = Deadline(START_TIMEOUT_S)
        stdout = self.process.stdout.fileno()
        line = b""
        while not line.endswith(b"\n") and select.select([stdout], [], [], deadline.remaining())[0]:
            chunk = os.read(stdout, 4096)
            if not chunk:
                break
            line += chunk
        return line.decode().rstrip("\n")

    def stop(self) -> None:
        """SIGTERM, and everything that a clean end promises."""
        assert self.process is not None, "it does not run"
        assert self.process.poll() is None, f"it ended by itself: {self.process.returncode}\n{self.stderr()}"
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"SIGTERM did not end it within {STOP_TIMEOUT_S:g} s\n{self.stderr()}") from None
        code = self.process.returncode
        self._forget()
        assert code == 0, f"exit {code}\n{self.stderr()}"
        assert "Traceback" not in self.stderr(), self.stderr()

    def kill(self) -> None:
        """SIGKILL, at any moment; the pool is left as it is."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._forget()

    def _forget(self) -> None:
        assert self.process is not None
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None

    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace") if self.stderr_path.exists() else ""

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is not None:
            with contextlib.suppress(AssertionError):  # the first failure is the one to report
                self.stop()
            self.kill()
            sys.stderr.write(f"--- standard error of nbdsnap serve ---\n{self.stderr()}\n")
        elif self.process is not None:
            self.stop()

    # --- the command line ---

    def cli(self, *words: str, exit_code: int = 0) -> str:
        """Standard output of ``nbdsnap --config … words``, which must end with ``exit_code``.

        An error must be one or two lines for a person: any other shape fails here, whatever the test is about.
        """
        done = subprocess.run(
            [NBDSNAP, "--config", self.config, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        assert done.returncode == exit_code, f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        if exit_code not in (0, 2):
            assert 1 <= len(done.stderr.splitlines()) <= 2, done.stderr
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.cli(*words, "--json"))

    # --- the same without starting a program, which costs more than most of what the tests ask for ---

    def manage(self, operation: Operation[Req, Res], **fields: Any) -> Res:
        """Call a management operation over the control socket."""
        with RemoteClient(self.control) as client:
            return client.call(operation, operation.request(**fields))

    def snapshot(self, *names: str) -> None:
        self.manage(operations.SNAPSHOT_CREATE, names=list(names))

    def connections(self, volume: str) -> int:
        """How many clients are on the live volume now."""
        return self.manage(operations.VOLUME_SHOW, name=volume).connections

    # --- the exports ---

    def uri(self, export: str, transport: str = "tcp") -> str:
        """The NBD URI of an export over ``tcp`` or ``unix``."""
        if transport == "unix":
            return f"nbd+unix:///{quote(export, safe='@')}?socket={self.socket}"
        return f"nbd://127.0.0.1:{self.port}/{quote(export, safe='@')}"

    def address(self, transport: str = "tcp") -> Path | tuple[str, int]:
        """Where a socket of one's own connects to."""
        return self.socket if transport == "unix" else ("127.0.0.1", self.port)


SERVERS = pytest.StashKey[list[Server]]()
"""Where a fixture leaves the servers it started, on its node: what they said is shown with a failure."""
