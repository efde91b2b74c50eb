"""``nbdsnap serve`` that can't start: one clear error, the right exit code, nothing changed on disk.  One that can."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdsnap.engine.pool import Pool
from nbdsnap.store.fileio import FileIO
from nbdsnap.store.index import Index
from nbdsnap.store.pagesums import write_sums
from tests.support.clients import require_client
from tests.support.enginepool import make_pool
from tests.support.server import NBDSNAP, Server, Volume

pytestmark = pytest.mark.slow  # each starts a process

TIMEOUT_S = 30.0


def write_config(
    folder: Path, *volumes: Volume, listen: str = "tcp://127.0.0.1:0", control: str = "control.sock"
) -> Path:
    config = folder / "nbdsnap.toml"
    config.write_text(
        f'[server]\nlisten = ["{listen}"]\ncontrol = "{control}"\n[pool]\npath = "pool"\n'
        + "".join(volume.toml() for volume in volumes)
    )
    return config


def content(folder: Path) -> dict[str, str]:
    """Every name below a folder, with its kind and content.  A lock holds nothing that outlives its process."""

    def describe(path: Path) -> str:
        if path.is_symlink():
            return f"link to {path.readlink()}"
        if not path.is_file():
            return oct(path.stat().st_mode)
        with path.open("rb") as file:
            return f"{path.stat().st_blocks} {hashlib.file_digest(file, 'sha256').hexdigest()}"

    names = (path for path in sorted(folder.rglob("*")) if path.name not in ("lock", "index.mdb-lock"))
    return {str(path.relative_to(folder)): describe(path) for path in names}


def refused(config: Path, code: int, *says: str, prefix: tuple[str, ...] = ()) -> None:
    """The server must not start, say why in one or two lines, and leave everything as it was."""
    before = content(config.parent)
    done = subprocess.run(
        [*prefix, NBDSNAP, "--config", config, "serve"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout == ""
    assert 1 <= len(done.stderr.splitlines()) <= 2, done.stderr
    for word in says:
        assert word in done.stderr
    assert content(config.parent) == before


@pytest.fixture(params=["new pool", "old pool"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Without a pool, and with one that has been used."""
    if request.param == "old pool":
        make_pool(tmp_path, ["old"], 1 << 20).close()
    return tmp_path


# Configuration and origins


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[sever]", "sever: unknown key"),
        ("[server]\nlisten = 5", "[server] listen: 5 does not fit"),
        ('[[volume]]\nname = "a b"\norigin = "x"', "'a b' is no name"),
        ('[[volume]]\nname = "a"\norigin = "x"\nsize = "1Q"', "'1Q' is no size"),
        ('[[volume]]\nname = "a"\norigin = "x"\n[[volume]]\nname = "b"\norigin = "./x"', "is the origin of"),
        ('[[volume]]\nname = "a"\norigin = "x"\n[[volume]]\nname = "a"\norigin = "y"', "distinct names"),
    ],
)
def test_configuration(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "nbdsnap.toml").write_text(text)
    refused(tmp_path / "nbdsnap.toml", 3, says, str(tmp_path / "nbdsnap.toml"))


def test_missing_origin(folder: Path) -> None:
    refused(write_config(folder, Volume("vol", folder / "nix.img")), 4, str(folder / "nix.img"))


def test_second_origin_is_missing(folder: Path) -> None:
    good = Volume("good", folder / "good.img", 1 << 20)
    refused(write_config(folder, good, Volume("vol", folder / "nix.img")), 4, str(folder / "nix.img"))


def test_origin_in_a_missing_folder(folder: Path) -> None:
    refused(write_config(folder, Volume("vol", folder / "nix" / "vol.img", 1 << 20)), 4, "nix")


def test_folder_as_origin(folder: Path) -> None:
    (folder / "vol.img").mkdir()
    refused(write_config(folder, Volume("vol", folder / "vol.img")), 1, str(folder / "vol.img"))


def test_unreadable_origin(folder: Path) -> None:
    require_client("setpriv")
    (folder / "vol.img").write_bytes(bytes(4096))
    (folder / "vol.img").chmod(0)
    powers = "-dac_override,-dac_read_search"  # root's, to read what it may not
    prefix = ("setpriv", "--inh-caps", powers, "--bounding-set", powers) if os.geteuid() == 0 else ()
    refused(write_config(folder, Volume("vol", folder / "vol.img")), 1, str(folder / "vol.img"), prefix=prefix)


