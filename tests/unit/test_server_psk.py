"""Pre-shared keys: where Python has them, and what is said where it has not."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsnap.config import AllowConfig, TlsConfig, load_config
from nbdsnap.errors import ConfigError
from nbdsnap.server.access import Access
from nbdsnap.server.context import Limits
from nbdsnap.server.security import Security
from nbdsnap.server.tls import TlsKeeper, read_psk
from tests.support.blocks import stamped, write_stamped
from tests.support.client import Client, DisconnectedError
from tests.support.clients import require_client, run
from tests.support.nbdserver import ServerThread
from tests.support.rawdevice import RawFile, RawPool
from tests.support.server import Server, Volume

KEYS = {"alice": bytes(range(32)), "bob": bytes(range(100, 132))}

HAS_PSK = sys.version_info >= (3, 13)
needs_psk = pytest.mark.skipif(not HAS_PSK, reason="pre-shared keys need Python 3.13")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text("# made for a test\n\n" + "".join(f"{name}:{key.hex()}\n" for name, key in KEYS.items()))
    return path


def test_the_file(keys: Path) -> None:
    assert read_psk(keys) == KEYS


@pytest.mark.parametrize("line", ["alice", "alice:", "alice:xyz", ":00112233445566778899aabbccddeeff", "a:0011"])
def test_lines_that_are_wrong(keys: Path, line: str) -> None:
    with keys.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConfigError, match="line 5: not NAME:KEY") as caught:
        read_psk(keys)
    assert "0011" not in str(caught.value), "a key in the log"


@pytest.mark.skipif(HAS_PSK, reason="this Python has pre-shared keys")
def test_an_older_python_says_so(tmp_path: Path, keys: Path) -> None:
    config = tmp_path / "nbdsnap.toml"
    config.write_text(f'[tls]\npsk = "{keys}"\n')
    with pytest.raises(ConfigError, match=r"\[tls\] psk: pre-shared keys need Python 3.13 or later, and this is 3\."):
        load_config(config)


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[RawFile]:
    opened = RawFile(write_stamped(tmp_path / "raw.img", 1 << 20, 1))
    yield opened
    opened.close()


def serving(raw: RawFile, config: TlsConfig) -> ServerThread:
    rules = Access([AllowConfig(psk=["alice"], mode="rw"), AllowConfig(certificate=["*"])])
    return ServerThread(RawPool({"vol": raw}), Limits(shutdown_s=2.0), security=Security(rules, TlsKeeper(config)))


def psk_context(name: str, key: bytes, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("PSK")
    context.set_psk_client_callback(lambda hint: (name, key))  # type: ignore[attr-defined]
    return context


@needs_psk
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_keys_and_rules(raw: RawFile, keys: Path, version: ssl.TLSVersion) -> None:
    config = TlsConfig(mode="required", psk=keys)
    server = serving(raw, config)

    def connect(name: str, key: bytes) -> Client:
        return Client(server.connect("required")).start_tls(psk_context(name, key, version), "localhost")

    with connect("alice", KEYS["alice"]).structured().go("vol") as client:
        client.write(0, b"mine")
        assert client.read(4096, 100) == stamped(1, 4096, 100)
    with connect("bob", KEYS["bob"]) as client:
        assert client.list() == [], "a key that no rule names"
    for name, key in (("alice", KEYS["bob"]), ("carol", KEYS["alice"])):
        with pytest.raises((OSError, DisconnectedError)):
            connect(name, key).list()
    server.stop()


def test_keys_or_certificates(tmp_path: Path, keys: Path) -> None:
    config = tmp_path / "nbdsnap.toml"
    config.write_text(f'[tls]\npsk = "{keys}"\ncertificate = "c"\nkey = "k"\n')
    with pytest.raises(ConfigError, match=r"\[tls\] psk: pre-shared keys"):
        load_config(config)


@needs_psk
@pytest.mark.slow
def test_real_clients(keys: Path, tmp_path: Path) -> None:
    require_client("nbdinfo", "nbdcopy", "qemu-img")
    original = write_stamped(tmp_path / "vol.img", 1 << 20, 2)
    with Server(tmp_path / "server", [Volume("vol", original)], sections=f'[tls]\npsk = "{keys}"\n') as server:
        uri = f"nbds://alice@localhost:{server.port}/vol?tls-psk-file={keys}"
        assert "with TLS" in run("nbdinfo", uri)
        run("nbdcopy", uri, tmp_path / "out.img")
        assert (tmp_path / "out.img").read_bytes() == original.read_bytes()
        (tmp_path / "qemu").mkdir()
        (tmp_path / "qemu" / "keys.psk").write_bytes(keys.read_bytes())
        run(
            *("qemu-img", "info", "--object"),
            f"tls-creds-psk,id=tls,dir={tmp_path}/qemu,username=alice,endpoint=client",
            *("--image-opts", f"driver=nbd,host=localhost,port={server.port},export=vol,tls-creds=tls"),
        )
        wrong = tmp_path / "wrong.psk"
        wrong.write_text(f"alice:{KEYS['bob'].hex()}\n")
        run("nbdinfo", uri.replace(str(keys), str(wrong)), exit_code=1)
