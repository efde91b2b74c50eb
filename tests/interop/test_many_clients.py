"""More clients than file descriptors: those who are in notice nothing, the others are told, and nothing spins."""

from __future__ import annotations

import resource
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.blocks import stamped, write_stamped
from tests.support.client import Client, DisconnectedError
from tests.support.deadline import wait_until
from tests.support.server import Server, Volume

pytestmark = pytest.mark.slow

MIB = 1 << 20
DESCRIPTORS = 200
SEED = 4


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With few descriptors of its own."""
    real = subprocess.Popen

    def limited(*words: object, **keys: object) -> object:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

        return real(*words, **keys, preexec_fn=limit)  # type: ignore[call-overload]

    origin = write_stamped(tmp_path / "vol.img", MIB, SEED)
    server = Server(tmp_path / "server", [Volume("vol", origin)], sections="[limits]\nconnections = 1000\n")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", limited)
        server.start()
    yield server
    server.stop()


def processor_s(server: Server) -> float:
    """What the server has used of it."""
    assert server.process is not None
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def descriptors(server: Server) -> int:
    assert server.process is not None
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_more_clients_than_descriptors(server: Server) -> None:
    with ExitStack() as stack:
        served: list[Client] = []
        refused = 0
        for _ in range(2 * DESCRIPTORS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(server.socket))
            try:
                served.append(Client(sock).go("vol"))
            except (DisconnectedError, OSError):
                refused += 1
        assert refused >= DESCRIPTORS
        assert len(served) >= DESCRIPTORS // 4
        assert descriptors(server) <= DESCRIPTORS - 32, "none are left for volumes and snapshots"

        before = processor_s(server)
        for number, client in enumerate(served):
            assert client.read(number * 4096, 4096) == stamped(SEED, number * 4096, 4096)
        server.cli("snapshot", "create", "vol@a")  # which opens what it needs
        served[0].write(0, b"preserved before")
        server.cli("snapshot", "list")
        assert processor_s(server) - before < 5
        assert server.stderr().count("refused") < 10

        for client in served[: len(served) // 2]:
            client.disconnect()
        wait_until(lambda: server.connections("vol") == len(served) - len(served) // 2, "room")
        with Client.connect(server.socket).go("vol@a") as client:
            assert client.read(0, 4096) == stamped(SEED, 0, 4096)
