"""Every command, in every reply style, over a real socket: the data path alone, on a raw file."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.server import jobs
from nbdsnap.server.reads import READ_PIECE, READ_WHOLE
from tests.support.blocks import stamped, write_stamped
from tests.support.client import Client, NbdError, Reply
from tests.support.deadline import wait_until
from tests.support.nbdserver import ServerThread
from tests.support.nbdwire import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    OFFSET_DATA,
    OFFSET_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    RESIZE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
)
from tests.support.rawdevice import RawFile, RawPool

SIZE = (96 << 20) + 512
"""More than the longest request, and no multiple of a block."""

SEED = 7

DIALECTS = ("simple", "structured", "extended")
ALL = pytest.mark.parametrize("dialect", DIALECTS)
CHUNKS = pytest.mark.parametrize("dialect", DIALECTS[1:])
CONTEXT = "base:allocation"


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[RawFile]:
    """Its first MiB is stamped, the rest is a hole."""
    path = write_stamped(tmp_path / "raw.img", 1 << 20, SEED)
    with path.open("r+b") as file:
        file.truncate(SIZE)
    opened = RawFile(path)
    yield opened
    opened.close()


@pytest.fixture
def server(raw: RawFile) -> Iterator[ServerThread]:
    running = ServerThread(RawPool({"vol": raw}))
    yield running
    running.stop()
    assert raw.opened == 0, "a device was not given back"


def content(raw: RawFile, offset: int, length: int) -> bytes:
    with raw.path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


# READ


@ALL
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 4096),
        (0, 1),
        (1, 1),
        (4095, 2),
        (511, 8193),
        (1000, 200_000),
        (SIZE - 1, 1),
        (SIZE - 512, 512),
        (77, 3 << 20),
    ],
)
def test_reads_any_alignment(
    server: ServerThread, raw: RawFile, dialect: str, cold: bool, offset: int, length: int
) -> None:
    raw.cold = cold
    with server.client("vol", dialect) as client:
        assert client.read(offset, length) == content(raw, offset, length)


@ALL
def test_reads_64_mib(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        data = client.read(3, 64 << 20)
        assert data[: 1 << 20] == stamped(SEED, 3, (1 << 20) - 3) + bytes(3)
        assert not any(data[1 << 20 :])


@CHUNKS
def test_a_long_read_is_one_chunk_where_the_client_asks_for_it(server: ServerThread, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        for length in (4096, READ_PIECE + 1, READ_WHOLE + 1, 20 << 20):
            reply = client.call(READ, 5, length, DF)
            assert [message.type for message in reply.messages].count(OFFSET_DATA) == 1


@CHUNKS
def test_a_long_read_comes_in_several_chunks(server: ServerThread, raw: RawFile, dialect: str) -> None:
    """As they become ready: the first is there before the last is read."""
    data = stamped(21, 0, 8 << 20)
    with server.client("vol", dialect) as client:
        client.write(0, data)
        messages = client.call(READ, 0, len(data)).messages
        assert [message.type for message in messages] == [OFFSET_DATA] * (len(data) // READ_PIECE)
        assert b"".join(message.data for message in messages) == data


def chunks(reply: Reply) -> list[tuple[int, int, int]]:
    """``(type, offset, length)``."""
    return [(one.type, one.offset or 0, one.length or len(one.data)) for one in reply.messages]


@CHUNKS
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_holes_are_not_sent(server: ServerThread, raw: RawFile, dialect: str, cold: bool) -> None:
    raw.cold = cold
    mib = 1 << 20
    with server.client("vol", dialect) as client:
        for length in (16 << 10, 256 << 10, (256 << 10) + 1, mib, 5 * mib, 64 * mib):
            assert chunks(client.call(READ, 2 * mib + 7, length)) == [(OFFSET_HOLE, 2 * mib + 7, length)]
        assert chunks(client.call(READ, mib - 4096, 3 * mib)) == [
            (OFFSET_DATA, mib - 4096, 4096),
            (OFFSET_HOLE, mib, 3 * mib - 4096),
        ]
        assert chunks(client.call(READ, 2 * mib, 4096)) == [(OFFSET_DATA, 2 * mib, 4096)]  # too little
        client.write(10 * mib, b"x" * 4096)
        client.write(10 * mib + 8192, b"x" * 4096)  # with less of a hole between them than is worth a chunk
        assert chunks(client.call(READ, 9 * mib, 2 * mib)) == [
            (OFFSET_HOLE, 9 * mib, mib),
            (OFFSET_DATA, 10 * mib, 12288),
            (OFFSET_HOLE, 10 * mib + 12288, mib - 12288),
        ]


@CHUNKS
def test_zeroes_that_are_no_holes_are_not_sent_either(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        client.write(0, bytes(3 << 20))
        for length in (16 << 10, 256 << 10, 3 << 20):
            assert {message.type for message in client.call(READ, 0, length).messages} == {OFFSET_HOLE}
        client.write(40_000, b"x")
        assert {message.type for message in client.call(READ, 0, 65536).messages} == {OFFSET_DATA}


@CHUNKS
def test_holes_are_sent_as_zeroes_in_one_piece_where_the_client_asks_for_it(server: ServerThread, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        for length in (65536, 1 << 20, 20 << 20):
            reply = client.call(READ, 2 << 20, length, DF)
            assert [message.type for message in reply.messages if message.type] == [OFFSET_DATA]
            assert reply.data == bytes(length)


def test_a_file_without_holes_is_not_asked_for_them(
    server: ServerThread, raw: RawFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("it has none")

    monkeypatch.setattr("tests.support.rawdevice.RawDevice.is_sparse", lambda _: False)
    monkeypatch.setattr("tests.support.rawdevice.RawDevice.extents", asked)
    with server.client("vol") as client:
        assert client.read(0, 3 << 20)[: 1 << 20] == content(raw, 0, 1 << 20)


@ALL
def test_other_replies_do_not_come_between_the_pieces_of_one(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        long = client.send(READ, 0, 40 << 20, DF if dialect != "simple" else 0)
        stream = b"".join(client.request(READ, number * 4096, 4096) for number in range(100))
        client.sock.sendall(stream + client.request(FLUSH))
        *short, flush = sorted(client.outstanding)[1:]
        replies = client.receive_all()
        assert replies[long].data[: 1 << 20] == content(raw, 0, 1 << 20)
        for number, cookie in enumerate(short):
            assert replies[cookie].data == content(raw, number * 4096, 4096)
        assert not replies[flush].error


@ALL
def test_nothing_is_read_or_written_at_length_0(server: ServerThread, raw: RawFile, dialect: str) -> None:
    before = content(raw, 0, 1 << 20)
    with server.client("vol", dialect) as client:
        for offset in (0, 77, SIZE):
            assert client.read(offset, 0) == b""
            client.trim(offset, 0)
            client.zero(offset, 0)
            client.cache(offset, 0)
            client.call(WRITE, offset, 0, PAYLOAD_LEN if dialect == "extended" else 0)
    assert content(raw, 0, 1 << 20) == before


# WRITE and its like


@ALL
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 4096), (0, 1), (4095, 2), (511, 8193), (1000, 20_000), (9, 200_000), (SIZE - 1, 1), (77, 3 << 20)],
)
def test_writes_any_alignment(
    server: ServerThread, raw: RawFile, dialect: str, cold: bool, offset: int, length: int
) -> None:
    raw.cold = cold
    start = max(0, offset - 4096)
    before = content(raw, start, offset - start)
    after = content(raw, offset + length, 4096)
    data = stamped(8, 0, length)
    with server.client("vol", dialect) as client:
        client.write(offset, data)
        assert client.read(offset, length) == data
    assert content(raw, start, offset - start) == before
    assert content(raw, offset + length, 4096) == after


@ALL
def test_writes_64_mib_and_goes_on(server: ServerThread, raw: RawFile, dialect: str) -> None:
    data = random.Random(9).randbytes(64 << 20)
    with server.client("vol", dialect) as client:
        client.write(1, data)
        client.write(0, b"first")
        assert client.read(0, 8) == b"first" + data[4:7]
    assert content(raw, 5, (64 << 20) - 4) == data[4:]


@pytest.mark.parametrize("dialect", DIALECTS[:2])  # extended headers ask for a disconnect instead
def test_a_payload_too_long_is_refused_and_the_stream_stays_in_step(server: ServerThread, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        too_long = bytes((64 << 20) + 1)
        assert client.error(WRITE, 0, len(too_long), payload=too_long) == EINVAL
        assert client.error(WRITE, SIZE - 512, len(too_long), payload=too_long) == ENOSPC
        client.write(0, b"still in step")
        assert client.read(0, 13) == b"still in step"


@ALL
def test_100_pipelined_requests(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        stream = b""
        expected: dict[int, bytes] = {}
        for number in range(50):
            stream += client.request(WRITE, (50 + number) * 8192, 8192, payload=stamped(11, number * 8192, 8192))
            stream += client.request(READ, number * 8192, 8192)
            expected[max(client.outstanding)] = content(raw, number * 8192, 8192)
        sender = threading.Thread(target=client.sock.sendall, args=(stream,))
        sender.start()
        replies = client.receive_all()
        sender.join()
    assert not any(reply.error for reply in replies.values())
    assert {cookie: replies[cookie].data for cookie in expected} == expected
    assert content(raw, 50 * 8192, 50 * 8192) == stamped(11, 0, 50 * 8192)


@ALL
def test_byte_by_byte(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        data = stamped(12, 0, 20_000)
        stream = client.request(READ, 0, 100) + client.request(WRITE, 200, 300, payload=data[:300])
        stream += client.request(WRITE, 8192, len(data), payload=data) + client.request(FLUSH)
        stream += client.request(READ, 4096, 10)
        for position in range(len(stream)):
            client.sock.sendall(stream[position : position + 1])
        first, *_, last = sorted(client.outstanding)
        replies = client.receive_all()
        assert replies[first].data == stamped(SEED, 0, 100)
        assert replies[last].data == stamped(SEED, 4096, 10)
    assert content(raw, 200, 300) == data[:300]
    assert content(raw, 8192, len(data)) == data


@ALL
def test_any_split_of_the_stream_gives_the_same(server: ServerThread, raw: RawFile, dialect: str) -> None:
    rng = random.Random(13)
    with server.client("vol", dialect) as client:
        stream = b""
        for number in range(40):
            length = rng.choice([1, 500, 4096, 20_000, 70_000, 300_000])
            stream += client.request(WRITE, number * 300_000, length, payload=stamped(14, number * 300_000, length))
            stream += client.request(READ, number * 300_000, 10)
        position = 0

        def send() -> None:
            nonlocal position
            while position < len(stream):
                step = rng.choice([1, 27, 28, 29, 4096, 65536, 1 << 20])
                client.sock.sendall(stream[position : position + step])
                position += step

        sender = threading.Thread(target=send)
        sender.start()
        replies = client.receive_all()
        sender.join()
        assert not any(reply.error for reply in replies.values())
        for number in range(40):
            assert client.read(number * 300_000, 1) == stamped(14, number * 300_000, 1)


@ALL
def test_fua_is_durable_before_its_reply(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        for command, payload in ((WRITE, b"x" * 4096), (TRIM, b""), (WRITE_ZEROES, b"")):
            syncs = raw.syncs
            client.call(command, 0, 4096, FUA, payload)
            assert raw.syncs == syncs + 1
        for command in (READ, CACHE):  # allowed, and nothing to do
            client.call(command, 0, 4096, FUA)
        client.call(FLUSH, 0, 0, FUA)


@ALL
def test_flush_syncs_what_was_written_and_only_then(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        client.flush()
        assert raw.syncs == 0
        client.write(0, b"x")
        client.flush()
        client.flush()
        assert raw.syncs == 1


@ALL
def test_trim_and_write_zeroes(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        client.trim(4096, 8192)
        client.zero(100, 10_000)
        client.zero(65536, 65536, NO_HOLE)
        client.zero(300_000, 50_000, FAST_ZERO)
        assert client.error(WRITE_ZEROES, 0, 4096, FAST_ZERO | NO_HOLE) == ENOTSUP
        data = client.read(0, 1 << 20)
    expected = bytearray(stamped(SEED, 0, 1 << 20))
    for start, end in ((4096, 12288), (100, 10_100), (65536, 131072), (300_000, 350_000)):
        expected[start:end] = bytes(end - start)
    assert data == expected


@ALL
def test_cache(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        client.cache(5, 1 << 20)


@ALL
def test_long_trims_and_zeroes_go_to_the_engine_in_pieces(
    server: ServerThread, raw: RawFile, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine keeps of an operation grows with the chunks in it, and a length may have 64 bits."""
    monkeypatch.setattr(jobs, "PIECE", 20_000)
    syncs = raw.syncs
    with server.client("vol", dialect) as client:
        client.trim(5_000, 50_001, FUA)
        assert raw.syncs == syncs + 1
        client.zero(100_000, 20_000)
        client.zero(200_000, 20_001, NO_HOLE)
        data = client.read(0, 1 << 20)
        raw.faults[50_000] = OSError(EIO, "the disk is dying")
        for command in (TRIM, WRITE_ZEROES):
            assert client.error(command, 0, 100_000) == EIO
    expected = bytearray(stamped(SEED, 0, 1 << 20))
    for start, end in ((5_000, 55_001), (100_000, 120_000), (200_000, 220_001)):
        expected[start:end] = bytes(end - start)
    assert data == expected


