"""Servers that follow each other: real processes, real TLS, real cuts and kills."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from nbdsnap.operations import REPLICATE_STATUS
from tests.support.deadline import wait_until
from tests.support.replicas import (
    MIB,
    SIZE,
    Network,
    accept,
    compare,
    free_port,
    make_certificates,
    names,
    node,
    replicate,
    run,
    section,
    status,
    write,
)
from tests.support.server import Server

pytestmark = pytest.mark.slow

STORM_S = float(os.environ.get("NBDSNAP_STORM_S", "8"))
STORM_SEED = int(os.environ.get("NBDSNAP_STORM_SEED", "1"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls") / "ca", "alpha", "beta", "mallory")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pair(
    stack: ExitStack, tmp_path: Path, certificates: Path, keys: str = "", every: str = "1h"
) -> tuple[Server, Server]:
    """``a``, whose volume is followed by ``b``."""
    b = stack.enter_context(node(tmp_path / "b", section(certificates, "beta", port=0) + accept("alpha")))
    sections = section(certificates, "alpha") + replicate(b.replication_port, keys=keys, every=every)
    a = stack.enter_context(node(tmp_path / "a", sections, volume=True))
    return a, b


def test_a_replica_follows(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    a, b = pair(stack, tmp_path, certificates, keys="keep = 2")
    write(a, 1, 0, 5 * MIB)
    assert run(a).error is None
    for generation in range(4):
        write(a, 10 + generation, generation * MIB, MIB)
        done = run(a)
        assert (done.state, done.error, done.lag_bytes, done.lag_seconds) == ("idle", None, 0, 0.0)
        compare(a, b, "vol", f"vol@{done.snapshot}")
    assert names(a) == [done.snapshot], "older ones are deleted here"
    assert len(names(b)) == 2 and done.snapshot in names(b), "and all but two there"
    assert done.sent_bytes < 2 * MIB
    assert run(a).sent_snapshots == done.sent_snapshots, "nothing was written, nothing is sent"
    write(a, 99, 0, 3 * MIB)
    behind = status(a)
    assert behind.lag_bytes == 3 * MIB and behind.lag_seconds is not None and behind.lag_seconds > 0
    assert b.json("check", "--data")["ok"] and a.json("check", "--data")["ok"]


def test_snapshots_of_users_go_along(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    a, b = pair(stack, tmp_path, certificates, keys="keep = 1")
    write(a, 1, 0, MIB)
    run(a)
    for name in ("monday", "tuesday"):
        write(a, 7, len(name) * MIB, MIB)
        a.snapshot(f"vol@{name}")
    write(a, 8, 0, MIB)
    last = run(a).snapshot
    assert sorted(names(b)) == sorted(["monday", "tuesday", str(last)])
    compare(a, b, "vol@monday", "vol@tuesday", f"vol@{last}", "vol")


def test_a_replica_takes_no_writes_until_it_is_promoted(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    a, b = pair(stack, tmp_path, certificates)
    write(a, 1, 0, MIB)
    last = run(a).snapshot
    assert [one["replica"] for one in b.json("volume", "list")] == [True]
    with pytest.raises(subprocess.CalledProcessError):
        write(b, 2, 0, MIB)
    b.cli("clone", f"vol@{last}", "copy")
    write(b, 2, 0, MIB, volume="copy")
    b.cli("volume", "promote", "vol")
    write(b, 3, 0, MIB)
    write(a, 4, 0, MIB)
    failed = run(a)
    assert failed.error is not None and "is no replica" in failed.error
    a.cli("replicate", "status", exit_code=1)
    assert "is no replica" in a.cli("replicate", "status", "--json", exit_code=1)
    a.cli("replicate", "run", "vol", "--wait", exit_code=1)
    assert len(names(a)) <= 2, "failures leave nothing behind"
    b.cli("volume", "demote", "vol")
    assert run(a).error is None
    compare(a, b, "vol")


def test_roles_are_turned_around_without_a_full_copy(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    ports = free_port(), free_port()
    sections = [
        section(certificates, mine, port=ports[here]) + replicate(ports[1 - here]) + accept(theirs)
        for here, (mine, theirs) in enumerate((("alpha", "beta"), ("beta", "alpha")))
    ]
    b = stack.enter_context(node(tmp_path / "b", sections[1]))
    a = stack.enter_context(node(tmp_path / "a", sections[0], volume=True))
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(16 * MIB))
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", f"write -s {noise} 0 16M", a.uri("vol", "unix")], check=True, capture_output=True
    )
    assert run(a).error is None
    write(a, 5, 20 * MIB, MIB)  # is lost with a
    a.kill()
    b.cli("volume", "promote", "vol")
    write(b, 6, 2 * MIB, MIB)
    b.snapshot("vol@after")
    a.start()
    assert run(b).error is not None
    a.snapshot("vol@lost")
    a.cli("volume", "demote", "vol")
    done = run(b)
    assert done.error is None
    assert done.sent_bytes < 2 * MIB, "a delta, not all of it"
    compare(a, b, "vol", "vol@after")
    subprocess.run(
        ["qemu-io", "-f", "raw", "-r", "-c", "read -P 5 20M 1M", a.uri("vol@lost", "unix")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with pytest.raises(subprocess.CalledProcessError):
        write(a, 2, 0, MIB)


def test_a_chain(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    c = stack.enter_context(node(tmp_path / "c", section(certificates, "mallory", port=0) + accept("beta")))
    middle = section(certificates, "beta", port=0) + accept("alpha") + replicate(c.replication_port)
    b = stack.enter_context(node(tmp_path / "b", middle))
    sections = section(certificates, "alpha") + replicate(b.replication_port, keys="keep = 1")
    a = stack.enter_context(node(tmp_path / "a", sections, volume=True))
    for generation in range(3):
        write(a, generation + 1, generation * MIB, 2 * MIB)
        last = run(a).snapshot
        done = run(b)
        assert (done.error, done.snapshot) == (None, last)
        compare(a, c, "vol", f"vol@{last}")
    assert c.json("check", "--data")["ok"]


def test_several_targets(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    others = [
        stack.enter_context(node(tmp_path / name, section(certificates, "beta", port=0) + accept("alpha")))
        for name in ("b", "c")
    ]
    sections = section(certificates, "alpha") + "".join(replicate(other.replication_port) for other in others)
    a = stack.enter_context(node(tmp_path / "a", sections, volume=True))
    write(a, 1, 0, MIB)
    a.cli("replicate", "run", "--wait")
    others[1].stop()
    write(a, 2, 0, MIB)
    a.cli("replicate", "run", "--wait", exit_code=1)
    write(a, 3, 0, MIB)
    a.cli("replicate", "run", "--wait", exit_code=1)
    compare(a, others[0], "vol")
    common = {one.snapshot for one in a.manage(REPLICATE_STATUS)}
    assert len(common) == 2 and common <= set(names(a)), "what the other one has stays"
    others[1].start()


def test_who_may_not(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    stranger = make_certificates(tmp_path / "other", "alpha")
    b = stack.enter_context(
        node(tmp_path / "b", section(certificates, "beta", port=0) + accept("alpha", create=False, volumes="[!v]*"))
    )
    for number, (folder, name, message) in enumerate(
        [
            (certificates, "alpha", "may not replicate to volume vol"),
            (certificates, "mallory", "may not replicate to volume vol"),
            (stranger, "alpha", "certificate verify failed"),
        ]
    ):
        sections = section(folder, name) + replicate(b.replication_port)
        with node(tmp_path / f"a{number}", sections, volume=True) as a:
            found = run(a)
            assert found.error is not None and message in found.error, found.error
            assert names(a) == []
    with pytest.raises(httpx.HTTPError):  # without any certificate
        httpx.get(f"https://127.0.0.1:{b.replication_port}/v1/replica/vol", verify=False)
    assert b.json("volume", "list") == []


def test_a_volume_with_content_of_its_own_is_left_alone(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    b = stack.enter_context(node(tmp_path / "b", section(certificates, "beta", port=0) + accept("alpha"), volume=True))
    sections = section(certificates, "alpha") + replicate(b.replication_port)
    a = stack.enter_context(node(tmp_path / "a", sections, volume=True))
    write(b, 9, 0, MIB)
    write(a, 1, 0, MIB)
    found = run(a)
    assert found.error is not None and "is no replica" in found.error
    subprocess.run(
        ["qemu-io", "-f", "raw", "-r", "-c", "read -P 9 0 1M", b.uri("vol", "unix")], check=True, capture_output=True
    )


@pytest.mark.parametrize("full", [False, True])
def test_a_lost_base(stack: ExitStack, tmp_path: Path, certificates: Path, full: bool) -> None:
    a, b = pair(stack, tmp_path, certificates, keys="full = true" if full else "")
    write(a, 1, 0, MIB)
    run(a)
    a.snapshot("vol@mine")
    b.cli("volume", "promote", "vol")
    b.snapshot("vol@other")
    b.cli("snapshot", "delete", *(f"vol@{name}" for name in names(b) if name != "other"))
    b.cli("volume", "demote", "vol")
    write(a, 2, MIB, MIB)
    found = run(a)
    if full:
        assert found.error is None
        compare(a, b, "vol")
        return
    assert found.error is not None and "no snapshot in common" in found.error


def test_a_volume_that_grows(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    a, b = pair(stack, tmp_path, certificates)
    write(a, 1, 0, MIB)
    run(a)
    a.cli("volume", "resize", "vol", str(SIZE + 4 * MIB))
    write(a, 2, SIZE - MIB, 3 * MIB)
    assert run(a).error is None
    assert [one["size"] for one in b.json("volume", "list")] == [SIZE + 4 * MIB]
    compare(a, b, "vol")


def test_metrics(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    a, b = pair(stack, tmp_path, certificates)
    write(a, 1, 0, MIB)
    run(a)
    write(a, 2, 0, MIB)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(a.control))) as client:
        text = client.get("http://nbdsnap/metrics").text
    labels = f'{{target="https://127.0.0.1:{b.replication_port}",volume="vol"}}'
    assert f"nbdsnap_replication_lag_bytes{labels} 1.048576e+06" in text
    assert f"nbdsnap_replication_sent_snapshots_total{labels} 1.0" in text
    assert b.manage(REPLICATE_STATUS) == []


def test_a_transfer_that_is_cut_goes_on_where_it_was(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    """Past its first checkpoint; the target is killed, too."""
    size = 120 * MIB
    port = free_port()
    network = Network(port)
    stack.callback(network.close)
    b = stack.enter_context(node(tmp_path / "b", section(certificates, "beta", port=port) + accept("alpha")))
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "vol.img").open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    sections = section(certificates, "alpha") + replicate(network.port, keys='rate_limit = "60MiB"')
    a = stack.enter_context(node(tmp_path / "a", sections, volume=True, size=size))
    wait_until(lambda: status(a).done > 80 * MIB, "most of it to be sent", timeout_s=60)
    network.cut()
    wait_until(lambda: status(a).error, "the cut to be noticed", timeout_s=60)
    assert names(b) == []
    b.kill()
    b.start()
    network.mend()
    wait_until(lambda: run(a).error is None, "the rest", timeout_s=60)
    done = status(a)
    assert done.sent_bytes < 70 * MIB, "the rest only"
    assert names(b) == [done.snapshot]
    compare(a, b, "vol", f"vol@{done.snapshot}")


@pytest.mark.skipif("NBDSNAP_STORM_S" not in os.environ, reason="by hand: NBDSNAP_STORM_S is how long, in seconds")
def test_a_storm(stack: ExitStack, tmp_path: Path, certificates: Path) -> None:
    """Random load, replication every second, the network cut and both servers killed at random: each snapshot that the
    replica has is the source's, byte for byte; and in the end it has all."""
    rng = random.Random(STORM_SEED)
    print(f"seed {STORM_SEED}, {STORM_S:g} s: NBDSNAP_STORM_SEED, NBDSNAP_STORM_S")
    port = free_port()
    network = Network(port)
    stack.callback(network.close)
    b = stack.enter_context(node(tmp_path / "b", section(certificates, "beta", port=port) + accept("alpha")))
    sections = section(certificates, "alpha") + replicate(
        network.port, every="1s", keys='keep = 3\nrate_limit = "24MiB"'
    )
    a = stack.enter_context(node(tmp_path / "a", sections, volume=True))
    taken = 0
    end = time.monotonic() + STORM_S
    while time.monotonic() < end:
        for _ in range(rng.randrange(1, 4)):
            length = rng.choice([4096, 64 << 10, MIB, 3 * MIB])
            write(a, rng.randrange(256), rng.randrange(0, SIZE - length, 4096), length)
        if rng.random() < 0.5:
            taken += 1
            a.snapshot(f"vol@s{taken}")
        match rng.randrange(8):
            case 0:
                network.cut()
                time.sleep(rng.random() / 2)
                network.mend()
            case 1:
                b.kill()
                b.start()
            case 2:
                a.kill()
                a.start()
            case _:
                time.sleep(rng.random() / 4)
    wanted = {f"s{number}" for number in range(1, taken + 1)}
    wait_until(lambda: run(a).error is None, "the storm to be over", timeout_s=60)
    assert wanted <= set(names(b))
    last = status(a).snapshot
    compare(a, b, "vol", f"vol@{last}", *(f"vol@{name}" for name in sorted(wanted)))
    assert a.json("check", "--data")["ok"] and b.json("check", "--data")["ok"]
