"""``nbdsnap delta``: on files, without a server or a pool."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nbdsnap.cli.main import run
from tests.support.deltas import contents, encode
from tests.support.server import NBDSNAP

OLD, NEW = contents(1)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "a.delta"
    path.write_bytes(b"".join(encode(NEW, OLD)))
    return path


def test_info_says_what_is_inside(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["delta", "info", str(stream), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["volume"], found["to"]["name"], found["base"]["name"]) == ("vol", "tuesday", "monday")
    assert (found["to"]["size"], found["base"]["size"]) == (len(NEW), len(OLD))
    assert found["stream_bytes"] == stream.stat().st_size
    assert set(found["encodings"]) == {"raw", "zero", "zstd", "diff"}
    assert sum(one["bytes"] for one in found["encodings"].values()) == found["bytes"]
    assert sum(one["extents"] for one in found["encodings"].values()) == found["extents"]
    assert run(["delta", "info", str(stream)]) == 0
    shown = capsys.readouterr().out
    assert "vol@tuesday" in shown and "vol@monday" in shown and found["digest"] in shown


def test_info_of_a_whole_snapshot_names_no_base(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream.write_bytes(b"".join(encode(NEW)))
    assert run(["delta", "info", str(stream)]) == 0
    assert "none: all of the snapshot" in capsys.readouterr().out


def test_verify_reads_a_pipe(stream: Path) -> None:
    done = subprocess.run([NBDSNAP, "delta", "verify", "-"], input=stream.read_bytes(), capture_output=True, check=True)
    assert done.stdout.startswith(b"ok: vol@tuesday")


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda data: data[:-1], 7, "was cut after"),
        (lambda data: b"", 7, "nothing came"),
        (lambda data: data[:1000] + bytes([data[1000] ^ 4]) + data[1001:], 7, "checksum of frame"),
        (lambda data: data + b"x", 7, "goes on after its end"),
        (lambda data: b"QFI\xfb" + data, 1, "is no delta stream"),
    ],
)
def test_verify_refuses(
    stream: Path, capsys: pytest.CaptureFixture[str], damage: object, code: int, message: str
) -> None:
    assert callable(damage)
    stream.write_bytes(damage(stream.read_bytes()))
    assert run(["delta", "verify", str(stream)]) == code
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 2


def test_a_missing_file_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["delta", "verify", "/nonexistent"]) == 4
    assert "/nonexistent" in capsys.readouterr().err
