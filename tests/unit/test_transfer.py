"""Sending from one pool and receiving in another: exact, all or nothing, and resumed where it was cut."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdsnap.delta.choice import Compression
from nbdsnap.delta.format import Encoding, Header, Point
from nbdsnap.engine.device import OpKind
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.engine.receiving import Arrival, Step
from nbdsnap.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    DeltaCutError,
    FormatError,
    InUseError,
    NbdsnapError,
    NoSpaceError,
    NotFoundError,
    UsageError,
    WrongBaseError,
)
from nbdsnap.transfer import receive as receiving
from nbdsnap.transfer import send as sending
from nbdsnap.transfer.receive import arrival, resume_token
from nbdsnap.transfer.token import Token
from tests.support.deltas import encode, events, header, seal, split, stored_extents
from tests.support.device import read, submit, write
from tests.support.enginepool import LOG_SIZE, make_pool
from tests.support.transfers import State, content, received, scribble, sent

SIZE = (4 << 20) + 5 * 4096
IMAGE = "dst.img"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that something is in place when a stream turns out to be bad."""
    monkeypatch.setattr(receiving, "BATCH_BYTES", 64 << 10)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Pool]:
    """Snapshots ``a``, ``b`` and ``c`` of ``src``, and later writes."""
    (tmp_path / "source").mkdir()
    pool = make_pool(tmp_path / "source", ["src"], SIZE)
    for seed, name in enumerate("abc"):
        scribble(pool, "src", seed)
        pool.snapshot_create([f"src@{name}"])
    scribble(pool, "src", 99)
    yield pool
    pool.close()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Pool]:
    pool = make_pool(tmp_path, ["dst"], SIZE)
    yield pool
    pool.close()


def same(source: Pool, target: Pool, *names: str) -> None:
    for name in names:
        assert content(target, f"dst@{name}") == content(source, f"src@{name}"), name
    assert target.check(data=True).problems == []


def names(pool: Pool, volume: str = "dst") -> list[str]:
    return [one.name for one in pool.snapshot_list(volume)]


# What works


@pytest.mark.parametrize("compression", Compression)
def test_whole_and_then_differences(source: Pool, target: Pool, compression: Compression) -> None:
    received(target, "dst", sent(source, "src@a", compression=compression))
    received(target, "dst", sent(source, "src@b", "src@a", compression=compression))
    received(target, "dst", sent(source, "src@c", "src@b", compression=compression))
    same(source, target, "a", "b", "c")
    assert content(target, "dst") == content(source, "src@c")


def test_a_difference_may_skip_snapshots(source: Pool, target: Pool) -> None:
    received(target, "dst", sent(source, "src@a"))
    report = received(target, "dst", sent(source, "src@c", "a"), name="newest")
    assert report.snapshot == "dst@newest"
    assert content(target, "dst@newest") == content(source, "src@c")


def test_identity_and_time_go_along(source: Pool, target: Pool) -> None:
    received(target, "dst", sent(source, "src@a"), name="other")
    there, here = target.snapshot_info("dst@other"), source.snapshot_info("src@a")
    assert (there.id, there.created, there.size) == (here.id, here.created, here.size)
    assert source.find_snapshots(there.id) == ["src@a"]


def test_a_chain_and_back(source: Pool, target: Pool, tmp_path: Path) -> None:
    """A third pool receives from the second, which never was the first; and the first catches up from it."""
    (tmp_path / "third").mkdir()
    third = make_pool(tmp_path / "third", ["dst"], SIZE)
    received(target, "dst", sent(source, "src@a"))
    received(third, "dst", sent(target, "dst@a"))
    received(target, "dst", sent(source, "src@b", "src@a"))
    received(third, "dst", sent(target, "dst@b", "dst@a"))
    same(source, third, "a", "b")
    scribble(third, "dst", 7)
    third.snapshot_create(["dst@new"])
    source.rollback("src@b")
    received(source, "src", sent(third, "dst@new", "dst@b"))
    assert content(source, "src@new") == content(third, "dst@new")
    third.close()


