"""libnbd's shell without its strict mode: requests that no proper client sends get the right error, and the stream
stays in step: a good request on the same connection works right after each of them."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence

import pytest

from tests.interop.conftest import LiveVolume
from tests.support.blocks import stamped
from tests.support.clients import nbdsh

S = "h.get_size()"
UNKNOWN_FLAG = "1 << 10"

CASES_ON_A_LIVE_VOLUME: list[tuple[str, int | None]] = [
    # beyond the end: wholly, partly, and so far that offset + length overflows
    (f"h.pread(512, {S})", errno.EINVAL),
    (f"h.pread(4096, {S} - 1)", errno.EINVAL),
    ("h.pread(4096, (1 << 63) - 1)", errno.EINVAL),
    ("h.pread(4096, (1 << 64) - 4096)", errno.EINVAL),
    (f"h.pwrite(b'x' * 512, {S})", errno.ENOSPC),
    (f"h.pwrite(b'x' * 70000, {S} - 512)", errno.ENOSPC),
    ("h.pwrite(b'x' * 4096, (1 << 64) - 4096)", errno.ENOSPC),
    (f"h.zero(4096, {S} - 512)", errno.ENOSPC),
    (f"h.trim(4096, {S} - 512)", errno.EINVAL),
    (f"h.cache(4096, {S} - 512)", errno.EINVAL),
    # flags that nobody knows, and flags on commands that they say nothing about
    (f"h.pread(512, 0, {UNKNOWN_FLAG})", errno.EINVAL),
    (f"h.pwrite(b'x' * 512, 0, {UNKNOWN_FLAG})", errno.EINVAL),
    (f"h.trim(512, 0, {UNKNOWN_FLAG})", errno.EINVAL),
    (f"h.zero(512, 0, {UNKNOWN_FLAG})", errno.EINVAL),
    (f"h.cache(512, 0, {UNKNOWN_FLAG})", errno.EINVAL),
    (f"h.flush({UNKNOWN_FLAG})", errno.EINVAL),
    ("h.pwrite(b'x' * 512, 0, nbd.CMD_FLAG_NO_HOLE)", errno.EINVAL),
    ("h.pwrite(b'x' * 512, 0, nbd.CMD_FLAG_REQ_ONE)", errno.EINVAL),
    ("h.trim(512, 0, nbd.CMD_FLAG_FAST_ZERO)", errno.EINVAL),
    ("h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE)", errno.EINVAL),
    ("h.zero(512, 0, nbd.CMD_FLAG_DF)", errno.EINVAL),
    # odd, and fine
    ("h.pread(1, 4095)", None),
    ("h.pread(512, 0, nbd.CMD_FLAG_FUA)", None),
    ("h.flush(nbd.CMD_FLAG_FUA)", None),
    ("h.trim(512, 8192, nbd.CMD_FLAG_FUA)", None),
    ("h.zero(512, 8192, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)", None),
    ("h.cache(512, 8192)", None),
    ("h.pread(0, 0)", None),
    ("h.pwrite(b'', 0)", None),
    ("h.trim(0, 0)", None),
    ("h.zero(0, 0)", None),
    ("h.cache(0, 0)", None),
    (f"h.pread(0, {S})", None),
]

CASES_ON_A_SNAPSHOT: list[tuple[str, int | None]] = [
    ("h.pwrite(b'x' * 70000, 0)", errno.EPERM),
    ("h.zero(4096, 0)", errno.EPERM),
    ("h.trim(4096, 0)", errno.EPERM),
    (f"h.pread(4096, {S} - 1)", errno.EINVAL),
    ("h.flush()", None),
    ("h.cache(4096, 0)", None),
]

SCRIPT = """
import json
from collections.abc import Sequence
h.set_strict_mode(0)
h.set_request_structured_replies({structured})
h.connect_uri({uri!r})
results = []
for case in {cases!r}:
    try:
        eval(case)
        results.append(None)
    except nbd.Error as error:
        results.append(error.errnum)
    assert h.pread(5000, 100000).hex() == {expected!r}, "out of step after " + case
