"""Incremental backups as tools make them: the map of what changed, then these ranges and no others."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdsnap import operations
from tests.interop.conftest import MIB, LiveVolume
from tests.support.blocks import write_stamped
from tests.support.client import Client
from tests.support.clients import client_environment, nbdinfo_json, nbdsh, qemu_io, require_client, run, sha256_of_file
from tests.support.server import NBDSNAP
from tests.support.wiretap import Wiretap

CHUNK = 4096
DOCUMENT = Path(__file__).parents[2] / "docs" / "backup.md"


def changed_by_diff(volume: LiveVolume, older: str, newer: str | None) -> list[tuple[int, int]]:
    words = [f"{volume.name}@{older}"] + ([] if newer is None else [f"{volume.name}@{newer}"])
    return [(extent["offset"], extent["length"]) for extent in volume.server.json("diff", *words)["extents"]]


def changed_by_nbdinfo(uri: str, context: str) -> list[tuple[int, int]]:
    listed = json.loads(run("nbdinfo", "--json", f"--map={context}", uri))
    assert {extent["type"] for extent in listed} <= {0, 1}
    return [(extent["offset"], extent["length"]) for extent in listed if extent["type"]]


def qemu_options(volume: LiveVolume, export: str) -> list[str]:
    server = ["server.type=inet", "server.host=127.0.0.1", f"server.port={volume.server.port}"]
    if volume.transport == "unix":
        server = ["server.type=unix", f"server.path={volume.server.socket}"]
    return ["driver=nbd", *server, f"export={export}"]


def changed_by_qemu(volume: LiveVolume, export: str, context: str) -> list[tuple[int, int]]:
    options = f"{','.join(qemu_options(volume, export))},x-dirty-bitmap={context}"
    listed = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    return [(extent["start"], extent["length"]) for extent in listed if not extent["data"]]


def test_every_way_to_ask_for_the_changes_says_the_same(volume: LiveVolume) -> None:
    volume.snapshot("a")
    qemu_io(volume.uri, "write -P 1 0 4k", "write -P 2 12k 9000", "write -P 3 7M 1M", "discard 1M 64k")
    volume.snapshot("b")
    qemu_io(volume.uri, "write -P 4 0 4k", f"write -P 5 {5 * MIB + 100} 10", "write -z 3M 1M")
    for older, newer in (("a", "b"), ("a", None), ("b", None)):
        export = volume.name if newer is None else f"{volume.name}@{newer}"
        expected = changed_by_diff(volume, older, newer)
        assert expected
        uri = volume.server.uri(export, volume.transport)
        for context in (f"qemu:dirty-bitmap:{older}", f"x-nbdsnap:changed:{older}"):
            assert changed_by_nbdinfo(uri, context) == expected
            assert changed_by_qemu(volume, export, context) == expected


def test_contexts_of_each_export(volume: LiveVolume) -> None:
    def contexts(uri: str) -> list[str]:
        (export,) = nbdinfo_json(uri)["exports"]
        return sorted(export["contexts"])

    always = ["base:allocation", "qemu:allocation-depth"]
    assert contexts(volume.uri) == always
    first, second = volume.snapshot("first"), volume.snapshot("second")
    assert contexts(first) == always
    changed_since_first = ["qemu:dirty-bitmap:first", "x-nbdsnap:changed:first"]
    assert contexts(second) == sorted(always + changed_since_first)
    assert contexts(volume.uri) == sorted(
        always + changed_since_first + ["qemu:dirty-bitmap:second", "x-nbdsnap:changed:second"]
    )
    volume.server.cli("snapshot", "delete", f"{volume.name}@first")
    assert contexts(second) == always


def test_allocation_depth(sparse_volume: LiveVolume) -> None:
    qemu_io(sparse_volume.uri, "write -P 1 0 2M", "flush")
    snapshot = sparse_volume.snapshot("a")
    qemu_io(sparse_volume.uri, "write -P 2 1M 2M", "flush")
    sparse_volume.server.manage(operations.STATUS)

    def depths(uri: str) -> list[tuple[int, int, int]]:
        listed = json.loads(run("nbdinfo", "--json", "--map=qemu:allocation-depth", uri))
        return [(extent["offset"] // MIB, extent["length"] // MIB, extent["type"]) for extent in listed]

    assert depths(sparse_volume.uri) == [(0, 3, 1), (3, 61, 0)]
    assert depths(snapshot) == [(0, 1, 2), (1, 1, 1), (2, 62, 0)]


def test_a_snapshot_that_a_client_compares_with_is_in_use(volume: LiveVolume) -> None:
    volume.snapshot("a")
    newer = volume.snapshot("b")
    delete = f"{NBDSNAP} --config {volume.server.config} snapshot delete {volume.name}@a"
    script = f"""
import subprocess
h.add_meta_context("qemu:dirty-bitmap:a")
h.connect_uri({newer!r})
assert subprocess.run({delete.split()!r}, capture_output=True).returncode == 5
h.shutdown()
"""
    nbdsh(script)
    volume.server.cli("snapshot", "delete", f"{volume.name}@a")


PULL = """
h.add_meta_context("qemu:dirty-bitmap:a")
h.add_meta_context("base:allocation")
h.connect_uri({uri!r})
maps = {{"qemu:dirty-bitmap:a": [], "base:allocation": []}}

