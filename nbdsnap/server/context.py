"""What all connections of one server share, and the limits that each of them is held to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from nbdsnap.server.buffers import BufferPool, new_buffer
from nbdsnap.server.busypoll import BusyPoll
from nbdsnap.server.completions import Completions
from nbdsnap.server.turns import Turns
from nbdsnap.server.workers import Workers

INBOUND = 256 << 10
"""Bytes of the buffer that requests are received into: a batch of 60 writes of 4 KiB, and half the processor's L2
cache."""

RECORDS = 256 << 10
"""Bytes of TLS records taken from a socket at a time."""

OUTBOUND = 512 << 10
"""Bytes of replies gathered into one send: two reads of the longest that are done inline, or a hundred of 4 KiB."""

OUTBOUND_SLACK = 8 << 10
"""Room behind them for one more reply without data: an error with its text has at most 4,150 bytes."""

READ_INLINE = 256 << 10
"""Bytes: a longer read is done by a worker.  Copying this much from the page cache stops the loop for 30 us, about what
it costs to have a worker do it."""

WRITE_INLINE = 128 << 10
"""Bytes: a longer write is done by the engine's threads.  Into a cache in small pages, this takes 25 us and more."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.  Seconds and bytes."""

    connections: int = 1000
    """In all; each is a file descriptor and, with its buffers in the kernel, up to 2 MiB."""

    connections_per_client: int = 500
    """Of one address (see :class:`~nbdsnap.server.peer.Peer`): none can have them all."""

    option_bytes: int = 256 << 10
    """Of one option of the handshake, kept in memory until it is whole."""

    handshake_s: float = 10.0
    """From accept to transmission (CVE-2024-7409): a handshake is a few round trips."""

    shutdown_s: float = 10.0
    """For requests in flight when the server is asked to stop."""

    linger_s: float = 30.0
    """For a client that has disconnected, or is to be, to take the last replies."""

    held_bytes: int = 32 << 20
    """Of one connection: payloads in work, buffers being read into, and replies queued; past it, nothing more is read
    from it.  A WRITE alone may exceed it, with up to 64 MiB: in its turn (:mod:`nbdsnap.server.turns`)."""

    held_bytes_total: int = 1 << 30
    """Of all connections together: each one's share is ``held_bytes``, or less where there are many."""

    idle_s: float = 0.0
    """Without a request, and nothing in flight; 0: as long as it likes."""

    stalled_s: float = 600.0
    """For a client that takes none of the replies that wait for it, or sends nothing of what it has begun to send;
    0: as long as it likes."""

    keepalive_s: int = 60
    keepalive_interval_s: int = 15
    keepalive_probes: int = 4
    """A TCP client whose machine has vanished is noticed after two minutes, and its export is free again."""

    pending: int = 4096
    """Requests of one connection in work at other threads.  The greediest client known has 1,024 in flight."""


LEAST_SHARE = 1 << 20
"""Bytes in flight that every connection may have, however many there are: less makes them crawl."""


class Context:
    """The loop's own: everything here is for its thread, but for what says otherwise.

    ``inbound``, ``records`` and ``outbound`` are scratch space of whoever is running: what has to outlive a callback is
    copied out of them.  So a thousand idle connections hold no buffers, and a busy server stays within the processor's
    cache.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        self.loop = loop
        self.limits = limits
        self.held_bytes = limits.held_bytes
        """What one connection may hold now."""
        self.completions = Completions(loop)
        self.poll = BusyPoll(loop, self.completions)
        self.turns = Turns(limits.held_bytes_total // 2, loop.call_soon)
        self.buffers = BufferPool(on_give=self.turns.given)
        self.workers = Workers()
        self.inbound = new_buffer(INBOUND)
        self.records = new_buffer(RECORDS)
        self.outbound = new_buffer(OUTBOUND + OUTBOUND_SLACK)

    def share(self, connections: int) -> None:
        """So many share the bytes in flight."""
        limits = self.limits
        self.turns.total = limits.held_bytes_total // 2
        share = max(LEAST_SHARE, limits.held_bytes_total // max(1, connections))
        self.held_bytes = min(limits.held_bytes, share)

    def close(self) -> None:
        """After the last connection.  Waits for jobs under way."""
        self.workers.close()
        self.poll.close()
