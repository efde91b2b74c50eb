"""qemu-img: info, convert, compare, map, on live volumes and on snapshots."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.interop.conftest import MIB, LiveVolume
from tests.support.blocks import write_stamped
from tests.support.clients import qemu_img_json, qemu_io, run, sha256_of_file


def test_info(volume: LiveVolume) -> None:
    snapshot = volume.snapshot("a")
    for uri in (volume.uri, snapshot):
        info = qemu_img_json("info", uri)
        assert info["virtual-size"] == volume.size
        assert info["format"] == "raw"


def test_convert_from_a_live_volume_and_a_snapshot(volume: LiveVolume, tmp_path: Path) -> None:
    original = sha256_of_file(volume.origin)
    snapshot = volume.snapshot("a")
    qemu_io(volume.uri, "write -P 0x5a 1M 3M", "flush")
    copies = {uri: tmp_path / f"{number}.img" for number, uri in enumerate((volume.uri, snapshot))}
    for uri, copy in copies.items():
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy)
    assert sha256_of_file(copies[snapshot]) == original
    assert sha256_of_file(copies[volume.uri]) == sha256_of_file(volume.origin) != original


def test_convert_onto_a_volume_with_a_snapshot(volume: LiveVolume, tmp_path: Path) -> None:
    """Sixteen coroutines write in any order over all that the snapshot needs."""
    original = Path(shutil.copy(volume.origin, tmp_path / "original.img"))
    new = write_stamped(tmp_path / "new.img", volume.size, seed=2)
    snapshot = volume.snapshot("a")
    run("qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", new, volume.uri)
    for uri, expected in ((volume.uri, new), (snapshot, original)):
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, expected)
    assert sha256_of_file(volume.origin) == sha256_of_file(new)


def test_compare_finds_the_first_difference(volume: LiveVolume) -> None:
    snapshot = volume.snapshot("a")
    compare = ("qemu-img", "compare", "-f", "raw", "-F", "raw", volume.uri, snapshot)
    assert "identical" in run(*compare)
    qemu_io(volume.uri, f"write -P 0x77 {5 * MIB} 512")
    assert f"mismatch at offset {5 * MIB}" in run(*compare, exit_code=1)


def test_map_shows_holes_and_data(sparse_volume: LiveVolume) -> None:
    def data_ranges(uri: str) -> list[tuple[int, int]]:
        extents = qemu_img_json("map", "-f", "raw", uri)
        assert sum(extent["length"] for extent in extents) == sparse_volume.size
        return [(extent["start"], extent["length"]) for extent in extents if not extent["zero"]]

    assert data_ranges(sparse_volume.uri) == []
    qemu_io(sparse_volume.uri, f"write -P 1 {16 * MIB} 1M")
    snapshot = sparse_volume.snapshot("a")
    qemu_io(sparse_volume.uri, f"write -P 2 {32 * MIB} 1M", f"write -z -u {16 * MIB} 1M", "flush")
    assert data_ranges(sparse_volume.uri) == [(32 * MIB, MIB)]
    assert data_ranges(snapshot) == [(16 * MIB, MIB)]


def test_overlay_on_a_snapshot(volume: LiveVolume, tmp_path: Path) -> None:
    """The throwaway writable copy that users of qemu make: a qcow2 file whose backing is the snapshot."""
    snapshot = volume.snapshot("a")
    qemu_io(volume.uri, "write -P 0x11 0 8M")
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", snapshot, overlay)
    run("qemu-io", "-c", "write -P 0x22 1M 64k", "-c", "read -P 0x22 1M 64k", overlay)
    flat = tmp_path / "flat.img"
    run("qemu-img", "convert", "-O", "raw", overlay, flat)
    expected = write_stamped(tmp_path / "expected.img", volume.size, seed=1)
    with expected.open("r+b") as file:
        file.seek(MIB)
        file.write(b"\x22" * 65536)
    assert sha256_of_file(flat) == sha256_of_file(expected)