def test_lengths_of_more_than_32_bits(tmp_path: Path) -> None:
    """Extended headers alone can ask that: 20 GiB less a byte, in one request each."""
    size = 20 << 30
    path = tmp_path / "huge.img"
    with path.open("wb") as file:
        file.truncate(size)
    raw = RawFile(path)
    running = ServerThread(RawPool({"vol": raw}))
    try:
        with running.client("vol", "extended", CONTEXT) as client:
            client.write(15 << 30, b"data")
            before, data, after = client.status(1, size - 1)
            assert before == ((15 << 30) - 1, 3) and sum(length for length, _ in (before, data, after)) == size - 1
            assert data[1] == 0 and after[1] == 3
            assert client.status(0, size, REQ_ONE) == ((15 << 30, 3),)
            client.cache(0, size)
            assert client.error(READ, 0, 1 << 33) == EOVERFLOW
            client.zero(1, size - 1)
            assert client.read(15 << 30, 4) == bytes(4)
            client.write(15 << 30, b"data")
            client.trim(0, size, FUA)
            assert client.status(0, size) == ((size, 3),)
            assert client.error(TRIM, 1, size) == EINVAL
            assert client.error(WRITE_ZEROES, 1 << 63, (1 << 64) - 1) == ENOSPC
    finally:
        running.stop()
        raw.close()