def test_a_volume_in_use_before_is_replaced_whole(source: Pool, target: Pool) -> None:
    scribble(target, "dst", 50)
    target.snapshot_create(["dst@mine"])
    scribble(target, "dst", 51)
    before = content(target, "dst@mine")
    received(target, "dst", sent(source, "src@a"))
    same(source, target, "a")
    assert content(target, "dst") == content(source, "src@a")
    assert content(target, "dst@mine") == before


def test_its_differences_are_known(source: Pool, target: Pool) -> None:
    received(target, "dst", sent(source, "src@a"))
    received(target, "dst", sent(source, "src@b", "src@a"))
    a, b = content(source, "src@a"), content(source, "src@b")
    covered = bytearray(SIZE)
    for extent in target.diff("dst@a", "dst@b"):
        covered[extent.offset : extent.offset + extent.length] = b"\1" * extent.length
    assert all(covered[at] for at in range(SIZE) if a[at] != b[at])
    assert list(target.diff("dst@b")) == []


def test_a_thin_volume_is_made_where_there_is_none(source: Pool, target: Pool) -> None:
    received(target, "new", sent(source, "src@a"), create=True)
    received(target, "new", sent(source, "src@b", "src@a"), create=True)
    assert content(target, "new@a") == content(source, "src@a")
    assert content(target, "new@b") == content(target, "new") == content(source, "src@b")
    assert target.check(data=True).problems == []
    with pytest.raises(NotFoundError):
        received(target, "newer", sent(source, "src@b", "src@a"), create=True)
    with pytest.raises(DeltaCutError):
        received(target, "newer", sent(source, "src@b")[:-1], create=True)
    assert [one.name for one in target.volume_list()] == ["dst", "new"]


def test_into_a_clone(source: Pool, target: Pool) -> None:
    received(target, "dst", sent(source, "src@a"))
    target.clone("dst@a", "copy")
    stream = sent(source, "src@b")
    with pytest.raises(DeltaCutError):
        received(target, "copy", stream[:-1])
    assert content(target, "copy") == content(source, "src@a")
    received(target, "copy", stream)
    assert content(target, "copy@b") == content(source, "src@b")
    same(source, target, "a")


def test_a_clone_is_sent_as_any_other(source: Pool, target: Pool) -> None:
    source.clone("src@b", "copy")
    scribble(source, "copy", 40)
    source.snapshot_create(["copy@x"])
    scribble(source, "copy", 41)
    source.snapshot_create(["copy@y"])
    received(target, "dst", sent(source, "copy@x"))
    received(target, "dst", sent(source, "copy@y", "copy@x"))
    for name in "xy":
        assert content(target, f"dst@{name}") == content(source, f"copy@{name}")


def test_a_larger_target(source: Pool, target: Pool, tmp_path: Path) -> None:
    target.volume_create("big", tmp_path / "big.img", 2 * SIZE)
    scribble(target, "big", 60, writes=80)
    for to, base in (("src@a", None), ("src@b", "src@a")):
        received(target, "big", sent(source, to, base))
    assert content(target, "big@b") == content(source, "src@b")
    assert content(target, "big") == content(source, "src@b").ljust(2 * SIZE, b"\0")


def test_a_volume_that_has_grown_since_its_base(source: Pool, target: Pool, tmp_path: Path) -> None:
    """The stream says nothing of zeroes behind the base's end; the target has something else there."""
    old, new = content(source, "src@a"), content(source, "src@b") + b"grown" + bytes(5000)
    first = header(len(old))
    monday = replace(first, to=Point(uuid.UUID(int=2), "monday", len(old)))  # what the difference names as its base
    frames = encode(old)
    whole = seal(frames, {0: monday.pack()})
    target.volume_create("big", tmp_path / "big.img", len(new))
    received(target, "big", whole)
    device = target.open_device("big")
    write(device, len(new) - 4000, b"old dirt")
    device.close()
    received(target, "big", b"".join(encode(new, old)))
    assert content(target, "big@monday") == old
    assert content(target, "big@tuesday") == content(target, "big") == new


def test_holes_stay_holes(tmp_path: Path, source: Pool, target: Pool) -> None:
    received(target, "dst", sent(source, "src@a"))
    target.settle()
    stored = sum(one.length for one in stored_extents(sent(source, "src@a")) if one.encoding is not Encoding.ZERO)
    assert (tmp_path / IMAGE).stat().st_blocks * 512 <= stored + (64 << 10)


