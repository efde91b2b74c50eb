"""What the management commands print and how they end, with a server and without one."""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path

import pytest

from nbdsnap.cli.main import run
from nbdsnap.client import LOCK_WAIT_S
from nbdsnap.engine.pool import Pool
from tests.unit.conftest import Cli, write_config

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"


# volume


def test_volume_create_makes_a_sparse_file(cli: Cli, tmp_path: Path) -> None:
    assert cli("volume", "create", "new", "--origin", tmp_path / "new.img", "--size", "10GiB").lines == [
        f"new: 10GiB on {tmp_path}/new.img"
    ]
    status = (tmp_path / "new.img").stat()
    assert (status.st_size, status.st_blocks) == (10 << 30, 0)


def test_volume_create_adopts_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "old.img").write_bytes(b"precious" * 1024)
    created = cli("volume", "create", "old", "--origin", tmp_path / "old.img", "--json").json
    assert {"name": "old", "kind": "origin", "size": 8192, "origin": f"{tmp_path}/old.img"}.items() <= created.items()
    assert (tmp_path / "old.img").read_bytes() == b"precious" * 1024


def test_relative_origin_is_relative_to_the_caller(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    created = cli("volume", "create", "new", "--origin", "new.img", "--size", "4096", "--json").json
    assert created["origin"] == f"{tmp_path}/here/new.img"


def test_thin_volumes_and_clones(cli: Cli) -> None:
    assert cli("volume", "create", "thin", "--thin", "--size", "1TiB").lines == ["thin: 1TiB in the pool"]
    cli.write("thin", [0, 4096, 1 << 39])
    assert cli("volume", "show", "thin").lines[-1] == "space:     12KiB of live data"
    cli("snapshot", "create", "thin@a")
    assert cli("clone", "thin@a", "trial").lines == ["trial: 1TiB, a clone of thin@a"]
    made = cli("clone", "thin@a", "other", "--json").json
    assert {"name": "other", "kind": "clone", "size": 1 << 40, "origin": None, "base": "thin@a"}.items() <= made.items()
    assert cli("snapshot", "list", "thin", "--json").json[0]["clones"] == ["other", "trial"]
    assert cli("snapshot", "list", "thin").lines[0].endswith("CLONES")
    assert ["trial", "clone", "1TiB", "0", "0", "over", "thin@a"] in [
        line.split() for line in cli("volume", "list").lines
    ]
    refused = cli("snapshot", "delete", "thin@a", code=5).err
    assert "thin@a has clones: other, trial" in refused
    assert cli("volume", "delete", "other", "--dry-run").lines == ["would delete other"]
    assert cli("volume", "delete", "other").lines == ["deleted other"]
    assert cli("volume", "flatten", "trial").lines == ["trial: 1TiB in the pool"]
    assert "is no clone" in cli("volume", "flatten", "trial", code=2).err
    assert cli("snapshot", "delete", "thin@a").lines == ["deleted thin@a", "freed 0B"]
    assert "beside 24KiB of live data" in cli("status").out
    assert cli("diff", "vol@nix", code=4).err
    assert cli("check", "--data").code == 0


def test_volume_list(cli: Cli, tmp_path: Path) -> None:
    listed = cli("volume", "list", "--json").json
    assert {"name": "vol", "kind": "origin", "size": 1 << 30, "origin": f"{tmp_path}/vol.img"}.items() <= listed[
        0
    ].items()
    cli("volume", "create", "a", "--origin", tmp_path / "a.img", "--size", "4096")
    assert [line.split() for line in cli("volume", "list").lines] == [
        ["NAME", "KIND", "SIZE", "SNAPSHOTS", "CLIENTS", "ORIGIN"],
        ["a", "origin", "4KiB", "0", "0", f"{tmp_path}/a.img"],
        ["vol", "origin", "1GiB", "0", "0", f"{tmp_path}/vol.img"],
    ]


def test_volume_show(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    shown = cli("volume", "show", "vol").lines
    assert shown[0] == "name:      vol"
    assert shown[-1].startswith("vol@a")
    assert [one["name"] for one in cli("volume", "show", "vol", "--json").json["snapshots"]] == ["a"]


def test_volume_delete_keeps_the_file(cli: Cli, tmp_path: Path) -> None:
    result = cli("volume", "delete", "vol", "--dry-run")
    assert result.lines == [f"would delete vol; {tmp_path}/vol.img stays"]
    assert len(cli("volume", "list", "--json").json) == 1
    assert cli("volume", "delete", "vol").lines == [f"deleted vol; {tmp_path}/vol.img stays"]
    assert cli("volume", "list", "--json").json == []
    assert (tmp_path / "vol.img").exists()


def test_volume_delete_with_snapshots(cli: Cli, tmp_path: Path) -> None:
    cli("snapshot", "create", "vol@a")
    cli("snapshot", "create", "vol@b")
    refused = cli("volume", "delete", "vol", code=5)
    assert "2 snapshots" in refused.err
    assert "--snapshots" in refused.err
    assert cli("volume", "delete", "vol", "--snapshots", "-n").lines == [
        f"would delete vol and 2 snapshots; {tmp_path}/vol.img stays"
    ]
    deleted = cli("volume", "delete", "vol", "--snapshots", "--json").json
    assert [one["name"] for one in deleted["snapshots"]] == ["a", "b"]


# snapshot


def test_snapshot_create_and_list(cli: Cli) -> None:
    assert cli("snapshot", "create", "vol@a").lines == ["vol@a"]
    cli.write("vol", [0, 4096])
    (taken,) = cli("snapshot", "create", "vol@b", "--json").json
    assert re.fullmatch(TIME, taken["created"])
    listed = cli("snapshot", "list", "--json").json
    assert [(one["volume"], one["name"], one["size"]) for one in listed] == [
        ("vol", "a", 1 << 30),
        ("vol", "b", 1 << 30),
    ]
    assert {"priority", "held", "exclusive_bytes", "shared_bytes"} <= listed[0].keys()
    title, a, b = (line.split() for line in cli("snapshot", "list", "vol").lines)
    assert title == ["NAME", "CREATED", "SIZE", "EXCLUSIVE", "SHARED", "PRIORITY", "CLIENTS"]
    assert (a[0], b[0]) == ("vol@a", "vol@b")
    assert re.fullmatch(TIME, a[1])


def test_hold_release_and_priority(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    cli("snapshot", "create", "vol@b")
    assert cli("snapshot", "hold", "vol@a", "vol@b").lines == ["held vol@a", "held vol@b"]
    assert "held" in cli("snapshot", "delete", "vol@a", code=5).err
    assert cli("snapshot", "release", "vol@a").lines == ["released vol@a"]
    assert cli("snapshot", "priority", "vol@b", "-5").lines == ["vol@b: priority -5"]
    assert cli("snapshot", "priority", "vol@a", "127", "--json").json["priority"] == 127
    cli("snapshot", "priority", "vol@a", "128", code=2)
    cli("snapshot", "hold", "vol@missing", code=4)
    listed = cli("snapshot", "list", "--json").json
    assert [(one["name"], one["held"], one["priority"]) for one in listed] == [("a", False, 127), ("b", True, -5)]
    assert "-5, held" in cli("snapshot", "list").lines[2]
    cli("snapshot", "delete", "vol@a")


def test_several_snapshots_are_all_or_none(cli: Cli, tmp_path: Path) -> None:
    cli("volume", "create", "two", "--origin", tmp_path / "two.img", "--size", "4096")
    cli("snapshot", "create", "vol@a")
    cli("snapshot", "create", "two@b", "vol@a", code=5)
    cli("snapshot", "create", "two@b", "nix@a", code=4)
    assert [one["name"] for one in cli("snapshot", "list", "--json").json] == ["a"]
    assert cli("snapshot", "create", "two@b", "vol@b").lines == ["two@b", "vol@b"]
    taken = cli("snapshot", "list", "--json").json
    assert taken[1]["created"] == taken[2]["created"]


def test_snapshot_delete(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    cli("snapshot", "create", "vol@b")
    cli.write("vol", [4096])
    cli("snapshot", "delete", "vol@a", "vol@nix", code=4)
    assert cli("snapshot", "delete", "vol@a", "vol@b", "--dry-run").lines == [
        "would delete vol@a",
        "would delete vol@b",
        "would free 0B",  # a hole was preserved: it takes no space
    ]
    assert len(cli("snapshot", "list", "--json").json) == 2
    assert cli("snapshot", "delete", "vol@a", "vol@b", "--json").json == {"names": ["vol@a", "vol@b"], "freed_bytes": 0}
    assert cli("snapshot", "list", "--json").json == []


# diff


def test_diff(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    cli.write("vol", [8192, 12288, 1 << 20])
    cli("snapshot", "create", "vol@b")
    cli.write("vol", [0])
    assert cli("diff", "vol@a", "vol@b", "--json").json == {
        "from": "vol@a",
        "to": "vol@b",
        "bytes": 12288,
        "extents": [{"offset": 8192, "length": 8192}, {"offset": 1 << 20, "length": 4096}],
    }
    assert cli("diff", "vol@b", "--json").json == {
        "from": "vol@b",
        "to": None,
        "bytes": 4096,
        "extents": [{"offset": 0, "length": 4096}],
    }
    assert [line.split() for line in cli("diff", "vol@a").lines] == [
        ["OFFSET", "LENGTH"],
        ["0", "4096"],
        ["8192", "8192"],
        ["1048576", "4096"],
    ]


def test_diff_without_a_change(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    assert cli("diff", "vol@a", "--json").json == {"from": "vol@a", "to": None, "bytes": 0, "extents": []}
    assert cli("diff", "vol@a").out.split() == ["OFFSET", "LENGTH"]


def test_diff_of_many_extents_comes_in_pieces(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    count = 3000
    cli.write("vol", [index * 8192 for index in range(count)])
    extents = cli("diff", "vol@a", "--json").json["extents"]
    assert extents == [{"offset": index * 8192, "length": 4096} for index in range(count)]
    assert len(cli("diff", "vol@a").lines) == count + 1


def test_failed_diff_prints_nothing(cli: Cli) -> None:
    for words in (("vol@nix",), ("vol@nix", "--json")):
        assert cli("diff", *words, code=4).out == ""


# status, check


def test_status(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    cli.write("vol", [0])
    cli("snapshot", "create", "vol@b")
    cli.write("vol", [0])
    shown = cli("status", "--json").json
    assert {"used_bytes", "limit_bytes", "allocated_bytes"} <= shown["store"].keys()
    assert shown["store"]["used_bytes"] == 4096
    assert shown["volumes"][0].keys() >= {"name", "kind", "size", "origin", "snapshots"}
    assert shown["sharing"] == [{"shared_by": 1, "bytes": 4096}]
    lines = cli("status").lines
    assert lines[0] == f"pool:      {cli.pool_path}"
    assert lines[1] == "preserved: 4KiB (limit: none)"
    assert lines[-1].split()[:2] == ["1", "4KiB"]


def test_check(cli: Cli) -> None:
    assert cli("check").lines == ["ok"]
    assert cli("check", "--data", "--json").json == {"ok": True, "problems": []}


def test_check_finds_damage(cli: Cli) -> None:
    cli("snapshot", "create", "vol@a")
    cli.write("vol", [0])
    cli("snapshot", "create", "vol@b")
    cli.write("vol", [0])
    with (cli.pool_path / "store.data").open("r+b") as store:
        store.write(b"damage")
    result = cli("check", "--data", "--json", code=7)
    assert result.json["ok"] is False
    assert {"kind", "detail"} <= result.json["problems"][0].keys()
    assert "checksum" in cli("check", "--data", code=7).out
    assert cli("check").lines == ["ok"]  # its invariants hold


# Errors


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["volume", "show", "nix"], 4, "there is no volume nix"),
        (["volume", "delete", "nix"], 4, "there is no volume nix"),
        (["volume", "show", "no/name"], 2, "'no/name' is no name"),
        (["volume", "create", "vol", "--origin", "/nix"], 5, "vol exists already"),
        (["volume", "create", "new", "--origin", "/nix/nix"], 4, "/nix/nix"),
        (["volume", "create", "new", "--origin", "/nix/nix", "--size", "4K"], 4, "/nix/nix"),
        (["volume", "create", "new", "--origin", "/etc"], 1, "/etc"),
        (["volume", "create", "new", "--origin", "x", "--size", "10Q"], 2, "'10Q' is no size"),
        (["volume", "create", "new", "--origin", "x", "--size", "0"], 2, "at least 1 byte"),
        (["volume", "create", "new"], 2, "either --origin or --thin"),
        (["volume", "create", "new", "--origin", "x", "--thin", "--size", "1M"], 2, "either --origin or --thin"),
        (["volume", "create", "new", "--thin"], 2, "--thin needs --size"),
        (["clone", "vol@nix", "new"], 4, "there is no snapshot vol@nix"),
        (["clone", "vol", "new"], 2, "'vol' is no snapshot"),
        (["volume", "create"], 2, "Missing argument 'NAME'"),
        (["volume", "explode"], 2, "No such command 'explode'"),
        (["volume", "list", "--jsno"], 2, "No such option"),
        (["snapshot", "create"], 2, "Missing argument"),
        (["snapshot", "create", "vol"], 2, "'vol' is no snapshot"),
        (["snapshot", "create", "vol@"], 2, "is no name"),
        (["snapshot", "create", "vol@a@b"], 2, "is no name"),
        (["snapshot", "create", "vol@a", "vol@b"], 2, "named twice"),
        (["snapshot", "create", "nix@a"], 4, "there is no volume nix"),
        (["snapshot", "list", "nix"], 4, "there is no volume nix"),
        (["snapshot", "delete", "vol@nix"], 4, "there is no snapshot vol@nix"),
        (["diff", "vol@nix"], 4, "there is no snapshot vol@nix"),
        (["diff", "vol"], 2, "'vol' is no snapshot"),
    ],
)
def test_errors(cli: Cli, words: list[str], code: int, says: str) -> None:
    result = cli(*words, code=code)
    assert says in result.err
    assert result.out == ""
    assert [one["name"] for one in cli("volume", "list", "--json").json] == ["vol"]


def test_two_volumes_on_one_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "other.img").hardlink_to(tmp_path / "vol.img")
    assert "vol.img" in cli("volume", "create", "new", "--origin", tmp_path / "vol.img", code=5).err
    assert "volume vol" in cli("volume", "create", "new", "--origin", tmp_path / "other.img", code=5).err


def test_volume_resize(cli: Cli, tmp_path: Path) -> None:
    cli("snapshot", "create", "vol@a")
    assert cli("volume", "resize", "vol", "2GiB").out == "vol: 2GiB\n"
    assert cli("volume", "list", "--json").json[0]["size"] == 2 << 30 == (tmp_path / "vol.img").stat().st_size
    assert "--shrink" in cli("volume", "resize", "vol", "1MiB", code=2).err
    assert "--shrink" in cli("volume", "resize", "vol", "1MiB", "--dry-run", code=2).err
    assert cli("volume", "resize", "vol", "1MiB", "--shrink", "--dry-run").out == "vol would have 1MiB\n"
    assert cli("volume", "list", "--json").json[0]["size"] == 2 << 30
    assert cli("volume", "resize", "vol", "1MiB", "--shrink", "--json").json["size"] == 1 << 20
    assert cli("snapshot", "list", "vol", "--json").json[0]["size"] == 1 << 30
    cli("volume", "resize", "nothing", "1MiB", code=4)
    cli("volume", "resize", "vol", "much", code=2)
    cli("volume", "resize", "vol", "0", code=2)


def test_wrong_configuration(local_cli: Cli) -> None:
    local_cli.config.write_text("[sever]\n")
    assert "unknown key" in local_cli("volume", "list", code=3).err


def test_configuration_from_the_environment(
    local_cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NBDSNAP_CONFIG", str(local_cli.config))
    assert run(["volume", "list"]) == 0
    assert "vol" in capsys.readouterr().out
    monkeypatch.setenv("NBDSNAP_CONFIG", "/nix")
    assert run(["volume", "list"]) == 3
    local_cli("volume", "list")  # the option counts for more


def test_no_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = Cli(write_config(tmp_path), capsys)
    assert "nbdsnap serve" in cli("volume", "list", code=4).err
    assert not cli.pool_path.exists()


def test_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = Cli(write_config(tmp_path), capsys)
    cli.pool_path.mkdir()
    (cli.pool_path / "precious").write_text("precious")
    cli("volume", "list", code=1)
    assert [one.name for one in cli.pool_path.iterdir()] == ["precious"]


def test_pool_of_another_process(local_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdsnap.client.LOCK_WAIT_S", 0.0)
    pool = Pool.open(local_cli.pool_path)
    try:
        assert f"process {os.getpid()}" in local_cli("volume", "list", code=5).err
    finally:
        pool.close()


def test_pool_that_is_free_in_a_moment_is_waited_for(local_cli: Cli) -> None:
    pool = Pool.open(local_cli.pool_path)
    timer = threading.Timer(LOCK_WAIT_S / 10, pool.close)
    timer.start()
    local_cli("volume", "list")
    timer.join()


def test_stale_control_socket_means_no_server(local_cli: Cli) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(local_cli.config.parent / "control.sock"))
    assert len(local_cli("volume", "list", "--json").json) == 1