# BLOCK_STATUS


@CHUNKS
def test_block_status(server: ServerThread, raw: RawFile, dialect: str) -> None:
    with server.client("vol", dialect, CONTEXT) as client:
        assert client.status(0, SIZE) == ((1 << 20, 0), (SIZE - (1 << 20), 3))
        assert client.status(4096, 8192) == ((8192, 0),)
        assert client.status((1 << 20) - 5, 10, REQ_ONE) == ((5, 0),)
        assert client.status(2 << 20, 1 << 20, REQ_ONE) == ((1 << 20, 3),)
        client.trim(65536, 65536)
        assert client.status(0, 262144) == ((65536, 0), (65536, 3), (131072, 0))
        assert client.error(BLOCK_STATUS, SIZE - 1, 2) == EINVAL


@CHUNKS
def test_block_status_of_length_0_describes_what_follows(server: ServerThread, dialect: str) -> None:
    with server.client("vol", dialect, CONTEXT) as client:
        assert client.status(0, 0) == ((4096, 0),)
        assert client.status(SIZE - 5, 0) == ((5, 3),)
        assert client.error(BLOCK_STATUS, SIZE, 0) == EINVAL
        assert client.error(BLOCK_STATUS, 0, 0, REQ_ONE) == EINVAL
        assert client.status(0, 512) == ((512, 0),)


