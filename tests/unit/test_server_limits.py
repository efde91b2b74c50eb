"""Limits of clients: how many, how long, how much; each is configurable, and each is held."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdsnap.addresses import TcpAddress
from nbdsnap.config import load_config
from nbdsnap.server.app import limits_of
from nbdsnap.server.context import LEAST_SHARE, Context, Limits
from nbdsnap.server.listeners import Listener, open_listeners
from tests.support import nbdwire
from tests.support.blocks import stamped, write_stamped
from tests.support.client import Client, DisconnectedError, RefusedError
from tests.support.deadline import wait_until
from tests.support.nbdserver import ServerThread
from tests.support.nbdwire import READ, WRITE
from tests.support.rawdevice import RawFile, RawPool

SIZE = 32 << 20
SEED = 3


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[RawFile]:
    path = write_stamped(tmp_path / "raw.img", 1 << 20, SEED)
    with path.open("r+b") as file:
        file.truncate(SIZE)
    opened = RawFile(path)
    yield opened
    opened.close()


@contextmanager
def serving(raw: RawFile, listeners: list[Listener] | None = None, **limits: float) -> Iterator[ServerThread]:
    server = ServerThread(RawPool({"vol": raw}), Limits(shutdown_s=2.0, **limits), listeners or [])  # type: ignore[arg-type]
    try:
        yield server
    finally:
        raw.gate.set()
        server.stop()
    assert raw.opened == 0


def unserved(server: ServerThread) -> None:
    """A client that gets nothing at all."""
    with server.connect() as sock:
        sock.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""


# How many


def test_connections_in_all(raw: RawFile) -> None:
    with serving(raw, connections=3) as server:
        clients = [server.client() for _ in range(3)]
        unserved(server)
        clients.pop().disconnect()
        wait_until(lambda: server.connections() == 2, "one to be gone")
        clients.append(server.client())
        for client in clients:
            assert client.read(0, 10) == stamped(SEED, 0, 10)
            client.close()


def test_connections_of_one_client(raw: RawFile) -> None:
    """Those of this user over unix sockets do not count for those from 127.0.0.1, nor theirs for those from ::1."""
    listeners = open_listeners([TcpAddress("127.0.0.1", 0), TcpAddress("::1", 0)])
    port4, port6 = (int(listener.uri.rpartition(":")[2]) for listener in listeners)
    with serving(raw, listeners, connections_per_client=2) as server:
        clients = [server.client() for _ in range(2)]
        unserved(server)
        for address in (("127.0.0.1", port4), ("::1", port6)):
            clients += [Client.connect(address).go("vol") for _ in range(2)]
            with pytest.raises((DisconnectedError, OSError)):
                Client.connect(address)
        clients.pop(0).disconnect()
        wait_until(lambda: server.connections() == 5, "one to be gone")
        clients.append(server.client())
        for client in clients:
            assert client.read(0, 10) == stamped(SEED, 0, 10)
            client.close()
        wait_until(lambda: server.connections() == 0, "all to be gone")
        assert not server.server._of_client


def test_the_log_does_not_drown_in_refusals(raw: RawFile, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with serving(raw, connections=1) as server, server.client():
        for _ in range(200):
            unserved(server)
    assert 1 <= caplog.text.count("refused") < 10


def test_no_more_connections_than_file_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nbdsnap.toml").write_text("[limits]\nconnections = 5000\n")
    config = load_config(tmp_path / "nbdsnap.toml")
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    assert 100 < limits_of(config).connections <= 1024 - 64
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    assert limits_of(config).connections == 5000


def test_limits_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    (tmp_path / "nbdsnap.toml").write_text(
        "[limits]\nconnections = 7\nconnections_per_client = 6\nhandshake_s = 1.5\noption_bytes = '5K'\n"
        "in_flight_bytes = '2M'\nin_flight_bytes_total = '4M'\nin_flight_requests = 8\nidle_s = 9\nstalled_s = 0\n"
        "linger_s = 2\nshutdown_s = 0\nkeepalive_s = 0\nkeepalive_interval_s = 3\nkeepalive_probes = 2\n"
    )
    assert limits_of(load_config(tmp_path / "nbdsnap.toml")) == Limits(
        connections=7,
        connections_per_client=6,
        handshake_s=1.5,
        option_bytes=5 << 10,
        held_bytes=2 << 20,
        held_bytes_total=4 << 20,
        pending=8,
        idle_s=9,
        stalled_s=0,
        linger_s=2,
        shutdown_s=0,
        keepalive_s=0,
        keepalive_interval_s=3,
        keepalive_probes=2,
    )
    (tmp_path / "nbdsnap.toml").write_text("")
    assert limits_of(load_config(tmp_path / "nbdsnap.toml")) == Limits()


# How much


def test_option_bytes(raw: RawFile) -> None:
    with serving(raw, option_bytes=1000) as server:
        client = Client(server.connect())
        for name, reply in (("x" * 900, nbdwire.UNKNOWN), ("x" * 1001, nbdwire.TOO_BIG)):
            with pytest.raises(RefusedError) as caught:
                client.go(name)
            assert caught.value.reply == reply
        assert client.list() == ["vol"]
        client.close()


def test_bytes_in_flight_are_shared(raw: RawFile) -> None:
    """Many greedy clients that read nothing hold no more together than is allowed, and a modest one is served."""
    total = 16 << 20
    with serving(raw, held_bytes=8 << 20, held_bytes_total=total) as server:
        greedy = [server.client("vol", "simple") for _ in range(8)]
        for client in greedy:
            client.sock.sendall(b"".join(client.request(READ, 0, 1 << 20) for _ in range(64)))

        def held() -> int:
            paths = [connection._path for connection in server.server._connections]
            return sum(path.held + path.channel.queued for path in paths if path is not None)

        with server.client() as modest:
            for number in range(200):
                assert modest.read(number * 4096, 4096) == stamped(SEED, number * 4096, 4096)
        one_more_each = len(greedy) * (2 << 20)
        assert 4 << 20 < server.call(held) <= total + one_more_each
        expected = stamped(SEED, 0, 1 << 20)
        for client in greedy:
            for _ in range(64):
                assert client.receive().data == expected
            client.disconnect()


def test_shares() -> None:
    class Loop:
        def call_soon(self) -> None: ...

    context = Context(Loop(), Limits(held_bytes=32 << 20, held_bytes_total=1 << 30))  # type: ignore[arg-type]
    for connections, share in ((0, 32 << 20), (1, 32 << 20), (32, 32 << 20), (64, 16 << 20), (5000, LEAST_SHARE)):
        context.share(connections)
        assert context.held_bytes == share
    context.close()


# How long


def stalls(server: ServerThread, client: Client) -> None:
    """The server must end this client, and not another that is idle but owes nothing."""
    with server.client() as innocent:
        wait_until(lambda: server.connections() == 1, "the stalled client to be ended")
        assert innocent.read(0, 10) == stamped(SEED, 0, 10)
    client.close()


def test_a_client_that_takes_no_replies(raw: RawFile) -> None:
    with serving(raw, stalled_s=0.2) as server:
        client = server.client()
        client.sock.sendall(b"".join(client.request(READ, 0, 1 << 20) for _ in range(8)))
        stalls(server, client)


@pytest.mark.parametrize("sent", [10, 28, 5000, 500_000])
def test_a_client_that_stops_in_the_middle_of_a_request(raw: RawFile, sent: int) -> None:
    with serving(raw, stalled_s=0.2) as server:
        client = server.client()
        client.sock.sendall(client.request(WRITE, 0, 1 << 20, payload=bytes(1 << 20))[:sent])
        stalls(server, client)


def test_a_slow_client_is_no_stalled_one(raw: RawFile) -> None:
    """It takes, and sends, a little now and then: for longer than it may stall."""
    with serving(raw, stalled_s=0.3) as server:
        client = server.client("vol", "simple")
        payload = stamped(9, 0, 1 << 20)
        request = client.request(WRITE, 4 << 20, 1 << 20, payload=payload) + client.request(READ, 4 << 20, 1 << 20)
        started = time.monotonic()
        step = len(request) // 12
        for position in range(0, len(request), step):
            client.sock.sendall(request[position : position + step])
            time.sleep(0.05)
        assert time.monotonic() - started > 0.5
        assert client.receive().error == 0
        assert client.receive().data == payload
        client.close()


def test_waiting_for_the_server_is_no_stalling(raw: RawFile) -> None:
    with serving(raw, stalled_s=0.1) as server:
        raw.cold = True
        raw.gate.clear()
        client = server.client()
        client.send(READ, 0, 4096)
        started = time.monotonic()
        wait_until(lambda: time.monotonic() > started + 0.5, "five times as long")
        raw.gate.set()
        assert client.receive().data == stamped(SEED, 0, 4096)
        client.close()


def test_an_idle_client(raw: RawFile) -> None:
    with serving(raw, idle_s=0.3) as server:
        idle, busy = server.client(), server.client()
        deadline = time.monotonic() + 10
        while server.connections() == 2:
            assert busy.read(0, 10) == stamped(SEED, 0, 10)
            assert time.monotonic() < deadline
        idle.expect_end()
        idle.close()
        assert busy.read(0, 10) == stamped(SEED, 0, 10)
        busy.close()


def test_idle_is_not_what_waits_for_the_disk(raw: RawFile) -> None:
    with serving(raw, idle_s=0.1) as server:
        raw.cold = True
        raw.gate.clear()
        client = server.client()
        client.send(READ, 0, 4096)
        started = time.monotonic()
        wait_until(lambda: time.monotonic() > started + 0.5, "five times as long")
        raw.gate.set()
        assert client.receive().data == stamped(SEED, 0, 4096)
        client.close()


# TCP keepalive


@pytest.mark.parametrize("seconds", [0, 77])
def test_keepalive(raw: RawFile, seconds: int) -> None:
    (listener,) = listeners = open_listeners([TcpAddress("127.0.0.1", 0)])
    limits = {"keepalive_s": seconds, "keepalive_interval_s": 5, "keepalive_probes": 3}
    with serving(raw, listeners, **limits) as server:
        client = Client.connect(("127.0.0.1", int(listener.uri.rpartition(":")[2]))).go("vol")
        (connection,) = server.server._connections
        sock = connection._channel._sock
        assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == bool(seconds)
        if seconds:
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [77, 5, 3]
        client.close()
