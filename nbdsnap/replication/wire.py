"""What the two ends say to each other.

``GET /v1/replica/VOLUME`` answers with a :class:`ReplicaState`.  ``POST /v1/replica/VOLUME?size=BYTES&keep=7`` sends a
delta stream, in chunks, and is answered by a :class:`~nbdsnap.models.ReceiveReport` when the snapshot is there.  Errors
are answered as the management API does.  Either side may break off at any time: what has come counts as far as its last
checkpoint.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from pydantic import BaseModel

from nbdsnap.delta.format import damaged
from nbdsnap.errors import DeltaCutError
from nbdsnap.transfer.streams import TICK_S, Tick

PATH = "/v1/replica/"
SILENCE_S = 120.0
"""Without a byte, the other side is taken for dead."""

ACK_S = 20
"""Seconds that sent data may wait for the other side's kernel to confirm it: a network that is cut is noticed then."""

MAX_LINE = 64
READ_SIZE = 256 << 10


class KnownSnapshot(BaseModel):
    name: str
    id: str


class ReplicaState(BaseModel):
    """``exists``: the volume is there.  ``token``: with which the rest of a stream that was cut is to be asked for."""

    volume: str
    exists: bool
    replica: bool = False
    size: int = 0
    snapshots: list[KnownSnapshot] = []
    token: str | None = None


def tune(sock: socket.socket) -> None:
    """Notice a peer, or a network, that is gone."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ACK_S * 1000)


class ChunkedSource:
    """A request's body, chunk by chunk, straight from its socket: what :class:`~nbdsnap.transfer.streams.Source` is for
    a descriptor."""

    def __init__(self, sock: socket.socket, tick: Tick, clock: Callable[[], float] = time.monotonic) -> None:
        self._sock = sock
        self._tick = tick
        self._clock = clock
        self._ahead = memoryview(b"")
        self._left = 0
        self._ended = False
        self.received = 0
        sock.settimeout(TICK_S)

    def read_into(self, buffer: memoryview) -> int:
        if not self._left and not self._ended:
            self._next_chunk()
        if self._ended:
            return 0
        count = self._take(buffer[: self._left])
        self._left -= count
        self.received += count
        if not self._left:
            self._line()
        return count

    def _next_chunk(self) -> None:
        text = self._line()
        try:
            self._left = int(text, 16)
        except ValueError:
            raise damaged("it does not come in chunks") from None
        if not 0 <= self._left <= 1 << 40:
            raise damaged("a chunk of it has no valid length")
        if self._left == 0:
            self._line()
            self._ended = True

    def _line(self) -> bytes:
        line = bytearray()
        one = memoryview(bytearray(1))
        while not line.endswith(b"\r\n"):
            if len(line) > MAX_LINE:
                raise damaged("it does not come in chunks")
            self._take(one)
            line += one
        return bytes(line[:-2])

    def _take(self, buffer: memoryview) -> int:
        if not self._ahead:
            if len(buffer) >= READ_SIZE:
                return self._receive(buffer)
            piece = memoryview(bytearray(READ_SIZE))
            self._ahead = piece[: self._receive(piece)]
        count = min(len(buffer), len(self._ahead))
        buffer[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def _receive(self, buffer: memoryview) -> int:
        silent_since = self._clock()
        while True:
            try:
                count = self._sock.recv_into(buffer)
            except TimeoutError:
                self._tick()
                if self._clock() - silent_since > SILENCE_S:
                    raise DeltaCutError("the sender has fallen silent") from None
                continue
            except OSError as error:
                raise DeltaCutError(f"the connection was cut: {error.strerror or error}") from None
            if count == 0:
                raise DeltaCutError("the connection was cut")
            return count
