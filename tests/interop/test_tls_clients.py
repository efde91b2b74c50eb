"""The real clients over TLS: over TCP and over a unix socket, with certificates and rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from nbdsnap import operations
from tests.interop.conftest import MIB, VOLUME_SIZE
from tests.support.blocks import write_stamped
from tests.support.clients import nbdsh, require_client, run, sha256_of_file
from tests.support.server import SERVERS, Server, Volume
from tests.support.tlsfiles import Authority

pytestmark = pytest.mark.slow

SEED = 1


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    require_client("openssl")
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


RULES = """
[[allow]]
certificate = ["alice"]
exports = ["vol", "vol@*"]
mode = "rw"
[[allow]]
certificate = ["bob"]
exports = ["vol@b"]
"""


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[Server]:
    """``vol`` with the snapshots ``a`` and ``b``; and ``secret``."""
    folder = tmp_path_factory.mktemp("server")
    vol = write_stamped(folder / "vol.img", VOLUME_SIZE, SEED)
    volumes = [Volume("vol", vol), Volume("secret", folder / "secret.img", MIB)]
    server = Server(folder, volumes, sections=authority.toml() + RULES)
    request.node.stash[SERVERS] = [server]
    with server:
        server.snapshot("vol@a")
        server.snapshot("vol@b")
        yield server
        report = server.json("check", "--data")
        assert report["ok"], report["problems"]


@pytest.fixture(params=["tcp", "unix"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Reached:
    """An export as one client reaches it: as libnbd's and as qemu's tools are told of it."""

    def __init__(self, server: Server, authority: Authority, transport: str, client: str = "alice") -> None:
        self._server = server
        self._transport = transport
        self._credentials = authority.folder / client

    def uri(self, export: str) -> str:
        name = quote(export, safe="@")
        certificates = f"tls-certificates={self._credentials}"
        if self._transport == "unix":
            return f"nbds+unix:///{name}?socket={self._server.socket}&{certificates}"
        return f"nbds://localhost:{self._server.port}/{name}?{certificates}"

    def qemu(self, export: str) -> tuple[str, ...]:
        """Options of qemu-img and qemu-io, the image last."""
        where = f"server.type=unix,server.path={self._server.socket},tls-hostname=localhost"
        if self._transport == "tcp":
            where = f"server.type=inet,server.host=localhost,server.port={self._server.port}"
        nbd = f"file.driver=nbd,{where},export={export},tls-creds=tls"
        nbd = "driver=raw," + nbd.replace(",", ",file.").replace("file.file.", "file.")
        return ("--object", f"tls-creds-x509,id=tls,dir={self._credentials},endpoint=client", "--image-opts", nbd)


@pytest.fixture
def reached(server: Server, authority: Authority, transport: str) -> Reached:
    return Reached(server, authority, transport)


def test_nbdinfo(reached: Reached) -> None:
    shown = json.loads(run("nbdinfo", "--json", reached.uri("vol")))
    assert shown["TLS"] is True
    assert shown["exports"][0]["export-size"] == VOLUME_SIZE
    listed = json.loads(run("nbdinfo", "--json", "--list", reached.uri("")))
    assert {"vol", "vol@a"} <= {export["export-name"] for export in listed["exports"]}
    assert "secret" not in {export["export-name"] for export in listed["exports"]}
    assert (
        sum(one["length"] for one in json.loads(run("nbdinfo", "--json", "--map", reached.uri("vol")))) == VOLUME_SIZE
    )


@pytest.mark.parametrize("options", [(), ("--connections=4", "--requests=64"), ("--request-size=4096",)])
def test_nbdcopy_both_ways(server: Server, reached: Reached, tmp_path: Path, options: tuple[str, ...]) -> None:
    new = write_stamped(tmp_path / "new.img", VOLUME_SIZE, seed=2 + len(options))
    run("nbdcopy", "--flush", *options, new, reached.uri("vol"))
    run("nbdcopy", *options, reached.uri("vol"), tmp_path / "out.img")
    run("nbdcopy", *options, reached.uri("vol@a"), tmp_path / "old.img")
    server.manage(operations.STATUS)
    assert sha256_of_file(tmp_path / "out.img") == sha256_of_file(new) == sha256_of_file(server.folder / "vol.img")
    original = write_stamped(tmp_path / "original.img", VOLUME_SIZE, SEED)
    assert sha256_of_file(tmp_path / "old.img") == sha256_of_file(original)


def test_nbddump_and_nbdsh(reached: Reached) -> None:
    first = run("nbddump", "-n", "64", reached.uri("vol@a"))
    script = f"h.set_uri_allow_local_file(True); h.connect_uri({reached.uri('vol@a')!r}); print(h.get_tls_negotiated())"
    shown = nbdsh(f"{script}; print(h.pread(64, 0).hex())").split()
    assert shown[0] == "True"
    assert first.split()[1:5] == [shown[1][number : number + 2] for number in range(0, 8, 2)]


def test_qemu_img(reached: Reached, tmp_path: Path) -> None:
    original = write_stamped(tmp_path / "original.img", VOLUME_SIZE, SEED)
    assert json.loads(run("qemu-img", "info", "--output=json", *reached.qemu("vol")))["virtual-size"] == VOLUME_SIZE
    *options, image = reached.qemu("vol@a")
    run("qemu-img", "convert", *options, image, "-O", "raw", tmp_path / "out.img")
    assert sha256_of_file(tmp_path / "out.img") == sha256_of_file(original)
    local = f"driver=raw,file.driver=file,file.filename={original}"
    assert "identical" in run("qemu-img", "compare", *options, image, local)


def test_qemu_io(reached: Reached) -> None:
    commands = (
        "write -P 0x5a 1M 3M",
        "read -P 0x5a 1M 3M",
        "write -z 2M 64k",
        "read -P 0 2M 64k",
        "discard 3M 4k",
        "flush",
    )
    words = [word for command in commands for word in ("-c", command)]
    *options, image = reached.qemu("vol")
    assert "Pattern verification failed" not in run("qemu-io", *words, *options, image)


def test_fio(server: Server, authority: Authority, tmp_path: Path, transport: str) -> None:
    """fio's engine allows no local files in a URI: so there is a server without certificates of clients for it."""
    volume = Volume("vol", tmp_path / "vol.img", 4 * MIB)
    where = "nbds+unix:///vol?socket={socket}&" if transport == "unix" else "nbds://localhost:{port}/vol?"
    with Server(tmp_path / "open", [volume], sections=authority.toml(verify="off")) as other:
        uri = where.format(socket=other.socket, port=other.port) + "tls-verify-peer=false"
        job = ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--size=4m", "--randseed=7"]
        checks = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]
        run(*job, "--bs=4k", "--iodepth=64", *checks, cwd=tmp_path)
        run(*job, "--bssplit=512/30:4k/30:256k/40", "--iodepth=16", "--serialize_overlap=1", *checks, cwd=tmp_path)


def test_in_the_clear_there_is_nothing(server: Server, transport: str) -> None:
    for export in ("vol", "secret"):
        run("nbdinfo", server.uri(export, transport), exit_code=1)
    run("nbdinfo", "--list", server.uri("", transport), exit_code=1)


def test_each_certificate_its_exports(server: Server, authority: Authority, transport: str, tmp_path: Path) -> None:
    bob = Reached(server, authority, transport, "bob")
    listed = json.loads(run("nbdinfo", "--json", "--list", bob.uri("")))["exports"]
    assert [export["export-name"] for export in listed] == ["vol@b"]
    run("nbdcopy", bob.uri("vol@b"), tmp_path / "out.img")
    for export in ("vol", "vol@a", "secret"):
        run("nbdinfo", bob.uri(export), exit_code=1)
    nobody = authority.folder / "nobody"
    nobody.mkdir(exist_ok=True)
    (nobody / "ca-cert.pem").write_bytes((authority.server / "ca-cert.pem").read_bytes())
    run("nbdinfo", Reached(server, authority, transport, "nobody").uri("vol"), exit_code=1)
