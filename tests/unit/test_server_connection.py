"""Connections that end, misbehave or are too many: the others do not notice, and nothing is left behind."""

from __future__ import annotations

import contextlib
import logging
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.addresses import TcpAddress, UnixAddress
from nbdsnap.errors import InUseError
from nbdsnap.server.context import Limits
from nbdsnap.server.listeners import Listener, open_listeners
from tests.support import nbdwire
from tests.support.blocks import stamped, write_stamped
from tests.support.client import Client, DisconnectedError, RefusedError
from tests.support.deadline import wait_until
from tests.support.nbdserver import ServerThread
from tests.support.nbdwire import DISC, ESHUTDOWN, FLUSH, READ, WRITE
from tests.support.rawdevice import RawFile, RawPool

SIZE = 32 << 20
SEED = 7
LIMITS = Limits(connections=20, handshake_s=0.3, shutdown_s=5.0, linger_s=0.5)
"""Short enough to wait for."""


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[RawFile]:
    path = write_stamped(tmp_path / "raw.img", 1 << 20, SEED)
    with path.open("r+b") as file:
        file.truncate(SIZE)
    opened = RawFile(path)
    yield opened
    opened.close()


@pytest.fixture
def server(raw: RawFile) -> Iterator[ServerThread]:
    yield from run_server(raw)


def run_server(
    raw: RawFile, limits: Limits = LIMITS, listeners: list[Listener] | None = None
) -> Iterator[ServerThread]:
    running = ServerThread(RawPool({"vol": raw}), limits, listeners or [])
    yield running
    raw.gate.set()
    running.stop()
    assert raw.opened == 0, "a device was not given back"


@pytest.fixture
def witness(server: ServerThread) -> Iterator[Client]:
    """A client that must not notice what happens to the others."""
    with server.client() as client:
        yield client
        client.write(SIZE - 8, b"unharmed")
        assert client.read(SIZE - 8, 8) == b"unharmed"
        assert client.read(4096, 4096) == stamped(SEED, 4096, 4096)
        client.disconnect()
    wait_until(lambda: server.connections() == 0, "the end of all connections")


def expect_only(server: ServerThread, count: int) -> None:
    wait_until(lambda: server.connections() == count, f"{count} connections to be left")


# Handshake


def test_a_handshake_that_never_ends_is_ended(server: ServerThread, witness: Client) -> None:
    silent = server.connect()
    slow = server.connect()
    slow.sendall(nbdwire.client_flags() + nbdwire.option(nbdwire.LIST)[:7])
    expect_only(server, 1)
    for sock in (silent, slow):
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
        sock.close()


def test_transmission_has_no_time_limit(server: ServerThread, witness: Client) -> None:
    started = time.monotonic()
    wait_until(lambda: time.monotonic() > started + 2 * LIMITS.handshake_s, "twice the handshake's time")


def test_garbage_in_the_handshake(server: ServerThread, witness: Client) -> None:
    rng = random.Random(1)
    for _ in range(10):
        sock = server.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(rng.randbytes(5000))
            while sock.recv(4096):
                pass
        sock.close()
    expect_only(server, 1)


def test_the_handshake_byte_by_byte(server: ServerThread, witness: Client) -> None:
    sock = server.connect()
    stream = nbdwire.client_flags() + nbdwire.option(nbdwire.STRUCTURED_REPLY) + nbdwire.go("vol")
    for position in range(len(stream)):
        sock.sendall(stream[position : position + 1])
    expected = 18 + 20 + 32 + 20
    received = b""
    while len(received) < expected:
        received += sock.recv(expected - len(received))
    assert received.endswith(struct.pack(">QIII", 0x3E889045565A9, nbdwire.GO, nbdwire.ACK, 0))
    sock.close()
    expect_only(server, 1)


def test_requests_right_behind_the_handshake_in_one_segment(server: ServerThread, witness: Client) -> None:
    sock = server.connect()
    stream = nbdwire.client_flags() + nbdwire.go("vol") + nbdwire.request(READ, 4096, 100, cookie=5)
    sock.sendall(stream + nbdwire.request(DISC, 0, 0))
    received = b""
    while part := sock.recv(4096):
        received += part
    reply = struct.pack(">IIQ", 0x67446698, 0, 5) + stamped(SEED, 4096, 100)
    assert received.endswith(reply)
    sock.close()


