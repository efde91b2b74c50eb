"""An export over NBD as a :class:`~nbdsnap.engine.device.Device`, so that the same test runs on the engine and on a
server.

One connection, many requests under way: ``submit`` sends, a thread of the device's own receives and calls ``done``.
When the connection breaks, what is under way is done with :class:`DisconnectedError`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nbdsnap.engine.device import Done, Op, OpKind
from tests.support import nbdwire
from tests.support.client import Client, DisconnectedError, NbdError, Reply

CONTEXT = "base:allocation"
DEPTH = "qemu:allocation-depth"
CHANGED = ("x-nbdsnap:changed:", "qemu:dirty-bitmap:")
REPLY_TIMEOUT_S = 60.0

_COMMANDS = {
    OpKind.WRITE: nbdwire.WRITE,
    OpKind.TRIM: nbdwire.TRIM,
    OpKind.ZERO: nbdwire.WRITE_ZEROES,
    OpKind.FLUSH: nbdwire.FLUSH,
}

Replied = Callable[[Reply | BaseException], None]


class NbdDevice:
    """``name``'s export at ``address``: a unix socket's path, or host and port.

    ``bases``: the snapshots that it is to be compared with; the two contexts for it must say the same.
    """

    read_only = False

    def __init__(
        self, address: Path | tuple[str, int], name: str, dialect: str = "structured", bases: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self._client = Client.connect(address)
        getattr(self._client, dialect)()
        queries = [prefix + base for prefix in CHANGED for base in bases]
        self._contexts = self._client.set_contexts(name, CONTEXT, DEPTH, *queries)
        assert self._contexts.keys() == {CONTEXT, DEPTH, *queries}
        self._client.go(name)
        self._client.sock.settimeout(None)  # the receiver waits for as long as nothing is asked for
        self.size = self._client.size
        self.read_only = bool(self._client.flags & 2)
        self._lock = threading.Lock()
        self._waiting: dict[int, Replied] = {}
        self._broken: BaseException | None = None
        self._receiver = threading.Thread(target=self._receive, name=f"{name} receiver", daemon=True)
        self._receiver.start()

    # --- requests ---

    def submit(self, op: Op) -> None:
        flags = nbdwire.FUA * op.fua | nbdwire.NO_HOLE * op.no_hole
        payload = bytes(op.data) if op.data is not None else b""
        self._send(_COMMANDS[op.kind], op.offset, op.length, flags, payload, _finish(op.done))

    def _send(self, command: int, offset: int, length: int, flags: int, payload: bytes, replied: Replied) -> None:
        with self._lock:
            broken = self._broken
            if broken is None:
                request = self._client.request(command, offset, length, flags, payload)
                self._waiting[max(self._client.outstanding)] = replied
                try:
                    self._client.sock.sendall(request)
                except OSError as error:  # the receiver will notice, too
                    self._broken = error
        if broken is not None:
            replied(broken)

    def _receive(self) -> None:
        try:
            while True:
                reply = self._client.receive()
                with self._lock:
                    replied = self._waiting.pop(reply.cookie)
                replied(reply)
        except (OSError, DisconnectedError, AssertionError) as error:
            failure = error if isinstance(error, AssertionError) else DisconnectedError(str(error))
            with self._lock:
                self._broken = failure
                waiting, self._waiting = self._waiting, {}
            for replied in waiting.values():
                replied(failure)

    def _call(self, command: int, offset: int, length: int) -> Reply:
        event = threading.Event()
        found: list[Reply | BaseException] = []

        def replied(reply: Reply | BaseException) -> None:
            found.append(reply)
            event.set()

        self._send(command, offset, length, 0, b"", replied)
        assert event.wait(REPLY_TIMEOUT_S), f"no reply after {REPLY_TIMEOUT_S:g} s"
        reply = found[0]
        if isinstance(reply, BaseException):
            raise reply
        return reply.check()

    # --- the rest of a device ---

    def read(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._call(nbdwire.READ, offset, len(buffer)).data

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        return self._map(CONTEXT, offset, length)

    def depths(self, offset: int, length: int) -> list[tuple[int, int]]:
        return self._map(DEPTH, offset, length)

    def changes(self, base: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        changed, dirty = (self._map(prefix + base, offset, length) for prefix in CHANGED)
        assert changed == dirty
        return iter(changed)

    def is_sparse(self) -> bool:
        return True

    def _map(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        """Asks until the whole range is described; neighbours in different answers may be alike, and are joined."""
        joined: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            extents = self._call(nbdwire.BLOCK_STATUS, offset, end - offset).extents[self._contexts[context]]
            for size, flags in extents:
                size = min(size, end - offset)
                offset += size
                if joined and joined[-1][1] == flags:
                    joined[-1] = joined[-1][0] + size, flags
                elif size:
                    joined.append((size, flags))
        return joined

    def cache(self, offset: int, length: int) -> None:
        self._call(nbdwire.CACHE, offset, length)

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        return False

    def write_now(self, offset: int, data: memoryview) -> bool:
        return False

    def writes_now(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool]:
        return [self.write_now(offset, data) for offset, data in writes]

    def flush_now(self) -> bool:
        return False

    def close(self) -> None:
        with self._lock:
            if self._broken is None:
                self._client.sock.sendall(self._client.request(nbdwire.DISC))
        self.abandon()

    def abandon(self) -> None:
        """The server has closed the connection, or is about to, or was killed."""
        self._receiver.join(REPLY_TIMEOUT_S)
        assert not self._receiver.is_alive(), "the server does not close after NBD_CMD_DISC"
        self._client.close()


def _finish(done: Done) -> Replied:
    def replied(reply: Reply | BaseException) -> None:
        if isinstance(reply, BaseException):
            done(reply)
        else:
            done(NbdError(reply.error, reply.text) if reply.error else None)

    return replied
