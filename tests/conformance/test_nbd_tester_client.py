"""The nbd project's own tester, where the environment says that it has been built: see README.md.

``NBD_TESTER_CLIENT`` is the path of nbd-tester-client; its transaction logs are looked for beside it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server import Server, Volume
from tests.support.tlsfiles import Authority

PROGRAM = Path(os.environ.get("NBD_TESTER_CLIENT", "/nonexistent"))
LOGS = ("integrity-test.tr", "integrityhuge-test.tr")
TIMEOUT_S = 250.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("NBD_TESTER_CLIENT" not in os.environ, reason="NBD_TESTER_CLIENT names no nbd-tester-client"),
]


def tester(server: Server, *options: str, export: str = "vol", unix: bool = False) -> None:
    """Run it; it must find nothing wrong."""
    where = ["-u", str(server.socket)] if unix else ["127.0.0.1", str(server.port)]
    done = subprocess.run(
        [PROGRAM, "-N", export, *options, *where], capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{options}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture
def server(start_server: Callable[..., Server], tmp_path: Path) -> Server:
    """50 MiB, as the nbd project's own tests have for their logs, with a snapshot to preserve for."""
    origin = tmp_path / "vol.img"
    with origin.open("wb") as file:
        file.truncate(50 << 20)
    server = start_server([Volume("vol", origin)])
    server.snapshot("vol@before")
    return server


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize(
    "options",
    [(), ("-w",), ("-w", "-f"), ("-o",), ("-h",)],
    ids=["read", "write", "write-flush-fua", "oversize", "handshake"],
)
def test_mode(server: Server, options: tuple[str, ...], unix: bool) -> None:
    tester(server, *options, unix=unix)


def test_writes_to_a_snapshot_are_refused(server: Server) -> None:
    """``-F``: errors are expected."""
    tester(server, "-w", "-F", export="vol@before")


@pytest.mark.parametrize("log", LOGS)
def test_integrity(server: Server, log: str) -> None:
    """A recorded session, played back and verified; the huge one has requests of 49.9 MiB."""
    tester(server, "-i", "-t", str(PROGRAM.parent / log))


@pytest.mark.parametrize("log", LOGS)
def test_integrity_over_tls(start_server: Callable[..., Server], tmp_path: Path, log: str) -> None:
    """With a client certificate; the server takes nobody without."""
    authority = Authority(tmp_path / "pki", clients=["alice"])
    files = {"certificate": "server-cert.pem", "key": "server-key.pem", "ca": "ca-cert.pem"}
    keys = 'log_size = "2MiB"\n[tls]\n' + "".join(f'{k} = "{authority.server / name}"\n' for k, name in files.items())
    origin = tmp_path / "vol.img"
    with origin.open("wb") as file:
        file.truncate(50 << 20)
    server = start_server([Volume("vol", origin)], pool_keys=keys)
    own = authority.folder / "alice"
    identity = [
        "-C",
        own / "client-cert.pem",
        "-K",
        own / "client-key.pem",
        "-A",
        own / "ca-cert.pem",
        "-H",
        "localhost",
    ]
    tester(server, "-i", "-t", str(PROGRAM.parent / log), *map(str, identity))
