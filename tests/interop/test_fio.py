"""fio, verifying what it wrote by checksum, while snapshots are taken, read and deleted underneath it."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdsnap import operations
from tests.interop.conftest import LiveVolume
from tests.support.clients import client_environment, require_client, run, sha256_of_export, sha256_of_file

FIO_SEED = 20060801
FIO_TIMEOUT_S = 60.0


def fio_job(volume: LiveVolume, *options: str) -> list[str]:
    """A job of verified random writes; what it wrote is read again, by offset, when all is written."""
    job = ["fio", "--name=job", "--ioengine=nbd", f"--uri={volume.uri}", f"--randseed={FIO_SEED}", "--rw=randwrite"]
    job += [f"--size={volume.size}", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]
    return [*job, *options]


@pytest.mark.parametrize(
    "options",
    [
        ("--bs=4k", "--iodepth=1", "--io_size=2m"),
        ("--bs=4k", "--iodepth=64"),
        ("--bssplit=512/30:4k/30:24k/30:256k/10", "--iodepth=32", "--serialize_overlap=1"),
        ("--bs=4k", "--iodepth=32", "--fsync=32"),
        ("--bs=1m", "--iodepth=8"),
    ],
    ids=["one at a time", "deep", "mixed sizes", "with flushes", "large"],
)
def test_verified_writes_over_a_snapshot(volume: LiveVolume, tmp_path: Path, options: tuple[str, ...]) -> None:
    original = sha256_of_file(volume.origin)
    snapshot = volume.snapshot("before")
    run(*fio_job(volume, *options), cwd=tmp_path)
    assert sha256_of_export(snapshot, tmp_path) == original
    assert sha256_of_export(volume.uri, tmp_path) == sha256_of_file(volume.origin) != original


@contextmanager
def running(command: list[str], cwd: Path) -> Iterator[threading.Event]:
    """A client in the background; the event tells that it has ended.  It must end with 0."""
    require_client(command[0])
    ended = threading.Event()
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=client_environment()
    )
    output: list[str] = []

    def wait() -> None:
        output.append(process.communicate()[0])
        ended.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    try:
        yield ended
        assert ended.wait(FIO_TIMEOUT_S), f"{command[0]} did not end"
    finally:
        process.kill()
        waiter.join()
    assert process.returncode == 0, output[0]


def test_snapshots_during_verified_writes(volume: LiveVolume, tmp_path: Path) -> None:
    """Each snapshot reads the same right after it was taken and when all the writing is over; some go meanwhile."""
    job = fio_job(volume, "--bs=4k", "--iodepth=16", "--loops=3", "--rate_iops=3000", "--verify_backlog=256")
    first: dict[str, str] = {}
    with running(job, tmp_path) as ended:
        number = 0
        while not ended.is_set() and number < 20:
            name = f"s{number}"
            first[name] = sha256_of_export(volume.snapshot(name), tmp_path)
            if number % 3 == 2:
                gone = f"s{number - 1}"
                volume.server.manage(operations.SNAPSHOT_DELETE, names=[f"{volume.name}@{gone}"])
                del first[gone]
            number += 1
    assert len(first) >= 2
    for name, checksum in first.items():
        assert sha256_of_export(volume.uri_of(name), tmp_path) == checksum, name
    assert sha256_of_export(volume.uri, tmp_path) == sha256_of_file(volume.origin)


def test_two_jobs_on_two_halves(volume: LiveVolume, tmp_path: Path) -> None:
    """Two connections to one volume, each verifying its own half, a snapshot under both."""
    original = sha256_of_file(volume.origin)
    snapshot = volume.snapshot("before")
    half = volume.size // 2
    halves = ("--numjobs=2", f"--size={half}", f"--offset_increment={half}", "--bs=4k", "--iodepth=16")
    run(*fio_job(volume, *halves), cwd=tmp_path)
    assert sha256_of_export(snapshot, tmp_path) == original
