"""The server process: a pool, its listeners, its clients, and an ordered end.

Start: pool (under its lock), sockets bound, configured volumes, control API, then the ``ready`` line: whoever has read
it can connect.  What fails before that is one error, with nothing left behind.

End, on SIGTERM or SIGINT: accept nobody; answer options and new requests with SHUTDOWN errors; let what is in flight
finish, for at most ``Limits.shutdown_s`` (a second signal: no longer); close connections, devices and sockets; close
the pool, which makes everything durable.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import uvloop

from nbdsnap.config import Config
from nbdsnap.engine.plan import check_volumes
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import NotFoundError
from nbdsnap.server.connection import Connection
from nbdsnap.server.context import Context, Limits
from nbdsnap.server.control import ControlServer, build_app
from nbdsnap.server.exports import ExportPool, PoolExports
from nbdsnap.server.listeners import Listener, open_listeners

log = logging.getLogger(__name__)

GC_THRESHOLD = 50_000
"""Allocations between two looks for cyclic garbage: the data path makes none, and a batch allocates hundreds of
tuples."""

SWITCH_INTERVAL_S = 10e-6
"""How long another thread may compute while the loop's waits for the interpreter's lock, which each system call of a
read or a reply gives away; the kernel's timers add their slack, 50 us, to it.  Measured with a thread that computes all
the time, 4 KiB reads at depth 64, without that slack (real-time priority; 90,000 per second without the thread): 1,600
with the default of 5 ms, 6,600 with 0.5 ms, 17,000 with 0.1 ms, 78,000 with this."""


class NbdServer:
    """The clients of one set of exports, and the listeners that bring them.  For the loop's thread."""

    def __init__(self, context: Context, pool: ExportPool) -> None:
        self._context = context
        self._exports = PoolExports(pool)
        self._connections: set[Connection] = set()
        self._listeners: Sequence[Listener] = ()
        self._idle = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stopping = False

    def start(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        for listener in listeners:
            listener.start(self._context.loop, self.add_client)

    def add_client(self, sock: socket.socket, label: str) -> None:
        """Serve a connected socket, which is the server's from now on."""
        if self._stopping or len(self._connections) >= self._context.limits.connections:
            log.warning("%s: refused, there are %d connections", label, len(self._connections))
            sock.close()
            return
        connection = Connection(self._context, self._exports, sock, label, self._ended)
        self._connections.add(connection)
        if connection.ended:  # it was gone before it was served
            self._ended(connection)

    @property
    def connections(self) -> int:
        return len(self._connections)

    def _ended(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._look_if_idle()

    def _look_if_idle(self) -> None:
        """Idle: nobody is in transmission.  Who still negotiates has nothing in flight."""
        if all(connection.negotiating for connection in self._connections):
            self._idle.set()

    def hurry(self) -> None:
        """Wait no longer for what is in flight."""
        self._hurry.set()

    async def stop(self) -> None:
        """The ordered end.  Afterwards no connection and no socket of ours is left."""
        self._stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.shut_down()
        self._look_if_idle()
        await self._wait_until_idle(self._context.limits.shutdown_s)
        if self._connections:
            log.warning("%d connections are closed with requests in flight", len(self._connections))
        for connection in list(self._connections):
            connection.close()

    async def _wait_until_idle(self, timeout_s: float) -> None:
        idle = asyncio.create_task(self._idle.wait())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((idle, hurry), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurry.cancel()


async def serve(
    pool: Pool,
    listeners: Sequence[Listener],
    control: ControlServer,
    ready: Callable[[str], None],
    limits: Limits | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, on what is bound.  ``ready`` gets the line that says where."""
    loop = asyncio.get_running_loop()
    context = Context(loop, limits or Limits())
    server = NbdServer(context, pool)
    asked_to_stop = asyncio.Event()

    def on_signal() -> None:
        if asked_to_stop.is_set():
            server.hurry()
        asked_to_stop.set()

    try:
        await control.start(build_app(pool))
        server.start(listeners)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        ready(f"ready {' '.join(listener.uri for listener in listeners)} control={control.path}")
        await asked_to_stop.wait()
        log.info("asked to stop")
    finally:
        await server.stop()
        await control.stop()
        await asyncio.to_thread(context.close)


def run(config: Config, accepted: Sequence[str] = ()) -> int:
    """``nbdsnap serve``: the exit code.  Raises NbdsnapError where it can't start.

    What may be refused comes before what changes anything: the lock of a pool that is there, the addresses, the
    origins; then a new pool and new volumes.  ``accepted``: volumes to serve although their origins were changed.
    """
    _prepare_process()
    with ExitStack() as opened:
        pool = _open_existing(config)
        if pool is not None:
            opened.callback(pool.close)
        listeners = open_listeners(config.server.listen)
        for listener in listeners:
            opened.callback(listener.close)
        control = ControlServer(config.server.control)
        control.bind()
        opened.callback(control.close)
        check_volumes(pool, [(volume.name, volume.origin, volume.size) for volume in config.volumes])
        if pool is None:
            pool = Pool.open(config.pool.path, _pool_options(config), create=True)
            opened.callback(pool.close)
        for volume in config.volumes:
            pool.volume_ensure(volume.name, volume.origin, volume.size, thin=volume.thin)
        for name in accepted:
            pool.volume_accept(name)
        for info in pool.volume_list():
            if info.error is not None:
                log.error("volume %s can't be served: %s", info.name, info.error)
        uvloop.run(serve(pool, listeners, control, _print_line))
    return 0


def _open_existing(config: Config) -> Pool | None:
    try:
        return Pool.open(config.pool.path, _pool_options(config))
    except NotFoundError:
        return None


def _pool_options(config: Config) -> PoolOptions:
    return PoolOptions(**config.pool.model_dump(exclude={"path"}))


def _print_line(line: str) -> None:
    print(line, flush=True)


def _prepare_process() -> None:
    """Settings of the interpreter and the process that the data path's speed and the connections' number depend on."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
