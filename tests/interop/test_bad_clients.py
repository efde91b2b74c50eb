"""Clients that misbehave, next to clients that work: the good ones do not notice, and nothing of the bad ones stays.

Each test runs a good client that writes and verifies without a pause, while the bad ones do their worst.  Afterwards
the bad ones' connections are gone, what they half wrote is not there, and the server ends as cleanly as ever.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop.conftest import LiveVolume
from tests.support import nbdwire
from tests.support.blocks import stamped
from tests.support.client import Client
from tests.support.deadline import wait_until
from tests.support.sockets import dial, is_closed_by_peer, reset

GARBAGE_SEED = 20080131
GOOD_REGION = 1 << 20
"""The good client works in the volume's first mebibyte; the bad ones aim behind it."""


class GoodClient(threading.Thread):
    """Writes and reads back, one request after the other, until told to stop; fails at the first oddity."""

    def __init__(self, volume: LiveVolume) -> None:
        super().__init__(name="good client")
        self.rounds = 0
        self.failure: BaseException | None = None
        self._client = connect(volume)
        self._stopping = threading.Event()

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._one_round(self.rounds)
                self.rounds += 1
            self._client.disconnect()
        except BaseException as failure:
            self.failure = failure
        finally:
            self._client.close()

    def _one_round(self, number: int) -> None:
        length = 1 + number * 7919 % 20000
        offset = number * 104729 % (GOOD_REGION - length)
        data = stamped(number % 100, offset, length)
        self._client.write(offset, data)
        assert self._client.read(offset, length) == data
        assert self._client.read(2 * GOOD_REGION, 100) == stamped(1, 2 * GOOD_REGION, 100)

    def stop(self) -> None:
        self._stopping.set()
        self.join()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def volume_in_use(volume: LiveVolume) -> Iterator[LiveVolume]:
    """A volume with a snapshot and a good client on it, which must have got on before, during and after the test."""
    volume.snapshot("before")
    good = GoodClient(volume)
    good.start()
    try:
        before = good.rounds
        wait_until(lambda: good.rounds > before, "the good client to begin")
        yield volume
        after = good.rounds
        wait_until(lambda: good.failure or good.rounds > after + 10, "the good client to go on")
        wait_until(lambda: connections(volume) == 1, "the bad clients' connections to be gone")
    finally:
        good.stop()
    wait_until(lambda: connections(volume) == 0, "the good client's connection to be gone")
    for offset in range(GOOD_REGION, volume.size, 1 << 20):
        with connect(volume) as client:
            assert client.read(offset, 1 << 20) == stamped(1, offset, 1 << 20), "a bad client's bytes"


def connections(volume: LiveVolume) -> int:
    return volume.server.connections(volume.name)


def connect(volume: LiveVolume, export: str | None = None, receive_buffer: int | None = None) -> Client:
    """A client that has done everything right so far."""
    return Client(silent(volume, receive_buffer)).go(export or volume.name)


def silent(volume: LiveVolume, receive_buffer: int | None = None) -> socket.socket:
    return dial(volume.server.address(volume.transport), receive_buffer=receive_buffer)


def read(number: int, offset: int, length: int) -> bytes:
    return nbdwire.request(nbdwire.READ, offset, length, cookie=number)


def test_garbage_instead_of_a_handshake(volume_in_use: LiveVolume) -> None:
    generator = random.Random(GARBAGE_SEED)
    for length in (20, 21, 1000, 100_000):
        garbage = generator.randbytes(length)
        for sent in (garbage, garbage[:4], nbdwire.client_flags() + garbage, HTTP):
            with silent(volume_in_use) as sock:
                sock.sendall(sent)
                assert is_closed_by_peer(sock)


HTTP = b"GET / HTTP/1.1\r\nHost: localhost:10809\r\n\r\n"


def test_garbage_instead_of_requests(volume_in_use: LiveVolume) -> None:
    """A wrong magic can't be answered in step: that connection is closed, after what was asked before is answered."""
    generator = random.Random(GARBAGE_SEED + 1)
    for _ in range(10):
        with connect(volume_in_use) as client:
            asked = client.send(nbdwire.READ, GOOD_REGION, 4096)
            client.sock.sendall(b"\0" + generator.randbytes(generator.choice([27, 28, 5000])))
            assert client.wait(asked).data == stamped(1, GOOD_REGION, 4096)
            assert is_closed_by_peer(client.sock)


