"""Ends, wanted and not: SIGTERM with every sort of client attached, SIGKILL under load, and the start afterwards."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop.conftest import MIB, SEED
from tests.support import nbdwire
from tests.support.blocks import stamped, write_stamped
from tests.support.client import Client, DisconnectedError
from tests.support.clients import sha256_of_export, sha256_of_file
from tests.support.deadline import Deadline, wait_until
from tests.support.server import Server, Volume
from tests.support.sockets import dial

StartServer = Callable[..., Server]

VOLUME_SIZE = 16 * MIB
BLOCK = 4096
STOP_BOUND_S = 15.0
"""What an administrator waits for before using SIGKILL."""

PROMPT_S = 5.0
"""Enough for a loaded machine, and too little for a server that waits for clients which have asked for nothing."""


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path) -> Server:
    """A server with one volume, ``vol``, of stamped blocks."""
    return start_server([Volume("vol", write_stamped(tmp_path / "vol.img", VOLUME_SIZE, SEED))])


@pytest.fixture(params=["tcp", "unix"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_stop_with_idle_clients_is_immediate(server: Server, transport: str) -> None:
    server.snapshot("vol@a")
    with ExitStack() as clients:
        for export in ("vol", "vol@a") * 3:
            clients.enter_context(Client.connect(server.address(transport)).go(export)).read(0, BLOCK)
        deadline = Deadline(PROMPT_S)
        server.stop()
        assert not deadline.expired()


def test_stop_with_clients_in_every_state(server: Server, tmp_path: Path) -> None:
    """None of them can hold up the end: not the silent, not the stalled, not the one that takes no answers."""
    server.snapshot("vol@a")
    address = server.address("unix")
    with ExitStack() as clients:
        for export in ("vol", "vol@a"):
            clients.enter_context(Client.connect(address).go(export))
            greedy = clients.enter_context(Client(dial(address, receive_buffer=4096)).go(export))
            greedy.sock.sendall(b"".join(nbdwire.request(nbdwire.READ, 0, 4 * MIB, cookie=n) for n in range(50)))
        clients.enter_context(dial(address))
        clients.enter_context(dial(address)).sendall(nbdwire.client_flags() + b"IHAVE")
        halfway = clients.enter_context(Client.connect(address).go("vol"))
        halfway.sock.sendall(nbdwire.request(nbdwire.WRITE, 0, 2 * MIB) + b"\xee" * MIB)
        deadline = Deadline(STOP_BOUND_S)
        server.stop()
        assert not deadline.expired()
    assert sha256_of_file(tmp_path / "vol.img") == sha256_of_file(write_stamped(tmp_path / "as", VOLUME_SIZE, SEED))


class Writer(threading.Thread):
    """Keeps 32 writes in flight to blocks of its own until the server goes; knows which ones were acknowledged."""

    def __init__(self, server: Server, transport: str, number: int) -> None:
        super().__init__(name=f"writer {number}")
        self.first = number * (VOLUME_SIZE // BLOCK // 4)
        self.acknowledged: dict[int, int] = {}
        """Block to the version last acknowledged."""
        self.sent: dict[int, int] = {}
        """Block to the version last sent, which may or may not have been written."""
        self.rounds = 0
        self._client = Client.connect(server.address(transport)).go("vol")

    def run(self) -> None:
        try:
            version = 0
            while True:
                version += 1
                for window in range(0, 1024, 32):
                    self._write([self.first + (window + n) * 37 % 1024 for n in range(32)], version)
        except (ConnectionError, DisconnectedError):
            self._client.close()

    def _write(self, blocks: list[int], version: int) -> None:
        asked: dict[int, int] = {}
        for block in blocks:
            self.sent[block] = version
            payload = stamped(1000 + version, block * BLOCK, BLOCK)
            asked[self._client.send(nbdwire.WRITE, block * BLOCK, BLOCK, payload=payload)] = block
        for _ in blocks:
            reply = self._client.receive()
            if reply.error == nbdwire.ESHUTDOWN:
                continue
            reply.check()
            self.acknowledged[asked[reply.cookie]] = version
        self.rounds += 1

    def wait_for_progress(self) -> None:
        """Some more writes have been acknowledged when this returns."""
        wanted = self.rounds + 2
        wait_until(lambda: self.rounds >= wanted, f"{self.name} to get on")

    def verify(self, image: bytes) -> int:
        """Every block holds what was acknowledged for it, or what was sent after that; how many were acknowledged."""
        for block in range(self.first, self.first + 1024):
            content = image[block * BLOCK : (block + 1) * BLOCK]
            candidates = [self.acknowledged.get(block, 0), self.sent.get(block, 0)]
            assert content in [expected(version, block) for version in candidates], f"block {block}: {candidates}"
        return len(self.acknowledged)


def expected(version: int, block: int) -> bytes:
    return stamped(1000 + version if version else SEED, block * BLOCK, BLOCK)


@pytest.fixture
def writers(server: Server, transport: str) -> Iterator[list[Writer]]:
    """Four connections under load, which end when the server does."""
    writers = [Writer(server, transport, number) for number in range(4)]
    for writer in writers:
        writer.start()
    yield writers
    server.kill()
    for writer in writers:
        writer.join()


def is_log_clean(server: Server) -> bool:
    """Whether the intent log's header says that there is nothing in it (nbdsnap/store/intentlog.py)."""
    magic, _, clean = struct.unpack_from(">8sII", (server.pool / "intent.log").read_bytes()[:16])
    assert magic == b"NBDSNLOG"
    return bool(clean)


def test_a_stop_under_load_is_bounded_and_leaves_nothing_to_replay(
    server: Server, transport: str, writers: list[Writer]
) -> None:
    """First overwrites from four connections, all on their way through the log when it is asked to stop."""
    for number in range(2):
        server.snapshot(f"vol@s{number}")
        for writer in writers:
            writer.wait_for_progress()
    assert not is_log_clean(server)
    deadline = Deadline(STOP_BOUND_S)
    server.stop()
    assert not deadline.expired()
    for writer in writers:
        writer.join()
    assert is_log_clean(server)
    assert (server.pool / "index.sums").exists()
    assert not list(server.pool.glob("intents-*"))
    server.start()
    assert is_log_clean(server), "a replay would have begun it anew"


@pytest.mark.parametrize("end", [Server.stop, Server.kill], ids=["SIGTERM", "SIGKILL"])
def test_acknowledged_writes_survive_the_end(
    server: Server, transport: str, tmp_path: Path, writers: list[Writer], end: Callable[[Server], None]
) -> None:
    """Whatever way it ends under load: acknowledged writes are there, and each snapshot is what it was."""
    first: dict[str, str] = {}
    for number in range(3):
        for writer in writers:
            writer.wait_for_progress()
        server.snapshot(f"vol@s{number}")
        first[f"vol@s{number}"] = sha256_of_export(server.uri(f"vol@s{number}", transport), tmp_path)
    end(server)
    for writer in writers:
        writer.join()
    server.start()
    image = (tmp_path / "vol.img").read_bytes()
    assert sum(writer.verify(image) for writer in writers) > 0
    assert sha256_of_export(server.uri("vol", transport), tmp_path) == sha256_of_file(tmp_path / "vol.img")
    for export, checksum in first.items():
        assert sha256_of_export(server.uri(export, transport), tmp_path) == checksum, export
    assert server.json("check", "--data")["ok"]
