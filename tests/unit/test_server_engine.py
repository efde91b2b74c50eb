"""The server on the engine, in one process: what only both together can show."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.layout import STORE_FILE
from tests.support.blocks import stamped
from tests.support.nbdserver import ServerThread
from tests.support.nbdwire import ENOSPC, ENOTSUP, FAST_ZERO, OFFSET_DATA, OFFSET_HOLE, READ, WRITE, WRITE_ZEROES

CHUNK = 4096
MIB = 1 << 20
SIZE = 8 * MIB

DIALECTS = pytest.mark.parametrize("dialect", ["structured", "extended"])


class Unpunchable(FileIO):
    """A disk that can't punch holes when told so."""

    broken = False

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        if self.broken:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        super().fallocate(fd, mode, offset, length)


@pytest.fixture
def io() -> Unpunchable:
    return Unpunchable()


@pytest.fixture
def pool(tmp_path: Path, io: Unpunchable) -> Iterator[Pool]:
    opened = Pool.open(tmp_path / "pool", PoolOptions(log_size=MIB), create=True, io=io)
    opened.volume_create("vol", tmp_path / "vol.img", SIZE)
    yield opened
    opened.close()


@pytest.fixture
def server(pool: Pool) -> Iterator[ServerThread]:
    running = ServerThread(pool)
    yield running
    running.stop()


@DIALECTS
def test_fast_zeroes_are_refused_where_they_would_be_written(
    server: ServerThread, io: Unpunchable, dialect: str
) -> None:
    with server.client("vol", dialect) as client:
        client.write(0, stamped(1, 0, MIB))
        client.zero(0, CHUNK, FAST_ZERO)
        io.broken = True
        assert client.error(WRITE_ZEROES, 2 * CHUNK, CHUNK, FAST_ZERO) == ENOTSUP
        assert client.read(CHUNK, 2 * CHUNK) == stamped(1, CHUNK, 2 * CHUNK)
        client.zero(2 * CHUNK, CHUNK)
        client.trim(4 * CHUNK, CHUNK)
        expected = bytearray(stamped(1, 0, 6 * CHUNK))
        for chunk in (0, 2, 4):
            expected[chunk * CHUNK : (chunk + 1) * CHUNK] = bytes(CHUNK)
        assert client.read(0, 6 * CHUNK) == expected


@DIALECTS
def test_damage_is_told_with_its_offset(server: ServerThread, pool: Pool, tmp_path: Path, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        client.write(0, stamped(1, 0, 4 * MIB))
        pool.snapshot_create(["vol@a"])
        client.write(0, stamped(2, 0, 4 * MIB))
        client.flush()
    pool.settle()
    store = tmp_path / "pool" / STORE_FILE
    data = bytearray(store.read_bytes())
    where = data.index(stamped(1, 700 * CHUNK, CHUNK))
    with store.open("r+b") as file:
        file.seek(where + 7)
        file.write(b"damage")
    with server.client("vol@a", dialect) as client:
        for offset, length in (
            (0, 4 * MIB),
            (600 * CHUNK, MIB // 2),
            (700 * CHUNK + 5, 10),
            (690 * CHUNK, 100 * CHUNK),
        ):
            reply = client.wait(client.send(READ, offset, length))
            (failed,) = (message for message in reply.messages if message.error)
            assert failed.offset == max(700 * CHUNK, offset)
            assert "damaged" in failed.text
            for message in reply.messages:
                if message.type == OFFSET_DATA:
                    assert message.offset is not None
                    assert message.offset + len(message.data) <= 700 * CHUNK
                    assert message.data == stamped(1, message.offset, len(message.data))
        assert client.read(701 * CHUNK, MIB) == stamped(1, 701 * CHUNK, MIB)


@DIALECTS
def test_holes_of_snapshots(server: ServerThread, pool: Pool, dialect: str) -> None:
    """What was a hole when it was taken is one, whatever has been written since."""
    with server.client("vol", dialect) as client:
        client.write(MIB, stamped(1, 0, MIB))
        pool.snapshot_create(["vol@a"])
        client.write(0, stamped(2, 0, 4 * MIB))
        client.trim(5 * MIB, MIB)
    with server.client("vol@a", dialect) as client:
        messages = client.call(READ, 0, SIZE).messages
        kinds = [(message.type, message.offset, message.length or len(message.data)) for message in messages]
        assert kinds == [(OFFSET_HOLE, 0, MIB), (OFFSET_DATA, MIB, MIB), (OFFSET_HOLE, 2 * MIB, 6 * MIB)]
        assert messages[1].data == stamped(1, 0, MIB)


@DIALECTS
def test_a_resize_under_a_client(server: ServerThread, pool: Pool, dialect: str) -> None:
    """Its own size stays what it was told; requests are held to the new one at once."""
    with server.client("vol", dialect, "base:allocation") as client:
        client.write(0, stamped(1, 0, 2 * MIB))
        pool.volume_resize("vol", 2 * SIZE)
        assert server.client("vol").size == 2 * SIZE
        client.write(2 * SIZE - CHUNK, stamped(2, 0, CHUNK))
        assert client.read(2 * SIZE - CHUNK, CHUNK) == stamped(2, 0, CHUNK)
        pool.volume_resize("vol", MIB, shrink=True)
        reply = client.wait(client.send(WRITE, MIB - CHUNK, 2 * CHUNK, payload=bytes(2 * CHUNK)))
        assert (reply.error, reply.messages[0].offset) == (ENOSPC, MIB)
        assert client.status(0, MIB) == ((MIB, 0),)
        assert client.read(0, MIB) == stamped(1, 0, MIB)
        assert server.client("vol").size == MIB