def test_handshakes_that_never_finish(volume_in_use: LiveVolume) -> None:
    """Silent ones, and ones that stop in the middle: of the flags, of an option's header, of its data."""
    beginnings = [b"", nbdwire.client_flags()[:2], nbdwire.client_flags(), nbdwire.client_flags() + b"IHAVEO"]
    beginnings.append(nbdwire.client_flags() + nbdwire.go(volume_in_use.name)[:-3])
    beginnings.append(nbdwire.client_flags() + b"IHAVEOPT" + b"\0\0\0\7" + b"\0\0\x10\0" + b"x" * 100)
    with ExitStack() as stalled:
        for number in range(30):
            stalled.enter_context(silent(volume_in_use)).sendall(beginnings[number % len(beginnings)])
        with connect(volume_in_use) as client:  # and there is room for a good one
            assert client.read(GOOD_REGION, 512) == stamped(1, GOOD_REGION, 512)
            client.disconnect()


@pytest.mark.parametrize("sent", [0, 1, 4096, 65535, 1 << 20])
def test_disconnect_in_the_middle_of_a_payload(volume_in_use: LiveVolume, sent: int) -> None:
    """Less than the whole of a write arrived: none of it is written."""
    for _ in range(5):
        with connect(volume_in_use) as client:
            client.sock.sendall(nbdwire.request(nbdwire.WRITE, GOOD_REGION, 2 << 20) + b"\xee" * sent)


def test_disconnect_in_the_middle_of_a_request_header(volume_in_use: LiveVolume) -> None:
    for length in range(28):
        with connect(volume_in_use) as client:
            client.sock.sendall(nbdwire.request(nbdwire.TRIM, GOOD_REGION, 1 << 20)[:length])


@pytest.mark.parametrize("length", [512, 256 << 10])
def test_reset_with_a_hundred_reads_in_flight(volume_in_use: LiveVolume, length: int) -> None:
    reads = b"".join(read(n, GOOD_REGION + n * 512, length) for n in range(100))
    for _ in range(10):
        for export in (volume_in_use.name, f"{volume_in_use.name}@before"):  # their reads go different ways
            client = connect(volume_in_use, export)
            client.sock.sendall(reads)
            client.take(16)
            reset(client.sock)


def test_reset_with_writes_in_flight(volume_in_use: LiveVolume) -> None:
    """They may be done or not, each as a whole; here all write what is there already, so both look the same."""
    block = stamped(1, GOOD_REGION, 65536)
    for _ in range(10):
        client = connect(volume_in_use)
        for _ in range(50):
            client.send(nbdwire.WRITE, GOOD_REGION, len(block), payload=block)
        client.send(nbdwire.FLUSH)
        reset(client.sock)


def test_a_client_that_never_reads(volume_in_use: LiveVolume) -> None:
    """It asks for 400 MiB and takes none of it: the server neither waits for it nor buffers all that."""
    with connect(volume_in_use, receive_buffer=4096) as greedy:
        greedy.sock.sendall(b"".join(read(n, GOOD_REGION, 4 << 20) for n in range(100)))
        with connect(volume_in_use) as client:
            for _ in range(100):
                assert client.read(GOOD_REGION, 512) == stamped(1, GOOD_REGION, 512)
            client.disconnect()
        assert resident_mib(volume_in_use) < 250


def resident_mib(volume: LiveVolume) -> int:
    """The server's resident memory, as the kernel counts it."""
    assert volume.server.process is not None
    status = Path(f"/proc/{volume.server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) >> 10


def test_a_write_too_large_to_take(volume_in_use: LiveVolume) -> None:
    """A length of nearly 4 GiB: refused in step or the connection closed, but not buffered."""
    before = resident_mib(volume_in_use)
    with connect(volume_in_use) as client, contextlib.suppress(ConnectionError):
        client.sock.sendall(nbdwire.request(nbdwire.WRITE, GOOD_REGION, 0xFFFFF000))
        for _ in range(128):
            client.sock.sendall(b"\xee" * (1 << 20))
    assert resident_mib(volume_in_use) < before + 100