def test_a_client_that_lists_and_never_reads_costs_little(server: ServerThread, witness: Client) -> None:
    sock = server.connect()
    sock.setblocking(False)
    sock.send(nbdwire.client_flags())
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        while True:
            sock.send(nbdwire.option(nbdwire.LIST) * 100)
    expect_only(server, 1)  # its time is up
    sock.close()


def test_abort_is_acknowledged(server: ServerThread, witness: Client) -> None:
    client = Client(server.connect())
    client.option(nbdwire.option(nbdwire.ABORT))
    client.expect_end()


def test_unknown_export(server: ServerThread, witness: Client) -> None:
    client = Client(server.connect())
    with pytest.raises(RefusedError) as caught:
        client.go("nothing")
    assert caught.value.reply == nbdwire.UNKNOWN
    assert client.list() == ["vol"]
    client.go("").close()


def test_too_many_connections(server: ServerThread) -> None:
    clients = [server.client() for _ in range(LIMITS.connections)]
    with pytest.raises((DisconnectedError, ConnectionResetError, BrokenPipeError)):
        server.client()
    clients.pop().disconnect()
    expect_only(server, LIMITS.connections - 1)
    clients.append(server.client())
    for client in clients:
        assert client.read(4096, 10) == stamped(SEED, 4096, 10)
        client.close()


# Transmission that ends badly


def test_garbage_ends_the_connection_after_the_good_requests(server: ServerThread, witness: Client) -> None:
    client = server.client()
    client.sock.sendall(client.request(READ, 4096, 10) + b"garbage, and then some")
    assert client.receive().data == stamped(SEED, 4096, 10)
    client.expect_end()


@pytest.mark.parametrize("sent", [10, 28, 100, 100_000, 600_000])
def test_leaving_in_the_midst_of_a_payload(server: ServerThread, witness: Client, raw: RawFile, sent: int) -> None:
    client = server.client()
    request = client.request(WRITE, 4096, 1 << 20, payload=bytes(1 << 20))
    client.sock.sendall(request[:sent])
    client.close()
    expect_only(server, 1)
    assert witness.read(4096, 4096) == stamped(SEED, 4096, 4096)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_reset_with_100_reads_in_flight(raw: RawFile, tmp_path: Path, transport: str) -> None:
    path = tmp_path / "nbd.sock"
    (listener,) = open_listeners([UnixAddress(path) if transport == "unix" else TcpAddress("127.0.0.1", 0)])
    address = path if transport == "unix" else ("127.0.0.1", int(listener.uri.rpartition(":")[2]))
    for server in run_server(raw, LIMITS, [listener]):
        with Client.connect(address).go("vol") as other:
            raw.cold = True
            raw.gate.clear()
            client = Client.connect(address).structured().go("vol")
            client.sock.sendall(b"".join(client.request(READ, number * 4096, 4096) for number in range(100)))
            wait_until(lambda: raw.waiting, "reads to be in flight")
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            assert raw.opened == 2  # the device is not taken away from the reads
            raw.gate.set()
            expect_only(server, 1)
            assert raw.opened == 1
            assert other.read(4096, 10) == stamped(SEED, 4096, 10)
    assert not path.exists()


def test_writes_in_flight_outlive_their_client(server: ServerThread, witness: Client, raw: RawFile) -> None:
    raw.cold = True
    raw.gate.clear()
    client = server.client()
    data = stamped(8, 0, 64 * 4096)
    for number in range(64):
        client.send(WRITE, (2 << 20) + number * 4096, 4096, payload=data[number * 4096 : (number + 1) * 4096])
    client.send(WRITE, 4 << 20, 1 << 20, payload=stamped(9, 0, 1 << 20))
    wait_until(lambda: server.call(lambda: server.context.poll.outstanding) == 65, "the writes to be in flight")
    client.close()
    with server.client() as another:  # whose requests must not get the buffers of those writes
        raw.gate.set()
        another.write(8 << 20, bytes(1 << 20))
        expect_only(server, 2)
        assert another.read(2 << 20, len(data)) == data
        assert another.read(4 << 20, 1 << 20) == stamped(9, 0, 1 << 20)