def test_what_was_written_with_the_same_is_not_sent(source: Pool) -> None:
    device = source.open_device("src")
    write(device, 0, content(source, "src")[: 64 << 10])
    device.close()
    source.snapshot_create(["src@d"])
    source.snapshot_create(["src@e"])
    assert len(sent(source, "src@e", "src@d")) < 500
    device = source.open_device("src")
    write(device, 0, content(source, "src")[: 64 << 10])
    device.close()
    source.snapshot_create(["src@f"])
    assert sum(one.length for one in source.diff("src@e", "src@f")) == 64 << 10
    assert len(sent(source, "src@f", "src@e")) < 500


def test_reads_see_the_old_content_until_all_is_there(source: Pool, target: Pool) -> None:
    received(target, "dst", sent(source, "src@a"))
    old = content(target, "dst")
    stream = sent(source, "src@b", "src@a")
    seen = []

    def look(done: int, total: int) -> None:
        seen.append(content(target, "dst") == old)

    begun = target.receive_begin("dst", arrival_of(stream))
    begun.apply([Step(OpKind.WRITE, 0, 4096, b"x" * 4096), Step(OpKind.TRIM, 8192, 1 << 20)])
    assert content(target, "dst") == old
    device = target.open_device("dst")
    with pytest.raises(InUseError, match="is receiving"):
        submit(device, OpKind.WRITE, 0, data=b"y" * 4096).wait()
    assert not device.write_now(0, memoryview(b"y" * 4096))
    device.close()
    for refused in (
        lambda: target.snapshot_create(["dst@x"]),
        lambda: target.rollback("dst@a"),
        lambda: target.volume_delete("dst", snapshots=True),
        lambda: target.receive_begin("dst", arrival_of(stream)),
        lambda: target.receive_abort("dst"),
        lambda: list(target.diff("dst@a")),
    ):
        with pytest.raises(InUseError, match="receiving"):
            refused()
    assert names(target) == ["a"]
    assert [export.name for export in target.exports()] == ["dst", "dst@a"]
    assert target.volume_show("dst").receiving == "b"
    begun.undo()
    assert target.volume_show("dst").receiving is None
    assert content(target, "dst") == old
    received(target, "dst", stream, report=look)
    same(source, target, "a", "b")


def arrival_of(stream: bytes) -> Arrival:
    first = events(stream)[0]
    assert isinstance(first, Header)
    return arrival(first)


# What is refused, with the target as it was


@pytest.fixture
def based(source: Pool, target: Pool, tmp_path: Path) -> State:
    """The target has ``a`` and is to get ``b``."""
    scribble(target, "dst", 70)
    target.snapshot_create(["dst@mine"])
    received(target, "dst", sent(source, "src@a"))
    return State(target, "dst", tmp_path / IMAGE)


