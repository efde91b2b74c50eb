"""A server per module, a volume per test, everything once over TCP and once over a unix socket.

When a module is over, its pool must be sound down to the last checksum, and its server must end cleanly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from nbdsnap import operations
from tests.support.blocks import write_stamped
from tests.support.server import SERVERS, Server

MIB = 1 << 20
VOLUME_SIZE = 8 * MIB
SEED = 1
"""Of the content that each test's volume starts with: see tests.support.blocks."""

_numbers = count(1)


@dataclass(frozen=True)
class LiveVolume:
    """A volume of a running server, as the transport under test reaches it."""

    server: Server
    name: str
    file: Path
    transport: str

    @property
    def origin(self) -> Path:
        """The raw file, once what was acknowledged has left the intent log for it: a status waits for that."""
        self.server.manage(operations.STATUS)
        return self.file

    @property
    def size(self) -> int:
        return self.file.stat().st_size

    @property
    def uri(self) -> str:
        return self.server.uri(self.name, self.transport)

    def snapshot(self, name: str) -> str:
        """Take a snapshot; its URI."""
        self.server.snapshot(f"{self.name}@{name}")
        return self.uri_of(name)

    def uri_of(self, snapshot: str) -> str:
        return self.server.uri(f"{self.name}@{snapshot}", self.transport)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("interop"))
    request.node.stash[SERVERS] = [server]
    with server:
        yield server
        report = server.json("check", "--data")
        assert report["ok"], report["problems"]


@pytest.fixture(params=["tcp", "unix"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def volume(server: Server, transport: str, tmp_path: Path) -> LiveVolume:
    """8 MiB of stamped blocks, without a hole and without a snapshot."""
    return _adopt(server, transport, write_stamped(tmp_path / "origin.img", VOLUME_SIZE, SEED))


@pytest.fixture
def sparse_volume(server: Server, transport: str, tmp_path: Path) -> LiveVolume:
    """64 MiB of hole."""
    origin = tmp_path / "sparse.img"
    with origin.open("wb") as file:
        file.truncate(64 * MIB)
    return _adopt(server, transport, origin)


def _adopt(server: Server, transport: str, origin: Path) -> LiveVolume:
    name = f"vol{next(_numbers)}"
    server.manage(operations.VOLUME_CREATE, name=name, origin=origin)
    return LiveVolume(server, name, origin, transport)
