"""``nbdsnap apply``: onto raw files, and a block device where there is one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nbdsnap.cli.main import run
from tests.support.deltas import CHUNK, contents, encode, split
from tests.support.server import NBDSNAP

OLD, NEW = contents(4)
STREAM = b"".join(encode(NEW, OLD))
WHOLE = b"".join(encode(NEW))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(OLD)
    return path


def apply(stream: bytes, image: Path, *options: str) -> int:
    file = image.with_name("in.delta")
    file.write_bytes(stream)
    return run(["apply", str(file), str(image), *options])


def test_a_difference_onto_its_base(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(STREAM, image, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["volume"], report["snapshot"], report["base"]) == ("vol", "tuesday", "monday")
    assert image.read_bytes()[: len(NEW)] == NEW


def test_a_whole_one_makes_a_file_and_replaces_one(image: Path) -> None:
    assert apply(WHOLE, image) == 0
    assert image.read_bytes()[: len(NEW)] == NEW
    new = image.with_name("new.img")
    assert apply(WHOLE, new) == 0
    assert new.read_bytes() == NEW
    assert new.stat().st_blocks * 512 < len(NEW), "zeroes are holes"


def test_from_a_pipe(image: Path) -> None:
    command = [NBDSNAP, "apply", "-", image]
    subprocess.run(command, input=STREAM, check=True, capture_output=True)
    assert image.read_bytes()[: len(NEW)] == NEW


def test_a_file_grows_with_the_volume(image: Path) -> None:
    grown = NEW.ljust(len(OLD) + 3 * CHUNK, b"\0") + b"end"
    image.write_bytes(OLD + b"dirt" * 100)
    assert apply(b"".join(encode(grown, OLD)), image) == 0
    assert image.read_bytes() == grown


def test_applied_twice_what_is_no_difference_stays_right(image: Path) -> None:
    frames = b"".join(encode(b"\1" * len(OLD), bytes(len(OLD))))
    image.write_bytes(bytes(len(OLD)))
    assert apply(frames, image) == 0
    assert apply(frames, image) == 0
    assert image.read_bytes() == b"\1" * len(OLD)


def test_what_is_refused_leaves_the_file_as_it_was(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = bytearray(OLD)
    wrong[35 * CHUNK] ^= 1  # in an extent of the last frame
    for stream, before, code, message in (
        (STREAM, bytes(wrong), 5, "is not what the delta was made from"),
        (STREAM[:-1], OLD, 1, "was cut after"),
        (STREAM[:-1] + bytes([STREAM[-1] ^ 1]), OLD, 7, "checksum"),
        (b"".join(list(split(STREAM))[:-2]), OLD, 1, "was cut"),
        (WHOLE[:-1], OLD, 1, "was cut after"),
        (STREAM, OLD[:-1], 5, "the delta needs"),
        (b"nonsense" * 10, OLD, 1, "no delta stream"),
    ):
        image.write_bytes(before)
        assert apply(stream, image) == code
        assert message in capsys.readouterr().err
        assert image.read_bytes() == before


def test_a_target_that_can_not_be(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(STREAM, tmp_path / "missing.img") == 4
    assert not (tmp_path / "missing.img").exists()
    file = tmp_path / "in.delta"
    assert run(["apply", str(file), str(tmp_path)]) == 1
    assert "neither a regular file" in capsys.readouterr().err
    assert run(["apply", str(tmp_path / "nix"), str(image)]) == 4
    with image.open("r+b"):
        holder = subprocess.Popen(["sleep", "60"], stdout=image.open("r+b"))
        try:
            assert apply(STREAM, image) == 5
            assert "open for writing" in capsys.readouterr().err
        finally:
            holder.kill()
            holder.wait()
    assert image.read_bytes() == OLD
