"""Memory under the greediest clients: bounded, whatever 256 of them ask for, and nobody waits for them.

Each greedy client sends as much as the server takes, and takes nothing of what it is sent.  The configuration's
``in_flight_bytes_total`` is what the bound is made of.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import nbdwire
from tests.support.blocks import stamped
from tests.support.client import Client
from tests.support.deadline import Deadline
from tests.support.server import Server, Volume
from tests.support.sockets import dial

MIB = 1 << 20
GREEDY = 256
SIZE = 96 * MIB
WRITTEN = 64 * MIB
"""Where the greedy clients write; a good one looks at what is behind it."""

IN_FLIGHT = 256 * MIB
"""A megabyte for each, which is the least."""

BASE = 100 * MIB
"""The server itself, with the buffers that it keeps."""

BOUND = 2 * IN_FLIGHT + BASE
"""A request is begun while a connection has not reached its share yet, so it may hold up to twice as much."""

LONGEST = 64 * MIB
"""The longest payload of one request: one alone may be longer than all the rest."""

QUIET_S = 0.5
"""Without a byte moving: the server has taken what it takes."""

GOOD_S = 20.0
"""For a good client's work of a second, on a machine that is busy with the others."""

SEND_S = 4.0
"""What the greedy clients get to send what they can."""

LIMITS = f"[limits]\nin_flight_bytes_total = {IN_FLIGHT}\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, [Volume("vol", tmp_path / "vol.img", SIZE)])
    with server.config.open("a") as config:
        config.write(LIMITS)
    server.start()
    try:
        yield server
        server.stop()
    finally:
        server.kill()


def peak_bytes(server: Server) -> int:
    """The most resident memory that the server ever had."""
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


class Greedy:
    """GREEDY connections in transmission; ``payload(number)`` is what each sends, as far as it is taken."""

    def __init__(self, server: Server, structured: bool = True) -> None:
        self._clients: list[Client] = []
        for _ in range(GREEDY):
            client = Client(dial(server.socket))
            self._clients.append((client.structured() if structured else client).go("vol"))
            client.sock.setblocking(False)

    def send(self, payload: Callable[[int], bytes]) -> int:
        """Until the server takes nothing more, from any of them.  Returns the bytes that it took."""
        waiting = selectors.DefaultSelector()
        for number, client in enumerate(self._clients):
            waiting.register(client.sock, selectors.EVENT_WRITE, [memoryview(payload(number))])
        deadline = Deadline(SEND_S)
        taken = 0
        while not deadline.expired():
            ready = waiting.select(QUIET_S)
            if not ready:
                break
            for key, _ in ready:
                taken += self._send_some(waiting, key)
        waiting.close()
        return taken

    @staticmethod
    def _send_some(waiting: selectors.BaseSelector, key: selectors.SelectorKey) -> int:
        assert isinstance(key.fileobj, socket.socket)
        try:
            sent = key.fileobj.send(key.data[0][:MIB])
        except BlockingIOError:
            return 0
        key.data[0] = key.data[0][sent:]
        if not key.data[0]:
            waiting.unregister(key.fileobj)
        return sent

    def close(self) -> None:
        for client in self._clients:
            client.close()


@contextlib.contextmanager
def greedy_clients(server: Server, structured: bool = True) -> Iterator[Greedy]:
    greedy = Greedy(server, structured)
    try:
        yield greedy
    finally:
        greedy.close()


def check_good_client(server: Server, rounds: int = 5) -> None:
    """It gets on beside them, with requests of every length up to a megabyte."""
    deadline = Deadline(GOOD_S)
    with Client.connect(server.socket).go("vol") as good:
        for number, length in enumerate((512, 4096, 100_000, MIB) * rounds):
            offset = 80 * MIB + number * MIB
            data = stamped(number, offset, length)[: SIZE - offset]
            good.write(offset % (SIZE - 2 * MIB), data)
            assert good.read(offset % (SIZE - 2 * MIB), len(data)) == data
        good.flush()
        good.disconnect()
    assert not deadline.expired()


@pytest.mark.slow
@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_reads_that_nobody_takes(server: Server, structured: bool) -> None:
    longest = 32 * MIB
    reads = [
        b"".join(nbdwire.request(nbdwire.READ, n * 512, length, cookie=n) for n in range(200))
        for length in (longest, 8 * MIB, MIB, 4096)
    ]
    with greedy_clients(server, structured) as greedy:
        greedy.send(lambda number: reads[number % len(reads)])
        check_good_client(server)
        assert peak_bytes(server) < BOUND


@pytest.mark.slow
def test_payloads_that_never_end(server: Server) -> None:
    """Each begins the longest write that there is, and keeps its last byte to itself."""
    header = nbdwire.request(nbdwire.WRITE, 0, LONGEST)
    payload = header + bytes(LONGEST - 1)
    with greedy_clients(server) as greedy:
        taken = greedy.send(lambda _: payload)
        assert taken > LONGEST, "one of them has its turn"
        check_good_client(server)
        assert peak_bytes(server) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 100_000])
def test_writes_without_an_end(server: Server, length: int) -> None:
    """First overwrites, through the log and past it, from all at once."""
    server.snapshot("vol@a")
    count = min(200, 2 * MIB // length)
    with greedy_clients(server) as greedy:

        def writes(number: int) -> bytes:
            data = bytes([number % 256]) * length
            step = WRITTEN // count // 512 * 512
            offsets = [(number * 4096 + n * step) % (WRITTEN - length) for n in range(count)]
            return b"".join(nbdwire.request(nbdwire.WRITE, offset, length) + data for offset in offsets)

        sender = threading.Thread(target=greedy.send, args=(writes,))
        sender.start()
        check_good_client(server, rounds=1)
        sender.join()
        assert peak_bytes(server) < BOUND
    assert server.json("check", "--data")["ok"]
