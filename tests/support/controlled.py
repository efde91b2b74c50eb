"""The control API on a real socket, in a thread's event loop, as the server has it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import TracebackType

import uvloop

from nbdsnap.engine.pool import Pool
from nbdsnap.server.control import ControlServer, Runner, build_app

STOP_TIMEOUT_S = 30.0


class ControlThread:
    """Serves ``pool`` on ``path`` until it is left.  An error of the start is raised on entering."""

    def __init__(self, pool: Pool, path: Path) -> None:
        self._app = build_app(pool)
        self._path = path
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="control-test")

    @property
    def runner(self) -> Runner:
        runner: Runner = self._app.state.runner
        return runner

    def __enter__(self) -> ControlThread:
        self._thread.start()
        try:
            self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(STOP_TIMEOUT_S)
        except BaseException:
            self._end_loop()
            raise
        return self

    async def _start(self) -> ControlServer:
        server = ControlServer(self._path)
        server.bind()
        await server.start(self._app)
        return server

    def stop(self) -> None:
        """Idempotent, as the server's own is."""
        asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result(STOP_TIMEOUT_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        self._loop.close()