@pytest.mark.parametrize("dialect", ["simple", "structured", "extended"])
def test_disc_with_50_outstanding_loses_none(server: ServerThread, witness: Client, raw: RawFile, dialect: str) -> None:
    raw.cold = True
    raw.gate.clear()
    client = server.client("vol", dialect)
    stream = b"".join(client.request(READ, number * 4096, 4096) for number in range(24))
    stream += b"".join(client.request(WRITE, (1 << 20) + n * 4096, 4096, payload=bytes(4096)) for n in range(24))
    stream += client.request(FLUSH) + client.request(READ, 0, 3 << 20)
    client.sock.sendall(stream + client.request(DISC) + client.request(READ, 0, 1))
    ignored = max(client.outstanding)
    del client.outstanding[ignored]
    wait_until(lambda: raw.waiting, "reads to be in flight")
    raw.gate.set()
    replies = client.receive_all()
    assert len(replies) == 50
    assert not any(reply.error for reply in replies.values())
    assert all(
        reply.data == stamped(SEED, (cookie - 1) * 4096, 4096) for cookie, reply in replies.items() if cookie < 25
    )
    client.expect_end()


def test_the_end_of_the_client_s_stream_is_a_disc(server: ServerThread, witness: Client, raw: RawFile) -> None:
    raw.cold = True
    client = server.client()
    for number in range(50):
        client.send(READ, number * 4096, 4096)
    client.sock.shutdown(socket.SHUT_WR)
    assert len(client.receive_all()) == 50
    client.expect_end()


