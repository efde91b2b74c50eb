"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.server import SERVERS, Server, Volume

os.environ.pop("PYTHONUNBUFFERED", None)  # users have it seldom, and it hides errors of writing the output


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the servers said where a test failed."""
    report = yield
    if report.failed:
        for server in {server for node in item.listchain() for server in node.stash.get(SERVERS, [])}:
            report.sections.append((f"standard error of {server.folder.name}", server.stderr()))
    return report


@pytest.fixture
def start_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts real servers below ``tmp_path``; each is stopped, and must end cleanly, when the test is over."""
    servers = request.node.stash.setdefault(SERVERS, [])
    with ExitStack() as running:

        def start(volumes: Sequence[Volume] = (), name: str = "server", **keys: str) -> Server:
            server = Server(tmp_path / name, volumes, **keys)
            servers.append(server)
            return running.enter_context(server)

        yield start
