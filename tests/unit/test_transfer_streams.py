"""What streams come through: chunks of HTTP, pipes, sockets, files; and how fast they may."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.errors import CorruptionError, DeltaCutError, NotFoundError, ServerError
from nbdsnap.replication.wire import SILENCE_S, ChunkedSource
from nbdsnap.transfer.channel import offered, opened_stream
from nbdsnap.transfer.pace import Progress, RateLimit
from nbdsnap.transfer.streams import Sink, Source, no_tick

DATA = bytes(range(256)) * 4096
"""1 MiB."""


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def read_all(source: Source | ChunkedSource, piece: int) -> bytes:
    found = b""
    buffer = memoryview(bytearray(piece))
    while count := source.read_into(buffer):
        found += buffer[:count]
    return found


@pytest.mark.parametrize("piece", [1 << 20, 24, 1])
def test_chunks_come_out_as_they_went_in(ends: tuple[socket.socket, socket.socket], piece: int) -> None:
    data = DATA[: 1 << 20 if piece > 24 else 5000]
    body = chunks(data[:1], data[1:4000], data[4000:])
    sender = threading.Thread(target=ends[0].sendall, args=(body,))
    sender.start()
    source = ChunkedSource(ends[1], no_tick)
    assert read_all(source, piece) == data
    assert source.received == len(data)
    sender.join()


@pytest.mark.parametrize(
    "body", [b"zz\r\n", b"-5\r\n", b"5\r\nhello??", b"x" * 1000, b"1" * 1000, b"1" + b"0" * 20 + b"\r\n"]
)
def test_what_are_no_chunks_is_refused(ends: tuple[socket.socket, socket.socket], body: bytes) -> None:
    ends[0].sendall(body + bytes(200))
    with pytest.raises(CorruptionError):
        read_all(ChunkedSource(ends[1], no_tick), 100)


@pytest.mark.parametrize("body", [b"", b"5", b"5\r\nhel", b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n"])
def test_a_cut_is_noticed(ends: tuple[socket.socket, socket.socket], body: bytes) -> None:
    ends[0].sendall(body)
    ends[0].shutdown(socket.SHUT_WR)
    with pytest.raises(DeltaCutError, match="cut"):
        read_all(ChunkedSource(ends[1], no_tick), 100)


def test_silence_is_a_cut_in_the_end(ends: tuple[socket.socket, socket.socket]) -> None:
    ticks = []
    moments = iter([0.0, 1.0, SILENCE_S + 1])
    source = ChunkedSource(ends[1], lambda: ticks.append(1), lambda: next(moments))
    with pytest.raises(DeltaCutError, match="silent"):
        read_all(source, 100)
    assert len(ticks) == 2


class StopError(Exception):
    pass


def stop() -> None:
    raise StopError


def test_who_waits_for_a_pipe_can_be_stopped() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(StopError):
            Source(reader, stop).read_into(memoryview(bytearray(10)))
        sink = Sink(writer, stop)
        with pytest.raises(StopError):
            sink.write([bytes(64 << 20)])
        assert os.get_blocking(writer), "the descriptor is others', too"
        sink.close()
    finally:
        os.close(reader)
        os.close(writer)


def test_who_waits_for_a_socket_can_be_stopped(ends: tuple[socket.socket, socket.socket]) -> None:
    sink = Sink(ends[0].fileno(), stop)
    with pytest.raises(StopError):
        sink.write([bytes(64 << 20)])
    sink.close()
    with pytest.raises(StopError):
        Source(ends[0].fileno(), stop).read_into(memoryview(bytearray(10)))


def test_a_pipe_that_nobody_reads_breaks() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sink = Sink(writer)
    with pytest.raises(BrokenPipeError):
        sink.write([DATA])
    sink.close()
    os.close(writer)


def test_many_buffers_arrive_in_order(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        sink = Sink(file.fileno())
        parts = [DATA[index : index + 3] for index in range(0, 9000, 3)]
        sink.write([*parts, b"", DATA])
        sink.close()
    assert (tmp_path / "file").read_bytes() == DATA[:9000] + DATA


def test_a_descriptor_is_handed_over(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with offered(writer, tmp_path / "control.sock") as path, opened_stream(path, write=True) as fd:
        os.close(writer)
        os.write(fd, b"hello")
    assert os.read(reader, 100) == b"hello"
    assert os.read(reader, 100) == b"", "no copy of it is left open"
    os.close(reader)
    assert not path.exists()


def test_a_path_may_be_a_file_or_a_fifo(tmp_path: Path) -> None:
    with opened_stream(tmp_path / "new", write=True) as fd:
        os.write(fd, b"hello")
    with opened_stream(tmp_path / "new", write=False) as fd:
        assert os.read(fd, 100) == b"hello"
    with pytest.raises(NotFoundError), opened_stream(tmp_path / "nix", write=False):
        pass
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(ServerError), opened_stream(tmp_path / "dead", write=False):
        pass


def test_an_offer_that_nobody_takes_leaves_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    with offered(0, tmp_path / "control.sock") as path:
        assert path.is_socket()
        assert path.stat().st_mode & 0o077 == 0
    assert not path.exists()
    for thread in threading.enumerate():
        if thread.name == "stream":
            thread.join(5)
    assert threading.active_count() <= before


def test_a_rate_is_kept() -> None:
    now = [0.0]
    ticks = []

    def sleep(seconds: float) -> None:
        assert 0 < seconds <= 0.1
        now[0] += seconds

    limit = RateLimit(1000, lambda: ticks.append(1), lambda: now[0], sleep)
    for _ in range(50):
        limit.spend(100)
    assert 4.8 <= now[0] <= 5.0
    assert len(ticks) >= 45, "and it can be stopped all the while"
    now[0] += 100
    limit.spend(100)
    assert now[0] < 105.1, "what was not used is not saved up"
    limit.spend(1000)
    assert now[0] >= 105.8


def test_progress_is_told_now_and_then() -> None:
    now = [0.0]
    told: list[tuple[int, int]] = []
    progress = Progress(lambda done, total: told.append((done, total)), lambda: now[0])
    progress.total = 1000
    for done in range(0, 1000, 10):
        now[0] += 0.01
        progress.advance(done)
    assert 8 <= len(told) <= 11
    progress.tick()
    assert told[-1] == (990, 1000)