def test_a_bug_ends_one_connection(
    server: ServerThread, witness: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = server.client()
    with monkeypatch.context() as patch:
        patch.setattr("nbdsnap.server.datapath.DataPath._serve", lambda *_: 1 / 0)
        client.send(READ, 0, 1)
        client.expect_end()
    assert "ZeroDivisionError" in caplog.text


# Clients that are slow, or greedy


def test_a_client_that_does_not_read_is_held_to_its_limits(server: ServerThread, witness: Client, raw: RawFile) -> None:
    client = server.client()
    asked = 0
    client.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while asked < 1000:
            client.sock.send(client.request(READ, 0, 1 << 20))
            asked += 1
    client.sock.setblocking(True)
    held = wait_until(lambda: server.call(most_held, server), "replies to be queued")
    assert held <= LIMITS.held_bytes + (3 << 20)
    started = time.monotonic()
    for number in range(100):
        assert witness.read(number * 4096, 4096) == stamped(SEED, number * 4096, 4096)
    assert time.monotonic() - started < 5
    last = max(client.outstanding)
    for cookie in range(asked + 1, last + 1):  # was not sent
        del client.outstanding[cookie]
    expected = stamped(SEED, 0, 1 << 20)
    for _ in range(asked):
        assert client.receive().data == expected
    client.close()


def most_held(server: ServerThread) -> int:
    """The bytes of the greediest connection."""
    paths = [connection._path for connection in server.server._connections]
    return max(path.held + path.channel.queued for path in paths if path is not None)


def test_a_client_that_does_not_read_does_not_lock_up_its_writes(
    server: ServerThread, witness: Client, raw: RawFile
) -> None:
    """Small replies never fill anything: a thousand of them wait while the client only writes."""
    client = server.client()
    for number in range(1000):
        client.send(WRITE, (2 << 20) + number * 4096, 4096, payload=bytes(4096))
    assert not any(reply.error for reply in client.receive_all().values())
    client.close()


def test_a_client_that_reads_slowly_gets_everything(server: ServerThread, witness: Client, raw: RawFile) -> None:
    client = server.client("vol", "simple")
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    expected = b""
    stream = b""
    for number in range(64):
        stream += client.request(READ, number * 16384, 16384)
        expected += struct.pack(">IIQ", 0x67446698, 0, number + 1) + stamped(SEED, number * 16384, 16384)
    client.sock.sendall(stream)
    received = b""
    while len(received) < len(expected):
        received += client.sock.recv(1500)
    assert received == expected
    client.close()


def test_last_replies_that_nobody_takes_are_dropped(server: ServerThread, witness: Client, raw: RawFile) -> None:
    client = server.client()
    for _ in range(8):
        client.send(READ, 0, 1 << 20)
    client.sock.sendall(client.request(DISC))
    expect_only(server, 1)
    client.close()


def test_many_clients_at_once(server: ServerThread, raw: RawFile) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            with server.client("vol", rng.choice(["simple", "structured", "extended"])) as client:
                base = (2 + seed) << 20
                for turn in range(30):
                    data = rng.randbytes(rng.choice([1, 4096, 100_000]))
                    client.write(base + turn, data)
                    client.send(FLUSH)
                    cookies = [client.send(READ, base + turn, len(data)) for _ in range(10)]
                    replies = client.receive_all()
                    assert all(replies[cookie].data == data for cookie in cookies)
                client.disconnect()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    expect_only(server, 0)


def test_an_idle_server_uses_no_processor(server: ServerThread) -> None:
    with server.client() as client:
        for _ in range(100):
            client.read(0, 4096)
        before = time.process_time()
        started = time.monotonic()
        wait_until(lambda: time.monotonic() > started + 0.5, "half a second of nothing")
        assert time.process_time() - before < 0.1


# Shutdown


def test_shutdown_finishes_what_is_in_flight_and_refuses_the_rest(raw: RawFile) -> None:
    for server in run_server(raw):
        raw.cold = True
        raw.gate.clear()
        negotiating = Client(server.connect())
        client = server.client()
        idle = server.client()
        for number in range(20):
            client.send(WRITE, number * 4096, 4096, payload=b"x" * 4096)
            client.send(READ, (64 + number) * 4096, 4096)
        wait_until(lambda: raw.waiting, "reads to be in flight")
        server.begin_stop()
        idle.expect_end()
        with pytest.raises(RefusedError) as caught:
            negotiating.go("vol")
        assert caught.value.reply == nbdwire.SHUTDOWN
        raw.gate.set()
        replies = client.receive_all()
        assert not any(reply.error for reply in replies.values())
        client.expect_end()
        server.stop()


def test_shutdown_refuses_new_requests(raw: RawFile) -> None:
    """What arrives with the shutdown: the loop is held while requests are sent, so that it sees both at once."""
    for server in run_server(raw):
        client = server.client()
        held = threading.Event()
        server.loop.call_soon_threadsafe(held.wait)
        server.begin_stop()
        cookies = [client.send(READ, 0, 4096), client.send(WRITE, 0, 4096, payload=bytes(4096))]
        held.set()
        replies = client.receive_all()
        errors = {replies[cookie].error for cookie in cookies}
        assert errors <= {0, ESHUTDOWN}
        client.expect_end()
        server.stop()


def test_shutdown_waits_no_longer_than_it_may(raw: RawFile) -> None:
    for server in run_server(raw, Limits(shutdown_s=0.3)):
        raw.cold = True
        raw.gate.clear()
        client = server.client()
        client.send(READ, 0, 4096)
        wait_until(lambda: raw.waiting, "the read to be in flight")
        server.begin_stop()
        with pytest.raises(DisconnectedError):
            client.receive()
        raw.gate.set()
        server.stop()


# Listeners


def test_tcp_and_unix_listeners(raw: RawFile, tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    listeners = open_listeners([TcpAddress("127.0.0.1", 0), TcpAddress("localhost", 0), UnixAddress(path)])
    assert listeners[2].uri == f"nbd+unix:///?socket={path}"
    ports = [int(listener.uri.rpartition(":")[2]) for listener in listeners[:2]]
    for _server in run_server(raw, LIMITS, listeners):
        for address in (("127.0.0.1", ports[0]), ("localhost", ports[1]), path):
            with Client.connect(address).structured().go("vol") as client:
                assert client.read(4096, 4096) == stamped(SEED, 4096, 4096)
                client.disconnect()
    assert not path.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]))


def test_a_port_in_use_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InUseError, match=str(port)):
            open_listeners([UnixAddress(path), TcpAddress("127.0.0.1", port)])
    assert not path.exists()


def test_no_file_descriptors_left_makes_clients_wait(
    raw: RawFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "nbd.sock"
    for _server in run_server(raw, LIMITS, open_listeners([UnixAddress(path)])):
        sock = socket.socket(socket.AF_UNIX)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno(), hard))
        try:
            sock.connect(str(path))
            wait_until(lambda: "clients have to wait" in caplog.text, "the server to notice")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with Client(sock).go("vol") as client:
            assert client.read(4096, 10) == stamped(SEED, 4096, 10)


def test_the_log_does_not_drown_in_errors(
    server: ServerThread, witness: Client, raw: RawFile, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    raw.faults[2 << 20] = OSError(5, "the disk is dying")
    with server.client() as client:
        for _ in range(300):
            client.send(READ, 2 << 20, 512)
        assert all(reply.error == 5 for reply in client.receive_all().values())
    assert 1 <= caplog.text.count("the disk is dying") <= 100
    raw.faults.clear()
