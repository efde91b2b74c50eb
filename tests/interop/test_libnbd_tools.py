"""nbdinfo, nbdcopy and nbddump: what exports look like, and whole copies in every direction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.interop.conftest import MIB, LiveVolume
from tests.support.blocks import write_stamped
from tests.support.clients import nbdinfo_json, run, sha256_of_export, sha256_of_file


def test_nbdinfo_of_a_live_volume_and_a_snapshot(volume: LiveVolume) -> None:
    snapshot = volume.snapshot("a")
    for uri, read_only in ((volume.uri, False), (snapshot, True)):
        info = nbdinfo_json(uri)
        assert info["protocol"] == "newstyle-fixed"
        assert info["structured"] is True
        (export,) = info["exports"]
        assert export["export-size"] == volume.size
        assert export["is_read_only"] is read_only
        assert export["can_multi_conn"] is True
        assert export["can_df"] is True
        assert export["can_cache"] is True
        assert export["can_flush"] is True
        assert export["can_fua"] is True
        assert export["can_trim"] is not read_only
        assert export["can_zero"] is not read_only
        assert export["can_fast_zero"] is not read_only
        assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
        assert export["block_size_maximum"] >= 64 * MIB
        assert "base:allocation" in export["contexts"]


def test_exports_come_and_go_without_a_restart(volume: LiveVolume) -> None:
    def listed() -> set[str]:
        everything = nbdinfo_json(volume.server.uri("", volume.transport), "--list")["exports"]
        return {export["export-name"] for export in everything if export["export-name"].startswith(f"{volume.name}@")}

    assert listed() == set()
    volume.snapshot("a")
    volume.snapshot("b")
    assert listed() == {f"{volume.name}@a", f"{volume.name}@b"}
    volume.server.cli("snapshot", "delete", f"{volume.name}@a")
    assert listed() == {f"{volume.name}@b"}
    run("nbdinfo", volume.uri_of("b"))
    run("nbdinfo", volume.uri_of("a"), exit_code=1)
    volume.server.cli("snapshot", "delete", f"{volume.name}@b")
    volume.server.cli("volume", "delete", volume.name)
    run("nbdinfo", volume.uri, exit_code=1)
    assert volume.origin.exists()


def test_unknown_exports_are_refused(volume: LiveVolume) -> None:
    for name in ("nothing", f"{volume.name}@", f"{volume.name}@nothing", "../etc/passwd", "", "ü" * 500):
        run("nbdinfo", volume.server.uri(name, volume.transport), exit_code=1)


def test_map_of_a_sparse_volume(sparse_volume: LiveVolume) -> None:
    def extents(uri: str) -> list[tuple[int, int, int]]:
        listed = json.loads(run("nbdinfo", "--json", "--map", uri))
        return [(extent["offset"], extent["length"], extent["type"]) for extent in listed]

    size = sparse_volume.size
    assert extents(sparse_volume.uri) == [(0, size, 3)]
    snapshot = sparse_volume.snapshot("a")
    run("qemu-io", "-f", "raw", "-c", f"write -P 1 {8 * MIB} 1M", "-c", "flush", sparse_volume.uri)
    assert extents(snapshot) == [(0, size, 3)]
    expected = [(0, 8 * MIB, 3), (8 * MIB, MIB, 0), (9 * MIB, size - 9 * MIB, 3)]
    assert extents(sparse_volume.uri) == expected
    assert extents(sparse_volume.snapshot("b")) == expected


@pytest.mark.parametrize(
    "options", [(), ("--connections=4", "--requests=64"), ("--synchronous",), ("--request-size=4096",)]
)
def test_nbdcopy_both_ways(volume: LiveVolume, tmp_path: Path, options: tuple[str, ...]) -> None:
    original = Path(shutil.copy(volume.origin, tmp_path / "original.img"))
    snapshot = volume.snapshot("a")
    new = write_stamped(tmp_path / "new.img", volume.size, seed=3)
    run("nbdcopy", "--flush", *options, new, volume.uri)
    out = tmp_path / "out.img"
    run("nbdcopy", *options, volume.uri, out)
    assert sha256_of_file(out) == sha256_of_file(new) == sha256_of_file(volume.origin)
    out.unlink()
    run("nbdcopy", *options, snapshot, out)
    assert sha256_of_file(out) == sha256_of_file(original)


def test_nbdcopy_of_a_snapshot_onto_its_own_volume(volume: LiveVolume, tmp_path: Path) -> None:
    """A rollback by hand: every chunk is read from the snapshot while the live one is overwritten with it."""
    original = sha256_of_file(volume.origin)
    snapshot = volume.snapshot("a")
    run("nbdcopy", write_stamped(tmp_path / "new.img", volume.size, seed=4), volume.uri)
    later = volume.snapshot("b")
    run("nbdcopy", "--flush", snapshot, volume.uri)
    assert sha256_of_file(volume.origin) == original
    assert sha256_of_export(snapshot, tmp_path) == original
    assert sha256_of_export(later, tmp_path) == sha256_of_file(tmp_path / "new.img")


def test_nbdcopy_keeps_a_sparse_volume_sparse(sparse_volume: LiveVolume, tmp_path: Path) -> None:
    run("qemu-io", "-f", "raw", "-c", f"write -P 9 {3 * MIB} 2M", "-c", "flush", sparse_volume.uri)
    out = tmp_path / "out.img"
    run("nbdcopy", sparse_volume.snapshot("a"), out)
    assert sha256_of_file(out) == sha256_of_file(sparse_volume.origin)
    assert out.stat().st_blocks * 512 <= 3 * MIB
    run("nbdcopy", "--flush", out, sparse_volume.uri)
    assert sparse_volume.origin.stat().st_blocks * 512 <= 3 * MIB


def test_nbddump_of_a_live_volume_and_its_snapshot(sparse_volume: LiveVolume) -> None:
    """It skips what block status says is zero, so data out of place would show."""
    run("qemu-io", "-f", "raw", "-c", f"write -P 0x41 {MIB} 4k", "-c", "flush", sparse_volume.uri)
    snapshot = sparse_volume.snapshot("a")
    run("qemu-io", "-f", "raw", "-c", f"write -P 0x42 {MIB + 8} 8", "-c", "flush", sparse_volume.uri)
    zeroes, letters = " ".join(["00"] * 8), " ".join(["41"] * 8)
    first = f"0000000000: {zeroes}  {zeroes} |................|"
    last = f"{sparse_volume.size - 16:010x}: {zeroes}  {zeroes} |................|"
    data = f"{MIB:010x}: {letters}  {letters} |AAAAAAAAAAAAAAAA|"
    assert _dump(snapshot) == [first, "*", data, "*", f"{MIB + 4096:010x}{first[10:]}", "*", last]
    changed = f"{MIB:010x}: {letters}  {letters.replace('41', '42')} |AAAAAAAABBBBBBBB|"
    assert changed in _dump(sparse_volume.uri)
    assert _dump(sparse_volume.uri, f"--length={MIB + 16}")[-1] == changed


def _dump(uri: str, *options: str) -> list[str]:
    return run("nbddump", *options, uri).splitlines()
