"""The server process: a pool, its listeners, its clients, and an ordered end.

Start: pool (under its lock), sockets bound, configured volumes, control API, then the ``ready`` line: whoever has read
it can connect.  What fails before that is one error, with nothing left behind.

On SIGHUP: certificates, rules of access and limits are read anew; what does not hold together changes nothing.

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
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from nbdsnap.config import Config, hooks_of, load_config
from nbdsnap.engine.hooks import Hooks
from nbdsnap.engine.plan import check_volumes
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.errors import NbdsnapError, NotFoundError
from nbdsnap.server.context import Context, Limits
from nbdsnap.server.control import ControlServer, build_app
from nbdsnap.server.listeners import Listener, adopt_listeners, check_exposure, open_listeners
from nbdsnap.server.nbdserver import NbdServer
from nbdsnap.server.security import Security
from nbdsnap.server.systemd import inherited_sockets, notify, notify_reloading
from nbdsnap.server.timer import SnapshotTimer

if TYPE_CHECKING:
    from nbdsnap.replication.daemon import Replicator

log = logging.getLogger(__name__)

GC_THRESHOLD = 50_000
"""Allocations between two looks for cyclic garbage: the data path makes none, and a batch allocates hundreds of
tuples."""

RESERVED_FDS = 64
"""File descriptors kept from clients, beyond those open at the start: for volumes and files to come."""

SWITCH_INTERVAL_S = 10e-6
"""How long another thread may compute while the loop's waits for the interpreter's lock, which each system call of a
read or a reply gives away; the kernel's timers add their slack, 50 us, to it.  Measured with a thread that computes all
the time, 4 KiB reads at depth 64, without that slack (real-time priority; 90,000 per second without the thread): 1,600
with the default of 5 ms, 6,600 with 0.5 ms, 17,000 with 0.1 ms, 78,000 with this."""


async def serve(
    pool: Pool,
    listeners: Sequence[Listener],
    control: ControlServer,
    ready: Callable[[str], None],
    config: Config | None = None,
    security: Security | None = None,
    replicator: Replicator | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, on what is bound.  ``ready`` gets the line that says where.

    ``config`` is what the server was started with: SIGHUP reads its file again.
    """
    loop = asyncio.get_running_loop()
    security = security or Security()
    context = Context(loop, limits_of(config))
    server = NbdServer(context, pool, security)
    asked_to_stop = asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()
    timer = SnapshotTimer(pool, {volume.name: volume.snapshots for volume in config.volumes} if config else {})

    def on_signal() -> None:
        if asked_to_stop.is_set():
            server.hurry()
        asked_to_stop.set()

    def on_reload() -> None:
        if config is not None and not reloads:
            task = asyncio.create_task(reload(config, security, server, context, listeners))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

    try:
        await control.start(build_app(pool))
        server.start(listeners)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        loop.add_signal_handler(signal.SIGHUP, on_reload)
        where = f"ready {' '.join(listener.uri for listener in listeners)} control={control.path}"
        if replicator is not None:
            replicator.start()
            where += "" if replicator.listener is None else f" replication={replicator.listener.port}"
        ready(where)
        notify("READY=1")
        timer.start()
        await asked_to_stop.wait()
        log.info("asked to stop")
        notify("STOPPING=1")
    finally:
        await server.stop()
        if replicator is not None:
            await asyncio.to_thread(replicator.stop)
        await asyncio.to_thread(timer.stop)
        await control.stop()
        await asyncio.to_thread(context.close)


def limits_of(config: Config | None) -> Limits:
    """The configuration's limits; those of connections are no more than there are file descriptors for."""
    if config is None:
        return Limits()
    values = config.limits.model_dump()
    values["held_bytes"] = values.pop("in_flight_bytes")
    values["held_bytes_total"] = values.pop("in_flight_bytes_total")
    values["pending"] = values.pop("in_flight_requests")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, soft - len(list(Path("/proc/self/fd").iterdir())) - RESERVED_FDS)
    if values["connections"] > most:
        log.warning("at most %d connections: there are no more file descriptors (ulimit -n)", most)
        values["connections"] = most
    return Limits(**values)


async def reload(
    config: Config, security: Security, server: NbdServer, context: Context, listeners: Sequence[Listener]
) -> None:
    """Read the configuration again: certificates, rules and limits.  What can't be used changes nothing."""
    notify_reloading()
    try:
        new = await asyncio.to_thread(load_config, config.file)
        check_exposure(listeners, guarded=is_guarded(new))
        await asyncio.to_thread(security.reload, new)
    except NbdsnapError as error:
        log.error("the configuration was not reloaded: %s", error)
    except Exception:
        log.exception("the configuration was not reloaded")
    else:
        context.limits = limits_of(new)
        server.reloaded()
        log.warning("certificates, rules and limits are those of %s now", config.file)
        if _fixed(new) != _fixed(config):
            log.warning(
                "what else has changed there needs a restart: [server], [pool], [[volume]], [tls] mode, [replication], "
                "[[replicate]], [[accept]]"
            )
    notify("READY=1")


def _fixed(config: Config) -> tuple[object, ...]:
    """What is as it was at the start, whatever the file says now."""
    replication = config.replication, config.replicate, config.accept
    return config.server, config.pool, config.volumes, config.tls.mode, *replication


def is_guarded(config: Config) -> bool:
    """Whether clients from everywhere may come: there are rules for them, or it is meant so."""
    return config.server.insecure or bool(config.allow)


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
        security = Security.of(config)
        listeners = _open_listeners(config)
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
        replicator = _make_replicator(pool, config)
        uvloop.run(serve(pool, listeners, control, _print_line, config, security, replicator))
    return 0


def _make_replicator(pool: Pool, config: Config) -> Replicator | None:
    """Its port is bound when this returns."""
    if not config.replicate and config.replication.listen is None:
        return None
    from nbdsnap.replication.daemon import Replicator  # its modules are many, and most servers do without

    replicator = Replicator(pool, config)
    pool.replicator = replicator
    return replicator


def _open_listeners(config: Config) -> list[Listener]:
    """Those that systemd passed, or else the configuration's."""
    sockets = inherited_sockets()
    if sockets:
        return adopt_listeners(sockets, config.tls.mode, guarded=is_guarded(config))
    return open_listeners(config.server.listen, config.tls.mode, guarded=is_guarded(config))


def _open_existing(config: Config) -> Pool | None:
    try:
        return Pool.open(config.pool.path, _pool_options(config))
    except NotFoundError:
        return None


def _pool_options(config: Config) -> PoolOptions:
    hooks = {volume: Hooks(**one) for volume, one in hooks_of(config).items()}
    return PoolOptions(**config.pool.model_dump(exclude={"path"}), hooks=hooks)


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
