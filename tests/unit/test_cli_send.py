"""``nbdsnap send`` and ``receive``: files, pipes, tokens and exit codes, with a server and without one."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.cli.main import run
from nbdsnap.errors import InUseError
from nbdsnap.operations import VOLUME_DELETE
from tests.support.deadline import wait_until
from tests.support.server import NBDSNAP, Server, Volume
from tests.unit.conftest import Cli

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def sent(cli: Cli, tmp_path: Path) -> Cli:
    """``vol`` has a and b; ``copy`` is an empty volume of the same size."""
    cli.write("vol", range(0, MIB, 8192))
    cli("snapshot", "create", "vol@a")
    cli.write("vol", range(0, 40960, 4096))
    cli("snapshot", "create", "vol@b")
    cli("volume", "create", "copy", "--origin", tmp_path / "copy.img", "--size", "1GiB")
    return cli


def test_files(sent: Cli, tmp_path: Path) -> None:
    first, second = tmp_path / "a.delta", tmp_path / "b.delta"
    sent("send", "vol@a", "-o", first)
    report = sent("send", "vol@b", "--from", "vol@a", "-o", second, "--json").json
    assert (report["snapshot"], report["base"], report["done"]) == ("vol@b", "vol@a", True)
    assert report["stream_bytes"] == second.stat().st_size
    assert run(["delta", "verify", str(first)]) == 0
    assert sent("receive", "copy", "-i", first).out.startswith("copy@a: ")
    assert sent("receive", "copy", "-i", second, "--json").json["snapshot"] == "copy@b"
    listed = {one["name"]: one["id"] for one in sent("snapshot", "list", "copy", "--json").json}
    assert listed == {one["name"]: one["id"] for one in sent("snapshot", "list", "vol", "--json").json}
    assert sent("check", "--data").lines == ["ok"]
    assert not list(tmp_path.glob(".*.part"))
    assert not list(tmp_path.glob(".s-*")), "no socket is left"


def test_dry_run(sent: Cli) -> None:
    found = sent("send", "vol@b", "--from", "vol@a", "--dry-run", "--json").json
    changed = sent("diff", "vol@a", "vol@b", "--json").json
    assert (found["bytes"], found["extents"], found["stream_bytes"]) == (changed["bytes"], len(changed["extents"]), 0)
    assert "vol@b since vol@a: up to 40KiB" in sent("send", "vol@b", "--from", "vol@a", "-n").out
    assert "all of vol@a" in sent("send", "vol@a", "-n").out


def test_errors(sent: Cli, tmp_path: Path) -> None:
    out = tmp_path / "x.delta"
    sent("send", "vol@nix", "-o", out, code=4)
    sent("send", "vol@a", "--from", "vol@b", "-o", out, code=2)
    sent("send", "vol", "-o", out, code=2)
    sent("send", "-o", out, code=2)
    sent("send", "vol@a", "--resume", "x", "-o", out, code=2)
    sent("send", "--resume", "x", "-o", out, code=2)
    assert not out.exists()
    out.write_bytes(b"")
    assert "nothing came" in sent("receive", "copy", "-i", out, code=1).err
    sent("receive", "copy", "-i", tmp_path / "nix", code=4)
    sent("receive", "copy", "--abort", code=5)
    sent("send", "vol@b", "--from", "vol@a", "-o", out)
    assert "does not have the snapshot" in sent("receive", "copy", "-i", out, code=5).err
    damaged = out.read_bytes()[:-1] + b"\0"
    sent("send", "vol@a", "-o", out)
    sent("receive", "copy", "-i", out)
    (tmp_path / "damaged").write_bytes(damaged)
    sent("receive", "copy", "-i", tmp_path / "damaged", code=7)
    assert [one["name"] for one in sent("snapshot", "list", "copy", "--json").json] == ["a"]


def test_a_new_thin_volume(sent: Cli, tmp_path: Path) -> None:
    sent("send", "vol@a", "-o", tmp_path / "a")
    sent("receive", "new", "-i", tmp_path / "a", code=4)
    sent("receive", "new", "-i", tmp_path / "a", "--create")
    assert sent("volume", "show", "new", "--json").json["kind"] == "thin"


# Real processes


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    source = Server(tmp_path / "a", [Volume("vol", tmp_path / "a.img", SIZE)])
    target = Server(tmp_path / "b", [Volume("vol", tmp_path / "b.img", SIZE)])
    with source, target:
        yield source, target


def fill(server: Server, pattern: int, offset: int, length: int) -> None:
    command = f"write -P {pattern} {offset} {length}"
    subprocess.run(["qemu-io", "-f", "raw", "-c", command, server.uri("vol")], check=True, stdout=subprocess.DEVNULL)


def noise(server: Server, path: Path, length: int) -> None:
    """Incompressible content."""
    path.write_bytes(os.urandom(length))
    command = f"write -s {path} 0 {length}"
    subprocess.run(["qemu-io", "-f", "raw", "-c", command, server.uri("vol")], check=True, stdout=subprocess.DEVNULL)


def pipe(servers: tuple[Server, Server], sending: list[str], receiving: list[str]) -> None:
    source, target = servers
    send = [str(NBDSNAP), "--config", str(source.config), "send", *sending]
    receive = [str(NBDSNAP), "--config", str(target.config), "receive", "vol", *receiving]
    line = f"{shlex.join(send)} | {shlex.join(receive)}"
    subprocess.run(["bash", "-o", "pipefail", "-c", line], check=True, timeout=60)


def compare(servers: tuple[Server, Server], name: str) -> None:
    uris = [server.uri(f"vol@{name}") for server in servers]
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", *uris], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_pipe_between_two_servers(servers: tuple[Server, Server], tmp_path: Path) -> None:
    source, target = servers
    noise(source, tmp_path / "noise", 8 * MIB)
    source.snapshot("vol@a")
    fill(source, 7, 3 * MIB, 100 << 10)
    source.snapshot("vol@b")
    for words in (["vol@a"], ["vol@b", "--from", "vol@a"]):
        pipe(servers, words, [])
    compare(servers, "a")
    compare(servers, "b")
    assert target.json("check", "--data")["ok"]


@pytest.mark.slow
def test_a_sender_that_is_killed_and_goes_on(servers: tuple[Server, Server], tmp_path: Path) -> None:
    """First the command is stopped by a closed pipe, then the server that sends is killed."""
    source, target = servers
    noise(source, tmp_path / "noise", 32 * MIB)
    source.snapshot("vol@a")
    sender = subprocess.Popen(
        [NBDSNAP, "--config", source.config, "send", "vol@a", "--rate-limit", "8MiB"], stdout=subprocess.PIPE
    )
    receiver = subprocess.Popen(
        [NBDSNAP, "--config", target.config, "receive", "vol", "--resume"],
        stdin=sender.stdout,
        stderr=subprocess.PIPE,
    )
    assert sender.stdout is not None
    sender.stdout.close()
    wait_until(lambda: not readable(target), "it receives")
    source.kill()
    assert sender.wait(30) == 1
    _, error = receiver.communicate(timeout=30)
    assert receiver.returncode == 1
    assert b"was cut after" in error and b"send --resume" in error
    token = target.cli("receive", "vol", "--resume").strip()
    assert token.encode() in error
    assert target.json("snapshot", "list") == []
    target.kill()
    target.start()
    source.start()
    pipe(servers, ["--resume", token], ["--resume"])
    compare(servers, "a")
    assert target.json("check", "--data")["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["command", "server"])
def test_a_receiver_that_is_killed_changed_nothing(servers: tuple[Server, Server], tmp_path: Path, victim: str) -> None:
    source, target = servers
    noise(source, tmp_path / "noise", 32 * MIB)
    fill(target, 9, 0, 20 * MIB)
    target.snapshot("vol@mine")
    source.snapshot("vol@a")
    reader, writer = os.pipe()
    receiver = subprocess.Popen(
        [NBDSNAP, "--config", target.config, "receive", "vol"], stdin=reader, stderr=subprocess.PIPE
    )
    os.close(reader)
    sender = subprocess.Popen(
        [NBDSNAP, "--config", source.config, "send", "vol@a", "--rate-limit", "16MiB"], stdout=writer
    )
    os.close(writer)
    wait_until(lambda: not readable(target), "it receives")
    if victim == "server":
        target.kill()
    else:
        receiver.send_signal(signal.SIGKILL)
    receiver.communicate(timeout=30)
    assert receiver.returncode
    assert sender.wait(30) == 1
    if victim == "server":
        target.start()
    wait_until(lambda: readable(target), "what was received is undone")
    assert [one["name"] for one in target.json("snapshot", "list")] == ["mine"]
    pattern = f"read -P 9 0 {20 * MIB}"
    subprocess.run(
        ["qemu-io", "-f", "raw", "-r", "-c", pattern, target.uri("vol")], check=True, stdout=subprocess.DEVNULL
    )
    target.snapshot("vol@later")
    assert target.json("diff", "vol@mine", "vol@later")["bytes"] == 0
    assert target.json("check", "--data")["ok"]


def readable(server: Server) -> bool:
    """Nothing is being received, or undone."""
    try:
        server.manage(VOLUME_DELETE, name="vol", dry_run=True)
    except InUseError as error:
        return "snapshots" in str(error)
    return True
