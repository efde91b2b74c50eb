"""The command line in this process, against a real pool: opened by the command itself, or by a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import from_json

from nbdsnap.cli.main import run
from nbdsnap.engine.pool import Pool
from tests.support.controlled import ControlThread
from tests.support.enginepool import make_pool, write_blocks


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return from_json(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Cli:
    """``cli("volume", "list")``: the exit code must be 0 unless another is expected."""

    def __init__(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config = config
        self.pool_path = config.parent / "pool"
        self.pool: Pool | None = None
        """The server's, while one runs."""
        self._capsys = capsys

    def __call__(self, *words: str | Path, code: int = 0) -> Result:
        self._capsys.readouterr()
        got = run(["--config", str(self.config), *map(str, words)])
        result = Result(got, *self._capsys.readouterr())
        assert got == code, f"{words}: exit {got}\n{result.out}{result.err}"
        assert "Traceback" not in result.err
        if code:
            assert 1 <= len(result.err.splitlines()) <= 2, result.err
            assert result.err.startswith("nbdsnap: ")
        return result

    def write(self, volume: str, offsets: Iterable[int]) -> None:
        """Change blocks of a volume, as its clients would."""
        pool = self.pool or Pool.open(self.pool_path)
        try:
            write_blocks(pool, volume, offsets)
            pool.settle()
        finally:
            if self.pool is None:
                pool.close()


def write_config(folder: Path) -> Path:
    config = folder / "nbdsnap.toml"
    config.write_text('[server]\nlisten = ["tcp://127.0.0.1:0"]\ncontrol = "control.sock"\n[pool]\npath = "pool"\n')
    return config


@pytest.fixture
def local_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """On a pool with one volume of 1 GiB; no server."""
    make_pool(tmp_path, ["vol"]).close()
    return Cli(write_config(tmp_path), capsys)


@pytest.fixture(params=["local", "server"])
def cli(request: pytest.FixtureRequest, local_cli: Cli) -> Iterator[Cli]:
    """Both ways, one after the other: whatever a test shows holds for both."""
    with ExitStack() as stack:
        if request.param == "server":
            local_cli.pool = Pool.open(local_cli.pool_path)
            stack.callback(local_cli.pool.close)
            stack.enter_context(ControlThread(local_cli.pool, local_cli.config.parent / "control.sock"))
        yield local_cli
