"""One client, from accept to close: handshake, transmission, end.

::

    accepted ──> handshake ──GO──> transmission ──DISC, EOF, lost stream──> finishing ──> closed
                     │ timeout, ABORT, protocol error                           ▲             ▲
                     └──────────────────────────────────────────────────────────┴── error ────┘

Invariants:

* an exception while a client is served ends that client's connection, and is logged; nothing else notices;
* ``on_end`` is called once, after the socket is closed, the last job is over and the device has been given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from nbdsnap.engine.device import Device
from nbdsnap.errors import ProtocolError
from nbdsnap.nbd.negotiation import Negotiation, State
from nbdsnap.server.channel import Channel
from nbdsnap.server.context import Context
from nbdsnap.server.datapath import DataPath
from nbdsnap.server.exports import PoolExports

log = logging.getLogger(__name__)

HANDSHAKE_RECEIVE = 64 << 10
"""Bytes received at a time in the handshake."""

KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 15
KEEPALIVE_PROBES = 4
"""A TCP client whose machine has vanished is noticed after two minutes, and its export is free again."""


class Connection:
    """``label`` names the client in the log.  ``ended``: ``on_end`` has been called, or is being."""

    def __init__(
        self,
        context: Context,
        exports: PoolExports,
        sock: socket.socket,
        label: str,
        on_end: Callable[[Connection], None],
    ) -> None:
        self.label = label
        self._context = context
        self._on_end = on_end
        self.ended = False
        self._device: Device | None = None
        self._path: DataPath | None = None
        self._negotiation: Negotiation[Device] = Negotiation(exports)
        _set_options(sock)
        self._channel = Channel(
            sock, context.loop, context.poll, context.buffers, self._readable, self.go_on, self._failed
        )
        self._receive = self._handshake
        self._timer: asyncio.TimerHandle | None = context.loop.call_later(
            context.limits.handshake_s, self.lost, "the handshake took too long"
        )
        self._negotiation.start()
        self._pump()

    # Events

    def _readable(self) -> None:
        try:
            self._receive()
        except Exception:
            self.crash()

    def go_on(self) -> None:
        """The client has taken some of what was queued, or others have had their turn."""
        try:
            if self._path is not None:
                self._path.on_room()
            else:
                self._pump()
        except Exception:
            self.crash()

    def _failed(self, error: OSError) -> None:
        """The socket is of no more use: a reset, as a rule."""
        self.lost(error.strerror or str(error))

    def crash(self) -> None:
        """From within an exception's handler: a bug costs one connection."""
        log.exception("%s: an error of the server ends the connection", self.label)
        self.close()

    # Handshake

    def _handshake(self) -> None:
        buffer = self._context.inbound[:HANDSHAKE_RECEIVE]
        count = self._channel.recv_into(buffer)
        if count < 0:
            return
        if count == 0:
            self.lost("the client left during the handshake")
            return
        with contextlib.suppress(ProtocolError):  # the state is CLOSED then
            self._negotiation.receive(buffer[:count])
        self._pump()

    def _pump(self) -> None:
        """Send what the handshake has to say; read on only when the client has taken all of it."""
        negotiation = self._negotiation
        with contextlib.suppress(ProtocolError):
            while not self._channel.queued and (data := negotiation.data_to_send()):
                self._channel.send(memoryview(data))
        if self._channel.closed:
            return
        if negotiation.state is State.CLOSED:
            self._channel.set_reading(False)
            if not self._channel.queued:
                self.lost(negotiation.close_reason or "the handshake ended")
        elif negotiation.state is State.TRANSMISSION and not self._channel.queued:
            self._start_transmission()
        else:
            self._channel.set_reading(not self._channel.queued)

    def _start_transmission(self) -> None:
        session = self._negotiation.session
        assert session is not None
        self._cancel_timer()
        self._device = session.handle
        self.label = f"{self.label} on {session.export.name}"
        log.debug("%s: transmission", self.label)
        self._path = DataPath(self._context, self, self._channel, session)
        self._receive = self._path.receive
        self._path.start(self._negotiation.leftover())

    # The end

    def shut_down(self) -> None:
        """The server stops: no new options and requests; what is in flight finishes, then the connection closes."""
        try:
            if self._path is not None:
                self._path.shut_down()
            else:
                self._negotiation.shutdown()
        except Exception:
            self.crash()

    @property
    def negotiating(self) -> bool:
        return self._path is None

    def linger(self) -> None:
        """From now on, the client has so much time to take the last replies."""
        if self._timer is None and not self._channel.closed:
            self._timer = self._context.loop.call_later(
                self._context.limits.linger_s, self.lost, "the client did not take its last replies"
            )

    def log_end(self, reason: str) -> None:
        log.info("%s: %s", self.label, reason)

    def lost(self, reason: str) -> None:
        self.log_end(reason)
        self.close()

    def close(self) -> None:
        """At once.  Jobs under way end by themselves, and find that nobody waits for them."""
        self._cancel_timer()
        self._channel.close()
        if self._path is not None:
            self._path.abandon()
        else:
            self.release()

    def release(self) -> None:
        """Closed, and no job left.  Idempotent."""
        if self.ended:
            return
        self.ended = True
        if self._device is None and self._negotiation.session is not None:
            self._device = self._negotiation.session.handle
        if self._device is not None:
            try:
                self._device.close()
            except Exception:
                log.exception("%s: the device could not be closed", self.label)
        self._on_end(self)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _set_options(sock: socket.socket) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