print(json.dumps(results))
h.shutdown()
"""


def outcomes(uri: str, cases: Sequence[tuple[str, int | None]], structured: bool) -> list[tuple[str, int | None]]:
    """What came of each case, one after the other on one connection."""
    script = SCRIPT.format(
        structured=structured, uri=uri, cases=[case for case, _ in cases], expected=stamped(1, 100000, 5000).hex()
    )
    results = json.loads(nbdsh(script))
    return [(case, result) for (case, _), result in zip(cases, results, strict=True)]


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_invalid_requests(volume: LiveVolume, structured: bool) -> None:
    snapshot = volume.snapshot("a")
    assert outcomes(volume.uri, CASES_ON_A_LIVE_VOLUME, structured) == CASES_ON_A_LIVE_VOLUME
    assert outcomes(snapshot, CASES_ON_A_SNAPSHOT, structured) == CASES_ON_A_SNAPSHOT
    with volume.origin.open("rb") as file:
        assert file.read(8192) == stamped(1, 0, 8192)


def test_df_needs_structured_replies(volume: LiveVolume) -> None:
    case = "h.pread(512, 0, nbd.CMD_FLAG_DF)"
    assert outcomes(volume.uri, [(case, None)], structured=True) == [(case, None)]
    assert outcomes(volume.uri, [(case, None)], structured=False) == [(case, errno.EINVAL)]


def test_block_status_needs_a_context(volume: LiveVolume) -> None:
    """Without a negotiated context there is nothing to answer; past the end nothing either."""
    query = "h.block_status(4096, {}, lambda *_: 0)"
    without = [(query.format("0"), errno.EINVAL)]
    assert outcomes(volume.uri, without, structured=True) == without


def test_large_payloads(sparse_volume: LiveVolume) -> None:
    """49.9 MiB and 64 MiB in one request, written over a snapshot and read back whole."""
    sparse_volume.snapshot("a")
    script = f"""
h.connect_uri({sparse_volume.uri!r})
for length in (52323942, 64 << 20):
    data = bytes(range(251)) * (length // 251) + b"e" * (length % 251)
    h.pwrite(data, h.get_size() - length, nbd.CMD_FLAG_FUA)
    assert h.pread(length, h.get_size() - length) == data
h.shutdown()
h = nbd.NBD()
h.connect_uri({sparse_volume.uri_of("a")!r})
assert h.pread(64 << 20, 0) == bytes(64 << 20)
"""
    nbdsh(script)


def test_hundred_requests_in_flight_complete_out_of_order(volume: LiveVolume) -> None:
    """Reads, writes and flushes overlap freely; a shutdown with all of them outstanding loses none."""
    volume.snapshot("a")
    script = f"""
h.connect_uri({volume.uri!r})
done = []
buffers = []
for n in range(100):
    data = bytes([n + 1]) * 30000
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), n * 40000, completion=lambda e: done.append(e.value) or 1)
    buffers.append(nbd.Buffer(30000))
    h.aio_pread(buffers[-1], n * 40000 + 5000000 % 30000, completion=lambda e: done.append(e.value) or 1)
    if n % 10 == 0:
        h.aio_flush(completion=lambda e: done.append(e.value) or 1)
h.aio_disconnect()
while not h.aio_is_closed() and not h.aio_is_dead():
    h.poll(10000)
assert done == [0] * 210, done
g = nbd.NBD()
g.connect_uri({volume.uri!r})
for n in range(100):
    assert g.pread(30000, n * 40000) == bytes([n + 1]) * 30000
"""
    nbdsh(script)


def test_metadata_contexts(volume: LiveVolume) -> None:
    script = f"""
h.add_meta_context("base:allocation")
h.add_meta_context("nonsense:context")
h.connect_uri({volume.uri!r})
assert h.can_meta_context("base:allocation")
assert not h.can_meta_context("nonsense:context")
seen = []
h.block_status(h.get_size(), 0, lambda name, offset, entries, error: seen.append((name, offset, list(entries))))
assert seen == [("base:allocation", 0, [h.get_size(), 0])], seen
one = []
h.block_status(512, 1000, lambda name, offset, entries, error: one.append(list(entries)), nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 1 and one[0][0] == 512, one
"""
    nbdsh(script)
