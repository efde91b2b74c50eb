"""One client, from accept to close: handshake, transmission, end.

::

    accepted ──> handshake ──GO──> transmission ──DISC, EOF, lost stream──> finishing ──> closed
                   │   ▲ │ timeout, ABORT, protocol error                       ▲             ▲
           STARTTLS│   │ └──────────────────────────────────────────────────────┴── error ────┘
                   ▼   │established
                 securing

Securing: the socket moves to a :class:`TlsChannel`, and what was negotiated is forgotten.  What a client (or somebody
on the way) has sent in the clear behind STARTTLS is never parsed: what was received with it ends the connection, and
what comes later goes to TLS, to which it is garbage (CVE-2021-3716).

Invariants:

* an exception while a client is served ends that client's connection, and is logged; nothing else notices;
* ``on_end`` is called once, after the socket is closed, the last job is over and the device has been given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable

from nbdsnap.engine.device import Device
from nbdsnap.errors import ProtocolError
from nbdsnap.nbd.negotiation import Negotiation, NegotiationLimits, State, TlsMode
from nbdsnap.server.access import ClientExports
from nbdsnap.server.channel import Channel
from nbdsnap.server.context import Context, Limits
from nbdsnap.server.datapath import DataPath
from nbdsnap.server.exports import PoolExports
from nbdsnap.server.peer import Peer
from nbdsnap.server.security import Security
from nbdsnap.server.tls import Handshake, certificate_names
from nbdsnap.server.tlschannel import TlsChannel
from nbdsnap.server.watch import Watch

log = logging.getLogger(__name__)

HANDSHAKE_RECEIVE = 64 << 10
"""Bytes received at a time in the handshake."""


class Connection:
    """``label`` names the client in the log.  ``ended``: ``on_end`` has been called, or is being.

    ``peer``: who it is, as far as is known.  ``tls``: whether it may, must or can't have TLS.
    """

    def __init__(
        self,
        context: Context,
        exports: PoolExports,
        sock: socket.socket,
        peer: Peer,
        on_end: Callable[[Connection], None],
        security: Security,
        tls: TlsMode = TlsMode.OFF,
    ) -> None:
        self.label = peer.label
        self.peer = peer
        self._context = context
        self._security = security
        self._exports = ClientExports(exports, lambda: security.access, peer)
        self._on_end = on_end
        self._identity: str | None = None
        self.ended = False
        self._device: Device | None = None
        self._path: DataPath | None = None
        self._negotiation: Negotiation[Device] = Negotiation(
            self._exports, tls=tls, limits=NegotiationLimits(option_length=context.limits.option_bytes)
        )
        _set_options(sock, context.limits)
        self._channel = Channel(
            sock, context.loop, context.poll, context.buffers, self._readable, self.go_on, self._failed
        )
        self._receive: Callable[[], None] = self._handshake
        self._watch = Watch(context.limits)
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
        elif negotiation.state is State.STARTTLS and not self._channel.queued:
            self._start_tls()
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
        self._receive = self._receive_and_note if self._context.limits.idle_s else self._path.receive
        self._path.start(self._negotiation.leftover())

    def _receive_and_note(self) -> None:
        assert self._path is not None
        self._watch.active(self._context.loop.time())
        self._path.receive()

    # TLS

    def _start_tls(self) -> None:
        """The answer to STARTTLS has left.  Whether the certificates have changed is a worker's to find out."""
        keeper = self._security.tls
        if keeper is None:  # a reload has brought a mode without its certificates: it was refused, and logged
            self.lost("TLS is not configured")
            return
        self._channel.set_reading(False)
        post = self._context.completions.post
        self._context.workers.submit(lambda: post(self._secure, _attempt(keeper.current)))

    def _secure(self, context: ssl.SSLContext | Exception) -> None:
        if self._channel.closed:
            return
        if isinstance(context, Exception):
            log.error("%s: no TLS context: %s", self.label, context)
            self.lost("TLS can't be had")
            return
        channel = TlsChannel(
            self._channel.detach(),
            self._context.loop,
            self._context.poll,
            self._context.buffers,
            self._readable,
            self.go_on,
            self._failed,
        )
        channel.secure(context, self._context.records)
        self._channel = channel
        self._receive = self._tls_handshake
        channel.set_reading(True)

    def _tls_handshake(self) -> None:
        channel = self._channel
        assert isinstance(channel, TlsChannel)
        Handshake.identity = None
        try:
            established = channel.handshake()
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or error.reason or str(error)
            if self._security.complaints.passes():  # else nobody would know why a client does not get in
                log.warning("%s: the TLS handshake failed: %s", self.label, reason)
            self.close()
            return
        if Handshake.identity is not None:
            self._identity = Handshake.identity
        if established and not channel.closed:
            self.peer.certificates = certificate_names(channel.tls)
            self.peer.psk = self._identity
            if self.peer.psk or self.peer.certificates:
                self.label += f" ({self.peer.psk or min(self.peer.certificates)})"
            log.debug("%s: %s", self.label, channel.tls.version())
            self._negotiation.tls_established()
            self._receive = self._handshake
            self._pump()

    # Looked at now and again

    def look(self, now: float) -> None:
        """End a client that has had its time: an idle one, and one that has stopped in the middle of something."""
        if self._path is None or self._path.finishing or self._channel.closed:
            return
        reason = self._watch.look(now, self._path)
        if reason:
            self.lost(reason)

    def enforce(self) -> None:
        """The rules have changed: end it where they no longer give what it has."""
        session = self._negotiation.session
        if session is None or self._channel.closed:
            return
        mode = self._security.access.rules_for(self.peer).mode(session.export.name)
        if mode is None or (mode == "ro" and not session.export.read_only):
            self.lost("the rules of access no longer allow it")

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


def _attempt(read: Callable[[], ssl.SSLContext]) -> ssl.SSLContext | Exception:
    try:
        return read()
    except Exception as error:
        return error


def _set_options(sock: socket.socket, limits: Limits) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if limits.keepalive_s:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, limits.keepalive_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, limits.keepalive_interval_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, limits.keepalive_probes)