def test_origin_of_another_size(folder: Path) -> None:
    (folder / "vol.img").write_bytes(bytes(8192))
    refused(write_config(folder, Volume("vol", folder / "vol.img", 4096)), 1, "8192 bytes, not 4096")


def test_origin_of_a_volume_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    make_pool(tmp_path, ["old"]).close()
    refused(write_config(tmp_path, Volume("vol", tmp_path / "old.img")), 5, "old.img", "volume old")


def test_another_origin_than_before(tmp_path: Path) -> None:
    make_pool(tmp_path, ["vol"]).close()
    (tmp_path / "other.img").write_bytes(bytes(4096))
    refused(write_config(tmp_path, Volume("vol", tmp_path / "other.img")), 1, "vol.img", "other.img")


def test_origin_cut_short(tmp_path: Path) -> None:
    make_pool(tmp_path, ["vol"]).close()
    os.truncate(tmp_path / "vol.img", 4096)
    refused(write_config(tmp_path, Volume("vol", tmp_path / "vol.img")), 1, "4096 bytes", "vol.img")


def test_origin_cut_short_of_a_volume_beside_others(tmp_path: Path) -> None:
    """Not named in the configuration: the others are served, and this one's trouble is shown."""
    make_pool(tmp_path, ["cut", "vol"]).close()
    os.truncate(tmp_path / "cut.img", 4096)
    with Server(tmp_path) as server:
        cut, vol = server.json("volume", "list")
        assert "4096 bytes" in cut["error"]
        assert vol["error"] is None
        assert "4096 bytes" in server.cli("volume", "list")
        assert "cut" in server.stderr()
        server.snapshot("vol@a")
        server.cli("snapshot", "create", "cut@a", exit_code=1)


# Sockets