def seen(name, offset, entries, error):
    position = offset
    for length, flags in zip(entries[::2], entries[1::2]):
        maps[name].append((position, position + length, flags))
        position += length
    ends[name] = position

offset, size = 0, h.get_size()
while offset < size:
    ends = {{}}
    h.block_status(min(size - offset, 1 << 30), offset, seen)
    offset = min(ends.values())

def is_hole(low, high):
    return any(start <= low and high <= end and flags & 2 for start, end, flags in maps["base:allocation"])

with open({copy!r}, "r+b") as file:
    for start, end, flags in maps["qemu:dirty-bitmap:a"]:
        for low in range(start, min(end, size) if flags & 1 else start, 1 << 20):
            high = min(low + (1 << 20), end, size)
            file.seek(low)
            file.write(bytes(high - low) if is_hole(low, high) else h.pread(high - low, low))
h.shutdown()
"""


@pytest.mark.slow
def test_a_pull_backup_of_1_percent_moves_1_percent(volume: LiveVolume, tmp_path: Path) -> None:
    """As virtnbdbackup and its like do it: the dirty bitmap, then the dirty ranges, byte for byte what `vol@b` is."""
    size = 64 * MIB
    origin = write_stamped(tmp_path / "large.img", size, seed=5)
    volume.server.manage(operations.VOLUME_CREATE, name=f"{volume.name}l", origin=origin)
    large = LiveVolume(volume.server, f"{volume.name}l", origin, volume.transport)
    copy = Path(shutil.copy(origin, tmp_path / "copy.img"))
    large.snapshot("a")
    rng = random.Random(6)
    chunks = rng.sample(range(size // CHUNK), size // CHUNK // 100)
    with Client.connect(large.server.address(large.transport)).go(large.name) as client:
        for chunk in chunks:
            client.write(chunk * CHUNK, rng.randbytes(CHUNK))
    large.snapshot("b")
    expected = Path(shutil.copy(large.origin, tmp_path / "expected.img"))
    qemu_io(large.uri, "write -P 7 0 8M")  # life goes on
    with Wiretap(large.server.address(large.transport), tmp_path / "wire.sock") as wire:
        uri = f"nbd+unix:///{large.name}@b?socket={wire.path}"
        nbdsh(PULL.format(uri=uri, copy=str(copy)))
    changed = len(chunks) * CHUNK
    assert sha256_of_file(copy) == sha256_of_file(expected)
    assert changed <= wire.received <= 1.03 * changed + 4096, "of the whole volume"
    assert wire.received < size // 95
    volume.server.cli("volume", "delete", large.name, "--snapshots")


def test_a_pull_backup_with_qemu_img(volume: LiveVolume, tmp_path: Path) -> None:
    """Each dirty range is an image of its own."""
    copy = Path(shutil.copy(volume.origin, tmp_path / "copy.img"))
    volume.snapshot("a")
    qemu_io(volume.uri, "write -P 1 64k 64k", "write -P 2 5M 1M", "discard 2M 1M")
    newer = volume.snapshot("b")
    for offset, length in changed_by_qemu(volume, f"{volume.name}@b", "qemu:dirty-bitmap:a"):
        part = tmp_path / "part.img"
        file = ",".join(f"file.{option}" for option in qemu_options(volume, f"{volume.name}@b"))
        options = f"driver=raw,offset={offset},size={length},{file}"
        run("qemu-img", "convert", "--image-opts", options, "-O", "raw", part)
        with copy.open("r+b") as file:
            file.seek(offset)
            file.write(part.read_bytes())
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, newer)


def test_the_script_of_the_documentation(volume: LiveVolume, tmp_path: Path) -> None:
    require_client("nbdsh")
    (script,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    program = tmp_path / "incremental.py"
    program.write_text(script)
    copy = Path(shutil.copy(volume.origin, tmp_path / "copy.img"))
    volume.snapshot("monday")
    qemu_io(volume.uri, "write -P 1 0 100", "write -P 2 3M 3M", "discard 7M 1M")
    volume.server.cli("volume", "resize", volume.name, str(9 * MIB))
    newer = volume.snapshot("tuesday")
    server, _, query = volume.server.uri("", volume.transport).partition("?")
    if volume.transport == "unix":  # the query stands behind the export's name
        script = script.replace('f"{server}/{newer}"', f'f"{{server}}/{{newer}}?{query}"')
        assert query in script
        program.write_text(script)
    environment = {**client_environment(), "NBDSNAP_CONFIG": str(volume.server.config)}
    environment["PATH"] = f"{NBDSNAP.parent}:{os.environ['PATH']}"
    names = [f"{volume.name}@monday", f"{volume.name}@tuesday"]
    command = ["/usr/bin/python3", program, server.removesuffix("/"), *names, copy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, newer)