@ALL
def test_no_block_status_without_a_context(server: ServerThread, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        assert client.error(BLOCK_STATUS, 0, 4096) == EINVAL


def test_block_status_of_one_context_of_a_payload(server: ServerThread) -> None:
    client = Client(server.connect()).extended()
    (context_id,) = client.set_contexts("vol", CONTEXT).values()
    with client.go("vol"):
        payload = (8192).to_bytes(8, "big") + context_id.to_bytes(4, "big")
        reply = client.call(BLOCK_STATUS, 0, len(payload), 0, payload)
        assert reply.extents == {context_id: ((8192, 0),)}


def test_payloads_that_say_nothing_sensible(server: ServerThread) -> None:
    client = Client(server.connect()).extended()
    (context_id,) = client.set_contexts("vol", CONTEXT).values()
    with client.go("vol"):
        one = context_id.to_bytes(4, "big")
        for payload in (
            b"",
            bytes(7),
            (4096).to_bytes(8, "big"),
            (4096).to_bytes(8, "big") + one + b"x",
            (4096).to_bytes(8, "big") + one + one,
            (4096).to_bytes(8, "big") + (99).to_bytes(4, "big"),
            (SIZE + 1).to_bytes(8, "big") + one,
            (4096).to_bytes(8, "big") + one * 5000,
        ):
            assert client.error(BLOCK_STATUS, 0, len(payload), PAYLOAD_LEN, payload) == EINVAL
        assert client.error(READ, 0, 4, PAYLOAD_LEN, b"1234") == EINVAL
        assert client.read(0, 4096) == stamped(SEED, 0, 4096), "out of step"


def test_a_write_without_its_flag_has_no_payload(server: ServerThread) -> None:
    with server.client("vol", "extended") as client:
        assert client.error(WRITE, 0, 4096) == EINVAL
        assert client.read(0, 4096) == stamped(SEED, 0, 4096), "out of step"


def test_a_fragmented_file_is_told_in_parts(server: ServerThread, raw: RawFile) -> None:
    with server.client("vol", "structured", CONTEXT) as client:
        for number in range(60):
            client.write((4 << 20) + number * 65536, b"data")
        offset, extents = 0, []
        while offset < SIZE:
            part = client.status(offset, SIZE - offset)
            extents += part
            offset += sum(length for length, _ in part)
        assert sum(1 for _, flags in extents if flags == 0) == 61


# Refusals


@ALL
def test_refusals_leave_the_connection_and_the_data_as_they_were(
    server: ServerThread, raw: RawFile, dialect: str
) -> None:
    before = content(raw, SIZE - 4096, 4096)
    with server.client("vol", dialect) as client:
        assert client.error(READ, SIZE, 1) == EINVAL
        assert client.error(READ, SIZE - 1, 2) == EINVAL
        assert client.error(READ, 2**64 - 1, 2) == EINVAL
        assert client.error(WRITE, SIZE - 4, 5, payload=b"12345") == ENOSPC
        assert client.error(WRITE, SIZE - 4, 200_000, payload=bytes(200_000)) == ENOSPC
        assert client.error(WRITE_ZEROES, SIZE - 4, 5) == ENOSPC
        assert client.error(TRIM, SIZE - 4, 5) == EINVAL
        assert client.error(CACHE, SIZE - 4, 5) == EINVAL
        assert client.error(READ, 0, (64 << 20) + 1) == (EINVAL if dialect == "simple" else EOVERFLOW)
        assert client.error(RESIZE, 0, 4096) == EINVAL
        assert client.error(77, 0, 4096) == EINVAL
        assert client.error(READ, 0, 4096, NO_HOLE) == EINVAL
        assert client.error(WRITE, 0, 4, REQ_ONE, b"1234") == EINVAL
        assert client.error(READ, 0, 4096, 1 << 15) == EINVAL
        assert client.error(FLUSH, 4096, 4096) == EINVAL
        assert client.read(0, 4096) == stamped(SEED, 0, 4096)
    assert content(raw, SIZE - 4096, 4096) == before


@ALL
def test_nothing_modifies_a_read_only_export(server: ServerThread, raw: RawFile, dialect: str) -> None:
    raw.read_only = True
    with server.client("vol", dialect) as client:
        assert client.error(WRITE, 0, 4, payload=b"1234") == EPERM
        assert client.error(WRITE, 0, 1 << 20, payload=bytes(1 << 20)) == EPERM
        if dialect != "extended":  # which asks for a disconnect instead
            assert client.error(WRITE, 0, (64 << 20) + 1, payload=bytes((64 << 20) + 1)) == EPERM
        assert client.error(TRIM, 0, 4096) == EPERM
        assert client.error(WRITE_ZEROES, 0, 4096) == EPERM
        client.flush()
        assert client.read(0, 4096) == stamped(SEED, 0, 4096)


@CHUNKS
def test_an_error_chunk_says_why(server: ServerThread, dialect: str) -> None:
    with server.client("vol", dialect) as client:
        reply = client.wait(client.send(READ, SIZE, 1))
        assert "past the end" in reply.text
        assert str(SIZE) in reply.text
        for command, length in ((READ, 4096), (TRIM, 4096), (WRITE_ZEROES, 4096), (CACHE, 4096), (READ, 0)):
            (message,) = client.wait(client.send(command, SIZE - 100, length)).messages
            assert message.offset == (SIZE if length else None), "the first byte that is past the end"
        (message,) = client.wait(client.send(READ, (1 << 64) - 4096, 4096)).messages
        assert message.offset is None, "libnbd would drop the connection, since the end is 0 in 64 bits"


@ALL
def test_an_error_of_the_disk_is_one_request_s_own(server: ServerThread, raw: RawFile, dialect: str) -> None:
    raw.faults[8192] = OSError(EIO, "the disk is dying")
    with server.client("vol", dialect) as client:
        reply = client.wait(client.send(READ, 4096, 8192))
        assert reply.error == EIO
        assert dialect == "simple" or "the disk is dying" in reply.text
        assert client.error(WRITE, 8000, 500, payload=bytes(500)) == EIO
        assert client.error(TRIM, 8192, 4096) == EIO
        raw.faults[8192] = OSError(28, "no space")
        assert client.error(WRITE, 8000, 500, payload=bytes(500)) == ENOSPC
        assert client.read(0, 8192) == stamped(SEED, 0, 8192)
        cookies = [client.send(READ, number * 4096, 4096) for number in range(40)]
        replies = client.receive_all()
        assert [number for number, cookie in enumerate(cookies) if replies[cookie].error] == [2]


def failing_long_read(server: ServerThread, raw: RawFile, dialect: str, flags: int = 0) -> Reply:
    """A READ of 20 MiB whose twelfth fails."""
    raw.faults[12 << 20] = OSError(EIO, "the disk is dying")
    with server.client("vol", dialect) as client:
        cookie = client.send(READ, 0, 20 << 20, flags)
        reply = client.wait(cookie)
        assert client.read(0, 4096) == stamped(SEED, 0, 4096)
        return reply


@CHUNKS
@pytest.mark.parametrize("flags", [0, DF])
def test_an_error_in_the_midst_of_a_long_read_follows_its_data(
    server: ServerThread, raw: RawFile, dialect: str, flags: int
) -> None:
    with server.client("vol", dialect) as client:
        client.write(0, stamped(SEED, 0, 20 << 20))
    reply = failing_long_read(server, raw, dialect, flags)
    assert reply.error == EIO
    assert reply.messages[0].data[:4096] == stamped(SEED, 0, 4096)
    (failed,) = (message for message in reply.messages if message.error)
    assert failed.offset == 12 << 20, "what came before is good"
    assert b"".join(message.data for message in reply.messages)[: 12 << 20] == stamped(SEED, 0, 12 << 20)


def test_an_error_in_the_midst_of_a_long_simple_reply_ends_the_connection(server: ServerThread, raw: RawFile) -> None:
    raw.faults[12 << 20] = OSError(EIO, "the disk is dying")
    with server.client("vol", "simple") as client:
        assert client.error(READ, (12 << 20) - 5, 4 << 20) == EIO  # short enough to be known before the reply begins
        client.send(READ, 0, 20 << 20)
        received = 0
        while part := client.sock.recv(1 << 20):
            received += len(part)
        assert received < 20 << 20
    wait_until(lambda: server.connections() == 0, "the end of the connection")


def test_a_bug_in_one_request_is_an_error_reply(
    server: ServerThread, raw: RawFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, offset: int, length: int) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tests.support.rawdevice.RawDevice.cache", broken)
    with server.client("vol") as client:
        with pytest.raises(NbdError) as caught:
            client.cache(0, 4096)
        assert caught.value.error == EIO
        assert client.read(0, 10) == stamped(SEED, 0, 10)
