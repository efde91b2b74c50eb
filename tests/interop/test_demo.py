"""The demo (``make run``): what it prints works when it is typed."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.clients import read_export, require_client, run
from tests.support.deadline import wait_until
from tests.support.server import NBDSNAP

TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def demo(folder: Path, port: int) -> Iterator[str]:
    """What a running demo printed; it must end cleanly."""
    printed = folder.with_suffix(".out")
    with (
        printed.open("wb") as output,
        subprocess.Popen(
            [NBDSNAP, "demo", folder, "--port", str(port)], stdout=output, stderr=subprocess.PIPE
        ) as server,
    ):
        try:
            wait_until(lambda: "\nready " in printed.read_text() or server.poll() is not None, "the demo", TIMEOUT_S)
            assert server.poll() is None, server.stderr and server.stderr.read()
            yield printed.read_text()
            server.send_signal(signal.SIGINT)
            assert server.wait(TIMEOUT_S) == 0
            assert server.stderr is not None
            assert server.stderr.read() == b""
        finally:
            server.kill()


def lines_to_type(printed: str) -> list[list[str]]:
    words = [shlex.split(line, comments=True) for line in re.findall(r"^ {2}.{18}(\S.*)$", printed, re.MULTILINE)]
    assert {Path(line[0]).name for line in words} == {"nbdinfo", "qemu-img", "nbd-client", "nbdsnap"}
    return words


def test_printed_lines_work(tmp_path: Path) -> None:
    require_client("nbdinfo", "qemu-img", "mkfs.ext4")
    with demo(tmp_path / "demo", free_port()) as printed:
        for line in lines_to_type(printed):
            if line[0] != "nbd-client":  # needs a kernel module
                run(*line, cwd=tmp_path)
        shown = run(NBDSNAP, "--config", tmp_path / "demo" / "nbdsnap.toml", "snapshot", "list")
        assert "vol@first" in shown
    assert (tmp_path / "first.img").read_bytes() == (tmp_path / "demo" / "vol.img").read_bytes()
    run("e2fsck", "-f", "-n", tmp_path / "first.img")


def test_demo_goes_on_where_it_was(tmp_path: Path) -> None:
    require_client("nbdcopy")
    port = free_port()
    program = (NBDSNAP, "--config", tmp_path / "demo" / "nbdsnap.toml")
    with demo(tmp_path / "demo", port):
        run(*program, "snapshot", "create", "vol@first")
    with demo(tmp_path / "demo", port):
        assert "vol@first" in run(*program, "snapshot", "list")
        copy = read_export(f"nbd://127.0.0.1:{port}/vol@first", tmp_path / "copy.img")
    assert copy.read_bytes() == (tmp_path / "demo" / "vol.img").read_bytes()


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(
            [NBDSNAP, "demo", tmp_path / "demo", "--port", str(port)], capture_output=True, text=True, timeout=TIMEOUT_S
        )
    assert done.returncode == 5
    assert f"127.0.0.1:{port}" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_folder_that_cannot_be(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run([NBDSNAP, "demo", tmp_path / folder], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert done.stderr.startswith("nbdsnap: cannot write the demo into")