def test_port_in_use(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        config = write_config(folder, Volume("vol", folder / "vol.img", 1 << 20), listen=f"tcp://{address}")
        refused(config, 5, address)


def test_unknown_host(folder: Path) -> None:
    refused(write_config(folder, listen="tcp://host.invalid:1"), 1, "host.invalid")


@pytest.fixture(params=["listen", "control"])
def socket_config(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A configuration whose listener, or control socket, is ``folder/s``."""
    volume = Volume("vol", folder / "vol.img", 1 << 20)
    if request.param == "listen":
        return write_config(folder, volume, listen="unix://s")
    return write_config(folder, volume, control="s")


def test_live_socket(socket_config: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(socket_config.parent / "s"))
        other.listen()
        refused(socket_config, 5, str(socket_config.parent / "s"), "another process listens there")


def test_foreign_file_in_the_sockets_place(socket_config: Path) -> None:
    (socket_config.parent / "s").write_text("precious")
    refused(socket_config, 5, str(socket_config.parent / "s"), "not a socket")


# Pools


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    make_pool(tmp_path, ["vol"], 1 << 20).close()
    write_config(tmp_path)
    return tmp_path / "pool"


def test_second_server(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server()
    assert server.process is not None
    config = write_config(tmp_path, listen="tcp://127.0.0.1:0", control="other.sock")
    config.write_text(config.read_text().replace('path = "pool"', f'path = "{server.pool}"'))
    refused(config, 5, f"process {server.process.pid}")
    refused(server.config, 5, f"process {server.process.pid}")
    assert server.json("volume", "list") == []


def test_future_format(pool: Path) -> None:
    index = Index(pool / "index.mdb")
    with index.read() as reader:
        meta = reader.meta()
    assert meta is not None
    index.update(lambda txn: txn.put_meta({**meta, "format": 9}))
    index.close()
    write_sums(FileIO(), pool / "index.mdb")
    refused(pool.parent / "nbdsnap.toml", 1, "format 9", str(pool))


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "precious").write_text("precious")
    refused(write_config(tmp_path), 1, "precious", str(tmp_path / "pool"))


def test_pool_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("precious")
    refused(write_config(tmp_path), 1, str(tmp_path / "pool"))


def damage(pool: Path, how: str) -> None:
    index = pool / "index.mdb"
    size = index.stat().st_size
    if how == "removed":
        index.unlink()
    elif how.startswith("truncated"):
        os.truncate(
            index, {"truncated to nothing": 0, "truncated to a page": 4096, "truncated to half": size // 2}[how]
        )
    elif how == "overwritten at its start":
        with index.open("r+b") as file:
            file.write(b"\xa5" * 8192)
    else:
        index.write_bytes(b"\xa5" * size)


@pytest.mark.parametrize(
    "how",
    [
        "removed",
        "truncated to nothing",
        "truncated to a page",
        "truncated to half",
        "overwritten at its start",
        "overwritten",
    ],
)
def test_damaged_index(pool: Path, how: str) -> None:
    damage(pool, how)
    refused(pool.parent / "nbdsnap.toml", 7, str(pool))


# A server that starts


@pytest.fixture
def server(start_server: Callable[..., Server], tmp_path: Path) -> Iterator[Server]:
    yield start_server([Volume("vol", tmp_path / "vol.img", 1 << 20)])


def test_volumes_of_the_configuration_are_made_once(server: Server, tmp_path: Path) -> None:
    assert (tmp_path / "vol.img").stat().st_size == 1 << 20
    server.snapshot("vol@a")
    server.stop()
    server.start()
    assert [one["name"] for one in server.json("snapshot", "list")] == ["a"]


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT])
def test_end_leaves_no_sockets_and_a_free_pool(server: Server, ended_by: signal.Signals) -> None:
    assert server.process is not None
    server.process.send_signal(ended_by)
    assert server.process.wait(TIMEOUT_S) == 0
    server._forget()
    assert not server.control.exists()
    assert not server.socket.exists()
    assert server.stderr() == ""
    Pool.open(server.pool).close()
    assert [one["name"] for one in server.json("volume", "list")] == ["vol"]  # without a server


def test_killed_server_is_no_hindrance(server: Server) -> None:
    server.kill()
    assert server.control.exists()
    assert server.socket.exists()
    server.start()
    assert [one["name"] for one in server.json("volume", "list")] == ["vol"]


def test_config_after_the_commands_name_counts(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text("[sever]")
    done = subprocess.run(
        [NBDSNAP, "--config", write_config(tmp_path), "serve", "--config", tmp_path / "wrong.toml"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 3
    assert "wrong.toml" in done.stderr


def test_moved_folder_is_the_same_pool(server: Server, tmp_path: Path) -> None:
    server.snapshot("vol@a")
    server.stop()
    shutil.move(server.pool, tmp_path / "elsewhere")
    server.config.write_text(server.config.read_text().replace(str(server.pool), str(tmp_path / "elsewhere")))
    server.start()
    assert [one["name"] for one in server.json("snapshot", "list")] == ["a"]


# Listening beyond this machine, and TLS


def test_others_are_not_let_in_by_mistake(folder: Path) -> None:
    for listen in ("tcp://0.0.0.0:0", "tcp://[::]:0"):
        config = write_config(folder, Volume("vol", folder / "vol.img", 1 << 20), listen=listen)
        refused(config, 3, "can be reached from other machines", "[[allow]]", "insecure = true")


def test_certificates_that_can_not_be_read(folder: Path) -> None:
    config = write_config(folder, Volume("vol", folder / "vol.img", 1 << 20))
    with config.open("a") as file:
        file.write('[tls]\ncertificate = "nix.pem"\nkey = "nix.pem"\n')
    refused(config, 3, f"[tls] certificate: cannot read {folder}/nix.pem")


@pytest.mark.parametrize("guard", ["insecure = true\n", '[[allow]]\naddress = ["127.0.0.0/8"]\n'])
def test_others_are_let_in_on_purpose(tmp_path: Path, guard: str) -> None:
    config = write_config(tmp_path, Volume("vol", tmp_path / "vol.img", 1 << 20), listen="tcp://0.0.0.0:0")
    text = config.read_text()
    config.write_text(text.replace("[pool]", f"{guard}[pool]") if guard.startswith("insecure") else text + guard)
    process = subprocess.Popen([NBDSNAP, "serve", "--config", config], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready nbd://0.0.0.0:")
    process.terminate()
    assert process.wait(TIMEOUT_S) == 0
    process.stdout.close()
