"""qemu-io: reads, writes, discards and zeroes of any alignment, checked by pattern, before and after snapshots."""

from __future__ import annotations

import pytest

from tests.interop.conftest import MIB, LiveVolume
from tests.support.blocks import stamped
from tests.support.clients import pread, qemu_io, run, sha256_of_file

UNALIGNED = [(0, 1), (1, 511), (4095, 2), (4097, 8191), (65536 - 3, 131072 + 5), (8 * MIB - 1, 1)]
"""Offset and length: within a block, across its ends, the first and the last byte of the volume."""


@pytest.mark.parametrize(("offset", "length"), UNALIGNED)
def test_unaligned_writes_after_a_snapshot(volume: LiveVolume, offset: int, length: int) -> None:
    snapshot = volume.snapshot("a")
    before = volume.origin.read_bytes()
    qemu_io(volume.uri, f"write -P 0xab {offset} {length}", f"read -P 0xab {offset} {length}", "flush")
    expected = before[:offset] + b"\xab" * length + before[offset + length :]
    assert volume.origin.read_bytes() == expected
    assert pread(volume.uri, offset, length) == b"\xab" * length
    assert pread(snapshot, offset, length) == before[offset : offset + length]


@pytest.mark.parametrize("command", ["discard", "write -z", "write -z -u"])
@pytest.mark.parametrize(("offset", "length"), [(MIB, 2 * MIB), (MIB + 1234, 300_001)])
def test_discarded_and_zeroed_ranges_read_as_zeroes(volume: LiveVolume, command: str, offset: int, length: int) -> None:
    original = sha256_of_file(volume.origin)
    before = volume.origin.read_bytes()
    snapshot = volume.snapshot("a")
    qemu_io(volume.uri, f"{command} {offset} {length}", "flush")
    after = volume.origin.read_bytes()
    assert (after[:offset], after[offset + length :]) == (before[:offset], before[offset + length :])
    if command != "discard":  # a discard is advice: what reads back there is not promised
        assert after[offset : offset + length] == bytes(length)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", snapshot, volume.origin.with_suffix(".copy"))
    assert sha256_of_file(volume.origin.with_suffix(".copy")) == original


def test_discard_gives_space_back(volume: LiveVolume) -> None:
    volume.snapshot("a")
    before = volume.origin.stat().st_blocks
    qemu_io(volume.uri, "discard 0 4M", "flush")
    assert volume.origin.stat().st_blocks <= before - 3 * MIB // 512


def test_snapshot_after_each_of_many_writes(volume: LiveVolume) -> None:
    """One chunk, a pattern per snapshot: each keeps its own."""
    for number in range(1, 8):
        qemu_io(volume.uri, f"write -P {number} 64k 10000")
        volume.snapshot(f"s{number}")
    qemu_io(volume.uri, "write -P 0xff 0 1M")
    for number in range(1, 8):
        qemu_io(volume.uri_of(f"s{number}"), f"read -P {number} 64k 10000", read_only=True)
        assert pread(volume.uri_of(f"s{number}"), 65000, 536) == stamped(1, 65000, 536)


def test_many_requests_in_flight(volume: LiveVolume) -> None:
    """64 writes at once over two snapshots, forced to stable storage, then 64 reads at once."""
    volume.snapshot("a")
    qemu_io(volume.uri, *(f"aio_write -f -P {1 + n} {n * 100_000} 70000" for n in range(64)), "aio_flush")
    volume.snapshot("b")
    qemu_io(volume.uri, *(f"aio_write -P {101 + n} {n * 100_000} 70000" for n in range(64)), "aio_flush", "flush")
    qemu_io(volume.uri, *(f"aio_read -P {101 + n} {n * 100_000} 70000" for n in range(64)), "aio_flush")
    qemu_io(
        volume.uri_of("b"),
        *(f"aio_read -P {1 + n} {n * 100_000} 70000" for n in range(64)),
        "aio_flush",
        read_only=True,
    )


def test_a_snapshot_is_not_writable(volume: LiveVolume) -> None:
    snapshot = volume.snapshot("a")
    original = sha256_of_file(volume.origin)
    qemu_io(snapshot, "write -P 1 0 4096", exit_code=1)
    assert sha256_of_file(volume.origin) == original
