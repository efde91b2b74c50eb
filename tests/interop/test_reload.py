"""A server that is told of changes while it serves, and one that systemd starts: real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.client import Client, DisconnectedError, RefusedError
from tests.support.clients import require_client
from tests.support.deadline import wait_until
from tests.support.server import NBDSNAP, Server, Volume
from tests.support.tlsfiles import Authority

pytestmark = pytest.mark.slow

MIB = 1 << 20
StartServer = Callable[..., Server]


def rule(mode: str, *exports: str) -> str:
    return f'[[allow]]\nmode = "{mode}"\nexports = [{", ".join(map(repr, exports))}]\n'


def change(server: Server, old: str, new: str) -> None:
    text = server.config.read_text()
    assert old in text
    server.config.write_text(text.replace(old, new))


def hang_up(server: Server, says: str) -> None:
    """SIGHUP; wait until the log has one more line that says this."""
    assert server.process is not None
    before = server.stderr().count(says)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.stderr().count(says) > before, says)


def exports_of(server: Server, tls: ssl.SSLContext | None = None) -> list[str]:
    with Client.connect(("127.0.0.1", server.port)) as client:
        if tls is not None:
            client.start_tls(tls, "localhost")
        return client.list()


def test_rules_and_limits(start_server: StartServer, tmp_path: Path) -> None:
    volumes = [Volume(name, tmp_path / f"{name}.img", MIB) for name in ("a", "b")]
    server = start_server(volumes, sections=rule("rw", "a", "b"))
    a, b = (Client.connect(("127.0.0.1", server.port)).go(name) for name in ("a", "b"))
    b.write(0, b"before")

    change(server, rule("rw", "a", "b"), rule("ro", "a") + "[limits]\nconnections_per_client = 1\n")
    hang_up(server, "are those of")
    for client in (a, b):
        client.expect_end()
        client.close()
    wait_until(lambda: server.connections("a") == 0, "the connections to be gone")
    with Client.connect(("127.0.0.1", server.port)) as client:
        assert client.list() == ["a"]
        with pytest.raises(RefusedError):
            client.go("b")
        assert client.go("a").flags & 2
        with pytest.raises((DisconnectedError, OSError)):
            Client.connect(("127.0.0.1", server.port))


def test_what_is_wrong_changes_nothing(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server([Volume("a", tmp_path / "a.img", MIB)], sections=rule("rw", "a"))
    client = Client.connect(("127.0.0.1", server.port)).go("a")
    good = server.config.read_text()
    for wrong in ('[[allow]]\nuid = ["nobody-at-all"]\n', "[[alow]]\n", '[tls]\nmode = "required"\n', "nonsense"):
        server.config.write_text(f"{good}\n{wrong}")
        hang_up(server, "was not reloaded")
    client.write(0, b"still there")
    assert exports_of(server) == ["a"]
    client.close()


def test_a_listener_is_not_laid_bare(tmp_path: Path) -> None:
    """The last rule goes, and with it what allowed to listen to everybody."""
    server = Server(tmp_path, [Volume("a", tmp_path / "a.img", MIB)], sections=rule("rw", "a"))
    change(server, '"tcp://127.0.0.1:0"', '"tcp://0.0.0.0:0"')
    process = serve(server.config)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready nbd://0.0.0.0:")
    change(server, rule("rw", "a"), "")
    process.send_signal(signal.SIGHUP)
    log = tmp_path / "log"
    wait_until(lambda: "can be reached from other machines" in log.read_text(), "the refusal")
    end(process)


def serve(config: Path, **environment: str) -> subprocess.Popen[str]:
    with (config.parent / "log").open("a") as errors:
        return subprocess.Popen(
            [NBDSNAP, "serve", "--config", config],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environment},
        )


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    if process.stdout is not None:
        process.stdout.close()


def test_certificates(start_server: StartServer, tmp_path: Path) -> None:
    """The paths change, then the files that they lead to."""
    require_client("openssl")
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    server = start_server([Volume("a", tmp_path / "a.img", MIB)], sections=old.toml())
    connected = Client.connect(("127.0.0.1", server.port)).start_tls(old.client_context(), "localhost").go("a")
    change(server, old.toml(), new.toml())
    with pytest.raises(ssl.SSLCertVerificationError):
        exports_of(server, new.client_context())
    hang_up(server, "are those of")
    assert exports_of(server, new.client_context()) == ["a"]
    with pytest.raises(ssl.SSLCertVerificationError):
        exports_of(server, old.client_context())
    connected.write(0, b"as before")

    for path in new.server.iterdir():
        path.write_bytes((old.server / path.name).read_bytes())
    assert exports_of(server, old.client_context()) == ["a"]
    connected.disconnect()


# systemd


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(30)
        yield sock


ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_activation_readiness_reload_and_end(tmp_path: Path, systemd: socket.socket) -> None:
    """The socket that was passed takes the place of those in the configuration, and outlives the server."""
    config = tmp_path / "nbdsnap.toml"
    Server(tmp_path, [Volume("a", tmp_path / "a.img", MIB)])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "passed.sock"))
        listening.listen()
        early = socket.socket(socket.AF_UNIX)
        early.connect(str(tmp_path / "passed.sock"))  # before there is a server
        with (tmp_path / "log").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", ACTIVATE, str(listening.fileno()), NBDSNAP, "serve", "--config", config],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                pass_fds=[listening.fileno()],
                env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            )
        assert systemd.recv(100) == b"READY=1"
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"ready nbd+unix:///?socket={tmp_path}/passed.sock control=")
        assert not (tmp_path / "nbd.sock").exists()
        with Client(early).go("a") as client:
            client.write(0, b"served")
            client.disconnect()
        process.send_signal(signal.SIGHUP)
        reloading = systemd.recv(100).decode()
        assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert systemd.recv(100) == b"READY=1"
        end(process)
        assert systemd.recv(100) == b"STOPPING=1"
        assert (tmp_path / "passed.sock").exists()
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as late:
            late.connect(str(tmp_path / "passed.sock"))
