"""The receiving end: an HTTPS server whose clients show who they are, and may do what the rules say.

Each connection has a thread: it reads the stream and receives it (:mod:`nbdsnap.transfer.receive`), with nothing in
between; the event loop has no part in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from nbdsnap.addresses import TcpAddress
from nbdsnap.config import Config
from nbdsnap.engine.names import check_name
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import (
    ConfigError,
    ConflictError,
    NbdsnapError,
    NotFoundError,
    ServerError,
    UsageError,
    from_exception,
)
from nbdsnap.replication.tls import find_rule, peer_names, server_context
from nbdsnap.replication.wire import PATH, ChunkedSource, KnownSnapshot, ReplicaState, tune
from nbdsnap.transfer.pace import Progress
from nbdsnap.transfer.receive import receive, resume_token

log = logging.getLogger(__name__)

CONNECTIONS = 64
HANDSHAKE_S = 10.0
REQUEST_S = 30.0
DRAIN_S = 2.0
"""For a client that still sends when it is refused, to take the answer."""

DRAIN_BYTES = 64 << 20
OWN_PREFIX = "repl-"
"""Of the names of snapshots that replication takes, and may delete."""


class Listener:
    """Accepts senders until :meth:`close`."""

    def __init__(self, pool: Pool, config: Config, address: TcpAddress) -> None:
        self.pool = pool
        self.rules = config.accept
        self._config = config
        server_context(config)  # that it can be used is found out now
        self._stopping = threading.Event()
        self._free = threading.Semaphore(CONNECTIONS)
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        try:
            self._sock = socket.create_server((address.host, address.port), family=family, backlog=64)
        except OSError as error:
            raise ServerError(f"[replication] cannot listen on {address}: {error.strerror or error}") from None
        self.port: int = self._sock.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="replication", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End what is under way; what has come stays for the next time.  Afterwards nothing uses the pool."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def tick(self, *_: int) -> None:
        if self._stopping.is_set():
            raise StoppingError

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, peer = self._sock.accept()
            except OSError:
                if self._stopping.wait(0.1):
                    return
                continue
            if not self._free.acquire(blocking=False):
                log.warning("%s: refused, %d senders are connected", peer[0], CONNECTIONS)
                sock.close()
                continue
            thread = threading.Thread(target=self._serve, args=(sock, peer), name="replication")
            with self._lock:
                self._threads.add(thread)
            thread.start()

    def _serve(self, sock: socket.socket, peer: tuple[str, int]) -> None:
        try:
            sock.settimeout(HANDSHAKE_S)
            tune(sock)
            context = server_context(self._config)  # each time: certificates are renewed while a server runs
            with context.wrap_socket(sock, server_side=True) as tls:
                tls.settimeout(REQUEST_S)
                _Handler(tls, peer, self)
        except StoppingError:
            pass
        except (OSError, ssl.SSLError) as error:
            log.info("%s: %s", peer[0], error)
        except ConfigError as error:
            log.error("%s", error)
        except Exception:
            log.exception("%s: a replication failed unexpectedly", peer[0])
        finally:
            sock.close()
            self._free.release()
            with self._lock:
                self._threads.discard(threading.current_thread())


class StoppingError(Exception):
    """The server is shutting down."""


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    protocol_version = "HTTP/1.1"
    rbufsize = 0  # the body is read past it
    server: Listener  # type: ignore[assignment]
    connection: ssl.SSLSocket

    def __init__(self, tls: ssl.SSLSocket, peer: tuple[str, int], listener: Listener) -> None:
        super().__init__(tls, peer, listener)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        log.debug("%s: " + format, self.client_address[0], *args)

    def do_GET(self) -> None:
        self._answer(self._state, drain=False)

    def do_POST(self) -> None:
        self._answer(self._receive, drain=True)

    def _answer(self, work: object, *, drain: bool) -> None:
        self.close_connection = True
        assert callable(work)
        try:
            status, body = 200, work().model_dump_json().encode()
        except StoppingError:
            error: NbdsnapError = ServerError("the server is shutting down")
            status, body = error.http_status, json.dumps(error.to_wire()).encode()
        except Exception as failure:
            known = from_exception(failure)
            if known is None:
                log.error("a replication failed unexpectedly", exc_info=failure)
                known = NbdsnapError(f"unexpected {type(failure).__name__} on the other side; its log says more")
            status, body = known.http_status, json.dumps(known.to_wire()).encode()
            log.warning("%s: %s", self.client_address[0], known)
        self.connection.settimeout(REQUEST_S)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        if drain and status != 200:
            self._drain()

    def _drain(self) -> None:
        """A connection that is closed with something unread takes its answer with it."""
        self.connection.settimeout(DRAIN_S)
        with contextlib.suppress(OSError):
            left = DRAIN_BYTES
            while left > 0 and (piece := self.connection.recv(1 << 16)):
                left -= len(piece)

    def _volume(self) -> tuple[str, bool]:
        """The volume that the request is about, and whether it may be made; refused where no rule lets its sender."""
        path = urlsplit(self.path).path
        if not path.startswith(PATH):
            raise NotFoundError(f"there is no {path} here")
        volume = check_name(unquote(path.removeprefix(PATH)))
        names = peer_names(self.connection)
        rule = find_rule(self.server.rules, names, volume)
        if rule is None:
            raise ConflictError(
                f"{', '.join(sorted(names)) or 'a certificate without a name'} may not replicate to volume {volume}",
                hint="the target's configuration needs an [[accept]] rule for that",
            )
        return volume, rule.create

    def _state(self) -> ReplicaState:
        volume, _ = self._volume()
        pool = self.server.pool
        for info in pool.volume_list():
            if info.name == volume:
                return ReplicaState(
                    volume=volume,
                    exists=True,
                    replica=info.replica,
                    size=info.size,
                    snapshots=[KnownSnapshot(name=one.name, id=one.id) for one in pool.snapshots_of(volume)],
                    token=resume_token(pool, volume),
                )
        return ReplicaState(volume=volume, exists=False)

    def _receive(self) -> object:
        volume, create = self._volume()
        pool, listener = self.server.pool, self.server
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            raise UsageError("a delta stream comes in chunks")
        query = parse_qs(urlsplit(self.path).query)
        self._prepare(volume, create, size=int(query.get("size", ["0"])[0]))
        progress = Progress(listener.tick)
        source = ChunkedSource(self.connection, progress.tick)
        report = receive(pool, volume, source, progress, force=True, resumable=True)
        keep = int(query.get("keep", ["0"])[0])
        if keep > 0:
            prune(pool, volume, keep)
        return report

    def _prepare(self, volume: str, create: bool, *, size: int) -> None:
        pool = self.server.pool
        found = next((info for info in pool.volume_list() if info.name == volume), None)
        if found is None:
            if not create:
                raise NotFoundError(f"there is no volume {volume}", hint="make it, or let the [[accept]] rule: create")
            pool.volume_create(volume, size=size, thin=True)
        elif found.replica:
            if size > found.size:
                pool.volume_resize(volume, size)
            return
        elif not pool.is_blank(volume):
            raise ConflictError(
                f"volume {volume} is no replica: it may have been written",
                hint=f"if what it has may be lost: nbdsnap volume demote {volume}",
            )
        pool.volume_demote(volume)


def prune(pool: Pool, volume: str, keep: int) -> None:
    """Delete the oldest snapshots that replication took, but the newest ``keep``; never one that is held or open."""
    own = [one for one in pool.snapshots_of(volume) if one.name.startswith(OWN_PREFIX)]
    for one in own[:-keep]:
        if not one.held:
            with contextlib.suppress(ConflictError, NotFoundError):
                pool.snapshot_delete([f"{volume}@{one.name}"])
