"""nbdkit's nbd plugin between a client and nbdsnap: another client library's habits, and a proxy's."""

from __future__ import annotations

from pathlib import Path

from tests.interop.conftest import LiveVolume
from tests.support.clients import nbdinfo_json, qemu_io, run, sha256_of_export, sha256_of_file
from tests.support.nbdkit import nbdkit


def test_proxy_of_a_live_volume(volume: LiveVolume, tmp_path: Path) -> None:
    original = sha256_of_file(volume.origin)
    snapshot = volume.snapshot("a")
    with nbdkit("nbd", f"uri={volume.uri}") as port:
        through = f"nbd://127.0.0.1:{port}/"
        (export,) = nbdinfo_json(through)["exports"]
        assert (export["export-size"], export["is_read_only"]) == (volume.size, False)
        qemu_io(
            through, "write -P 7 1000 100000", "write -z -u 2M 1M", "discard 4M 1M", "flush", "read -P 7 1000 100000"
        )
        assert sha256_of_export(through, tmp_path) == sha256_of_file(volume.origin)
    assert sha256_of_export(snapshot, tmp_path) == original


def test_one_connection_for_many_clients(volume: LiveVolume, tmp_path: Path) -> None:
    """``shared=true`` multiplexes all clients over one connection: requests of several mix in one stream."""
    volume.snapshot("a")
    with nbdkit("nbd", "shared=true", f"uri={volume.uri}") as port:
        through = f"nbd://127.0.0.1:{port}/"
        copy = tmp_path / "copy.img"
        run("nbdcopy", "--connections=4", "--requests=32", through, copy)
        assert sha256_of_file(copy) == sha256_of_file(volume.origin)
        assert volume.server.connections(volume.name) == 1


def test_writable_overlay_of_a_snapshot(volume: LiveVolume, tmp_path: Path) -> None:
    original = sha256_of_file(volume.origin)
    snapshot = volume.snapshot("a")
    with nbdkit("--filter=cow", "nbd", f"uri={snapshot}") as port:
        through = f"nbd://127.0.0.1:{port}/"
        qemu_io(through, "write -P 1 0 1M", "read -P 1 0 1M")
        qemu_io(volume.uri, "write -P 2 4M 1M", "flush")
    assert sha256_of_export(snapshot, tmp_path) == original
