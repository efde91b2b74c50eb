"""Running management operations: on the server where one runs, else on the pool itself, under its lock.

:func:`connect` decides: what listens on the control socket is asked; where nothing does, the pool is opened here.  Both
clients run the same table (:mod:`nbdsnap.operations`) and raise the same errors (:mod:`nbdsnap.errors`).
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, cast

from pydantic import ValidationError

from nbdsnap.errors import InUseError, NbdsnapError, PoolLockedError, ServerError
from nbdsnap.models import RepairReport
from nbdsnap.operations import EVENTS_AHEAD, AbandonedError, ErrorReport, Operation, Request

if TYPE_CHECKING:
    import httpx

    from nbdsnap.config import Config
    from nbdsnap.engine.pool import Pool

Req = TypeVar("Req", bound=Request)
Res = TypeVar("Res")
OnEvent = Callable[[Any], None]

CONNECT_TIMEOUT_S = 5.0
"""To a local socket; the answer itself may take as long as the operation does."""

LOCK_WAIT_S = 2.0
"""How long to wait for a pool that is locked: another command is about to end, or a server about to listen."""

LOCK_POLL_S = 0.02


class Client(Protocol):
    def call(self, operation: Operation[Req, Res], request: Req, on_event: OnEvent | None = None) -> Res:
        """Run it; hand its events to ``on_event`` as they come, on any thread."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def connect(config: Config, lock_wait_s: float | None = None, *, offline: bool = False) -> Client:
    """The server's client, or the pool's.  PoolLockedError where another process has the pool but no one listens.

    ``offline``: where no server runs, only look at the pool, which may be damaged, and change nothing.
    """
    deadline = time.monotonic() + (LOCK_WAIT_S if lock_wait_s is None else lock_wait_s)
    while True:
        if is_listening(config.server.control):
            return RemoteClient(config.server.control)
        try:
            return LocalClient(config, offline=offline)
        except PoolLockedError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(LOCK_POLL_S)


def repair(config: Config, announce: Callable[[RepairReport], None], *, dry_run: bool) -> RepairReport:
    """Repair the pool, which no server may have open.  ``announce`` gets the plan before anything is changed."""
    from nbdsnap.engine.offline import OfflinePool
    from nbdsnap.engine.repair import plan_repair
    from nbdsnap.engine.repair import repair as execute

    if is_listening(config.server.control):
        raise InUseError(
            f"a server has the pool {config.pool.path} open", hint="stop it: a repair needs the pool alone"
        )
    with OfflinePool(config.pool.path) as pool:
        plan = plan_repair(pool)
        report = RepairReport(done=not dry_run, steps=plan.steps)
        announce(report)
        if not dry_run:
            execute(pool, plan)
    return report


def is_listening(control: Path) -> bool:
    """Whether a server answers on the control socket; ServerError where it may not be asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(control))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
                return False
            hint = "run the command as root or as the server's user" if error.errno == errno.EACCES else ""
            raise ServerError(f"cannot reach the server at {control}: {error.strerror or error}", hint=hint) from None
    return True


class LocalClient:
    """Operations on a pool that this process has opened; of one that it only looks at (``offline``): the check."""

    def __init__(self, config: Config, *, offline: bool = False) -> None:
        from nbdsnap.config import hooks_of
        from nbdsnap.engine.hooks import Hooks
        from nbdsnap.engine.offline import OfflinePool
        from nbdsnap.engine.pool import Pool, PoolOptions

        self._pool: Pool | OfflinePool
        if offline:
            self._pool = OfflinePool(config.pool.path)
            return
        hooks = {volume: Hooks(**one) for volume, one in hooks_of(config).items()}
        options = PoolOptions(**config.pool.model_dump(exclude={"path"}), hooks=hooks)
        self._pool = Pool.open(config.pool.path, options)

    def call(self, operation: Operation[Req, Res], request: Req, on_event: OnEvent | None = None) -> Res:
        return _LocalCall(self._pool, operation, request).follow(on_event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.close()


class _LocalCall(Generic[Req, Res]):
    """One operation on a thread of its own, followed from the caller's.

    So Ctrl-C and a closed pipe, which strike the caller, end the operation between two events and never inside the
    engine.
    """

    def __init__(self, pool: Any, operation: Operation[Req, Res], request: Req) -> None:
        self._pool = pool
        self._operation = operation
        self._request = request
        self._room = threading.Semaphore(EVENTS_AHEAD)
        self._abandoned = False
        self._events: SimpleQueue[Any] = SimpleQueue()
        """What was emitted; ``self`` after the last."""
        self._result: Res | None = None
        self._error: BaseException | None = None

    def follow(self, on_event: OnEvent | None) -> Res:
        thread = threading.Thread(target=self._run, name=self._operation.name)
        thread.start()
        try:
            while (event := self._events.get()) is not self:
                self._room.release()
                if on_event is not None:
                    on_event(event)
        finally:
            self._abandoned = True
            self._room.release()
            thread.join()
        if self._error is not None:
            raise self._error
        return cast(Res, self._result)

    def _run(self) -> None:
        try:
            self._result = self._operation.run(self._pool, self._request, self._emit)
        except BaseException as error:
            self._error = error
        self._events.put(self)

    def _emit(self, event: Any) -> None:
        self._room.acquire()
        if self._abandoned:
            raise AbandonedError
        self._events.put(event)


class RemoteClient:
    """Operations on a running server, over its control socket (docs/control-api.md)."""

    def __init__(self, control: Path) -> None:
        import httpx

        self._control = control
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(control), verify=False),  # no TLS here: spare reading certificates
            base_url="http://nbdsnap",
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=False,  # $HTTP_PROXY is not meant for a local socket
        )

    def call(self, operation: Operation[Req, Res], request: Req, on_event: OnEvent | None = None) -> Res:
        import httpx

        content = request.model_dump_json(by_alias=True)
        try:
            with self._http.stream("POST", f"/v1/{operation.name}", content=content) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._error(response.read())
                if operation.event is None:
                    return operation.response_adapter.validate_json(response.read())
                return self._follow(operation, response, on_event)
        except httpx.TransportError as error:
            raise ServerError(
                f"the server at {self._control} broke off: {error}", hint="look at its log, then try again"
            ) from None
        except ValidationError:
            raise self._stranger() from None

    def _follow(self, operation: Operation[Req, Res], response: httpx.Response, on_event: OnEvent | None) -> Res:
        """Hand on the events of a stream up to its result."""
        for line in _lines(response.iter_bytes()):
            answer: Any = operation.line_model.model_validate_json(line)
            if answer.error is not None:
                raise answer.error.error()
            if answer.event is None:
                result: Res = answer.result
                return result
            if on_event is not None:
                on_event(answer.event)
        raise ServerError(f"the server at {self._control} ended before its answer did", hint="look at its log")

    def _error(self, body: bytes) -> NbdsnapError:
        return ErrorReport.model_validate_json(body).error()

    def _stranger(self) -> ServerError:
        return ServerError(
            f"what answers on {self._control} speaks another language",
            hint="it is no nbdsnap server, or one of another version: compare `nbdsnap --version`",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._http.close()


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines, without their ends.  Not str.splitlines, which also splits inside JSON's strings."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