def refused(target: Pool, based: State, tmp_path: Path, stream: bytes, error: type[NbdsnapError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        received(target, "dst", stream)
    assert "\n" not in str(caught.value)
    assert State(target, "dst", tmp_path / IMAGE) == based


def test_a_stream_cut_at_every_frame(source: Pool, target: Pool, based: State, tmp_path: Path) -> None:
    stream = sent(source, "src@b", "src@a")
    frames = list(split(stream))
    for count in range(len(frames)):
        start = b"".join(frames[:count])
        for cut in (start, start + frames[count][: len(frames[count]) // 2]):
            refused(target, based, tmp_path, cut, DeltaCutError, "cut after|nothing came")
    received(target, "dst", stream)
    same(source, target, "a", "b")


def test_a_damaged_stream(source: Pool, target: Pool, based: State, tmp_path: Path) -> None:
    stream = sent(source, "src@b", "src@a", compression=Compression.NONE)
    frames = list(split(stream))
    assert len(frames) >= 4
    for number in range(1, len(frames)):
        damaged = bytearray(frames[number])
        damaged[-1] ^= 1
        parts = [*frames[:number], bytes(damaged), *frames[number + 1 :]]
        refused(target, based, tmp_path, b"".join(parts), CorruptionError, "checksum|damaged")
        missing = frames[:number] + frames[number + 1 :]
        expected = DeltaCutError if number == len(frames) - 1 else CorruptionError
        refused(target, based, tmp_path, b"".join(missing), expected, "belongs|first frame|cut after")
    refused(target, based, tmp_path, stream + b"more", CorruptionError, "goes on after its end")
    refused(target, based, tmp_path, stream[:9] + b"\7" + stream[10:], FormatError, "has format 7")
    received(target, "dst", stream)
    same(source, target, "a", "b")


def test_a_stream_whose_end_does_not_fit(source: Pool, target: Pool, based: State, tmp_path: Path) -> None:
    """All of it was in place by then."""
    frames = list(split(sent(source, "src@b", "src@a")))
    forged = list(split(seal(frames)))
    forged[-1] = frames[-1][:-1] + bytes([frames[-1][-1] ^ 1])
    refused(target, based, tmp_path, b"".join(forged), CorruptionError, "checksum")


def test_a_forged_difference(source: Pool, target: Pool, based: State, tmp_path: Path) -> None:
    """It decodes to nothing on this base."""
    old = bytes(SIZE)
    stream = b"".join(encode(b"\1" * SIZE, old))
    refused(target, based, tmp_path, stream, WrongBaseError, "does not have the snapshot")


def test_the_wrong_volume_and_the_wrong_base(source: Pool, target: Pool, based: State, tmp_path: Path) -> None:
    refused(target, based, tmp_path, sent(source, "src@c", "src@b"), WrongBaseError, r"\(src@b, ")
    target.volume_create("other", tmp_path / "other.img", SIZE)
    with pytest.raises(WrongBaseError):
        received(target, "other", sent(source, "src@b", "src@a"))
    assert names(target, "other") == []
    with pytest.raises(NotFoundError):
        received(target, "nix", sent(source, "src@a"))


def test_a_base_written_since(source: Pool, target: Pool, based: State, tmp_path: Path) -> None:
    stream = sent(source, "src@b", "src@a")
    scribble(target, "dst", 80)
    target.snapshot_create(["dst@precious"])
    scribble(target, "dst", 81)
    written = State(target, "dst", tmp_path / IMAGE)
    refused(target, written, tmp_path, stream, WrongBaseError, "was written since dst@a")
    received(target, "dst", stream, force=True)
    same(source, target, "a", "b")
    assert content(target, "dst@precious") == written.contents["precious"]


def test_a_base_written_and_restored_counts_as_unchanged(source: Pool, target: Pool, based: State) -> None:
    scribble(target, "dst", 80)
    target.rollback("dst@a")
    received(target, "dst", sent(source, "src@b", "src@a"))
    same(source, target, "a", "b")


def test_a_smaller_target(source: Pool, target: Pool, tmp_path: Path) -> None:
    target.volume_create("small", tmp_path / "small.img", SIZE - 1)
    with pytest.raises(ConflictError, match="and the snapshot"):
        received(target, "small", sent(source, "src@a"))
    assert content(target, "small") == bytes(SIZE - 1)


def test_a_name_that_is_taken(source: Pool, target: Pool, based: State, tmp_path: Path) -> None:
    stream = sent(source, "src@b", "src@a")
    with pytest.raises(AlreadyExistsError, match="dst@mine exists"):
        received(target, "dst", stream, name="mine")
    with pytest.raises(UsageError):
        received(target, "dst", stream, name="../x")
    assert State(target, "dst", tmp_path / IMAGE) == based


def test_a_busy_target(source: Pool, target: Pool, based: State) -> None:
    stream = sent(source, "src@b", "src@a")
    device = target.open_device("dst")
    with pytest.raises(InUseError, match="is open: 1 connections"):
        received(target, "dst", stream)
    assert read(device, 0, SIZE) == based.live
    received(target, "dst", stream, force=True)
    assert read(device, 0, SIZE) == content(source, "src@b")
    device.close()


def test_a_full_store(source: Pool, tmp_path: Path) -> None:
    """There is no room for what the target's snapshots need of what would be overwritten."""
    options = PoolOptions(log_size=LOG_SIZE, store_limit=32 << 10)
    target = Pool.open(tmp_path / "tight", options, create=True)
    target.volume_create("dst", tmp_path / "tight.img", SIZE)
    scribble(target, "dst", 5)
    target.snapshot_create(["dst@mine"])
    before = State(target, "dst", tmp_path / "tight.img")
    with pytest.raises((NoSpaceError, OSError)):
        received(target, "dst", sent(source, "src@c"))
    assert State(target, "dst", tmp_path / "tight.img") == before
    assert target.check(data=True).ok
    target.close()


def test_what_can_not_be_sent(source: Pool) -> None:
    for to, base, error in (
        ("src@nix", None, NotFoundError),
        ("src", None, UsageError),
        ("nix@a", None, NotFoundError),
        ("src@a", "src@b", UsageError),
        ("src@b", "src@nix", NotFoundError),
        (None, None, UsageError),
    ):
        with pytest.raises(error):
            sent(source, to, base)


def test_what_is_sent_is_in_use(source: Pool) -> None:
    with sending.Sender(source, sending.select(source, "src@b", "src@a", None)):
        for name in "ab":
            with pytest.raises(InUseError):
                source.snapshot_delete([f"src@{name}"])
    source.snapshot_delete(["src@a", "src@b"])


# Cut, killed, resumed


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "CHECKPOINT_BYTES", 256 << 10)
    monkeypatch.setattr(sending, "JOB_BYTES", 128 << 10)


def cut_late(stream: bytes) -> bytes:
    """Behind some checkpoint, in the middle of a frame."""
    frames = list(split(stream))
    kinds = [frame[0] for frame in frames[1:]]
    last = len(kinds) - 1 - kinds[::-1].index(3)
    return b"".join(frames[: last + 2]) + frames[last + 2][:-10]


@pytest.mark.parametrize("base", [None, "src@a"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_cut_stream_is_resumed(
    source: Pool, target: Pool, based: State, tmp_path: Path, checkpoints: None, base: str | None, restart: bool
) -> None:
    stream = sent(source, "src@b", base)
    with pytest.raises(DeltaCutError, match="cut after") as caught:
        received(target, "dst", cut_late(stream), resumable=True)
    token = resume_token(target, "dst")
    assert token is not None and token in caught.value.advice
    assert Token.decode(token).position > 0
    if restart:
        target.close()
        reopened = Pool.open(tmp_path / "pool", PoolOptions(log_size=LOG_SIZE))
        for name, value in vars(reopened).items():
            setattr(target, name, value)  # the fixture closes it
    assert content(target, "dst") == based.live
    assert sorted(names(target)) == ["a", "mine"]
    with pytest.raises(InUseError, match="receiving"):
        target.snapshot_create(["dst@x"])
    rest = sent(source, None, resume=token)
    assert len(rest) < len(stream)
    received(target, "dst", rest, resumable=True)
    same(source, target, "a", "b")
    assert content(target, "dst") == content(source, "src@b")
    assert content(target, "dst@mine") == based.contents["mine"]
    assert resume_token(target, "dst") is None


def test_what_was_cut_can_be_given_up(
    source: Pool, target: Pool, based: State, tmp_path: Path, checkpoints: None
) -> None:
    with pytest.raises(DeltaCutError):
        received(target, "dst", cut_late(sent(source, "src@b", "src@a")), resumable=True)
    target.receive_abort("dst")
    assert State(target, "dst", tmp_path / IMAGE) == based
    with pytest.raises(ConflictError, match="not begun"):
        target.receive_abort("dst")
    received(target, "dst", sent(source, "src@b", "src@a"))


def test_a_stream_from_the_beginning_replaces_what_was_cut(
    source: Pool, target: Pool, based: State, checkpoints: None
) -> None:
    with pytest.raises(DeltaCutError):
        received(target, "dst", cut_late(sent(source, "src@b")), resumable=True)
    received(target, "dst", sent(source, "src@b", "src@a"))
    same(source, target, "a", "b")


def test_only_the_right_rest_is_taken(
    source: Pool, target: Pool, based: State, tmp_path: Path, checkpoints: None
) -> None:
    stream = sent(source, "src@c", "src@a")
    with pytest.raises(DeltaCutError):
        received(target, "dst", cut_late(stream), resumable=True)
    token = Token.decode(resume_token(target, "dst") or "")
    other = Token(source.snapshot_info("src@b").id, token.base, token.position, token.digest)
    earlier = Token(token.to, token.base, token.position - 4096, token.digest)
    forged = Token(token.to, token.base, token.position, "00" * 32)
    for wrong in (other, earlier, forged):
        with pytest.raises(ConflictError, match=r"go on with|goes on at"):
            received(target, "dst", sent(source, None, resume=wrong.encode()), resumable=True)
    assert resume_token(target, "dst") == token.encode()
    received(target, "dst", sent(source, None, resume=token.encode()))
    same(source, target, "a", "c")
    with pytest.raises(ConflictError, match="nothing of an earlier stream"):
        received(target, "dst", sent(source, None, resume=token.encode()))


def test_a_token_is_text_that_is_checked(source: Pool) -> None:
    for text in ("", "x", "!!!", "e30", "bnVsbA", "W10", "a" * 5000):
        with pytest.raises(UsageError):
            Token.decode(text)
    token = Token("00000000-0000-0000-0000-000000000009", None, 5, "")
    assert Token.decode(token.encode()) == token
    with pytest.raises(NotFoundError, match="not here any more"):
        sent(source, None, resume=token.encode())


CHILD = """
import os, sys
from pathlib import Path
from nbdsnap.engine.device import OpKind
from nbdsnap.engine.pool import Pool, PoolOptions
from nbdsnap.engine.receiving import Arrival, Step
from nbdsnap.engine.receiving import Receive, Receives
from nbdsnap.transfer import receive
from tests.support.transfers import received
folder, kind, resumable = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
pool = Pool.open(folder / "pool", PoolOptions(log_size=1 << 20))
receive.BATCH_BYTES = 64 << 10
def die(*_):
    os._exit(9)
def die_after(cls, name, after):
    original = getattr(cls, name)
    def call(*args):
        original(*args)
        die()
    setattr(cls, name, call if after else die)
if kind == "begun":
    die_after(Receive, "clear_tail", True)
elif kind == "applied":
    die_after(Receive, "apply", True)
elif kind == "checkpoint":
    die_after(Receive, "checkpoint", True)
elif kind == "ending":
    die_after(Receive, "finish", False)
elif kind == "undoing":
    die_after(type(pool._rollbacks), "_apply", True)
elif kind == "ended":
    die_after(Receive, "finish", True)
received(pool, "dst", (folder / "stream").read_bytes(), resumable=resumable)
os._exit(0)
"""


KILLS = [
    (kind, resumable, blank)
    for kind in ("begun", "applied", "checkpoint", "ending", "undoing", "ended")
    for resumable in (False, True)
    for blank in (False, True)
    if not (kind == "checkpoint" and not resumable)  # only a resumable one notes how far it came
    if not (kind == "undoing" and (resumable or blank))  # nothing is rolled back there
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "resumable", "blank"), KILLS)
def test_a_killed_receive_is_undone_or_resumed(
    source: Pool, tmp_path: Path, checkpoints: None, kind: str, resumable: bool, blank: bool
) -> None:
    target = make_pool(tmp_path, ["dst"], SIZE)
    if not blank:
        scribble(target, "dst", 70)
        target.snapshot_create(["dst@mine"])
        received(target, "dst", sent(source, "src@a"))
    before = State(target, "dst", tmp_path / IMAGE)
    target.close()
    stream = sent(source, "src@c", None if blank else "src@a")
    if kind == "undoing":
        stream = stream[:-1] + bytes([stream[-1] ^ 1])
    (tmp_path / "stream").write_bytes(stream)
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path, kind, str(resumable)], cwd=Path(__file__).parents[2])
    assert child.returncode == 9
    target = Pool.open(tmp_path / "pool", PoolOptions(log_size=LOG_SIZE))
    try:
        assert target.check(data=True).problems == []
        if kind == "ended":
            assert content(target, "dst@c") == content(target, "dst") == content(source, "src@c")
            return
        if not resumable:
            assert State(target, "dst", tmp_path / IMAGE) == before
            received(target, "dst", sent(source, "src@c", None if blank else "src@a"))
        else:
            assert content(target, "dst") == before.live
            token = resume_token(target, "dst")
            assert token is not None
            received(target, "dst", sent(source, None, resume=token), resumable=True)
        same(source, target, "c")
        assert content(target, "dst") == content(source, "src@c")
    finally:
        target.close()
