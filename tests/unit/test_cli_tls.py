"""``nbdsnap tls``: what it makes is what a TLS library accepts; what it can't make leaves nothing behind."""

from __future__ import annotations

import json
import ssl
import stat
import subprocess
from pathlib import Path

import pytest

from nbdsnap.cli.main import run
from nbdsnap.config import load_config
from nbdsnap.server.tls import TlsKeeper
from tests.support.clients import require_client


@pytest.fixture(autouse=True)
def openssl() -> None:
    require_client("openssl")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, hostname: str) -> ssl.SSLObject:
    """In memory; the server's side of it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=hostname),
    ]
    left = list(ends)
    for _ in range(10):
        for end in list(left):
            try:
                end.do_handshake()
                left.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not left
    return ends[0]


def client_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca-cert.pem")
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python's clients do from 3.13 on
    return context


def test_a_certificate_authority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ca"
    words = ["--host", "nbd.example.org", "--host", "192.0.2.7", "--host", "::1", "--client", "alice", "--days", "7"]
    assert run(["tls", "make-ca", str(folder), *words]) == 0
    out = capsys.readouterr().out
    assert run(["tls", "make-client", str(folder), "bob", "carol.example.org"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        *("alice", "bob", "ca-cert.pem", "ca-key.pem", "carol.example.org", "server")
    ]
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not (folder / "server" / "ca-key.pem").exists()

    config = tmp_path / "nbdsnap.toml"
    config.write_text(out.partition("configuration:\n")[2])
    server = TlsKeeper(load_config(config).tls).current()
    for name in ("alice", "bob", "carol.example.org"):
        for host in ("nbd.example.org", "192.0.2.7", "::1"):
            tls = handshake(server, client_context(folder / name), host)
            certificate = tls.getpeercert()
            assert certificate is not None
            assert certificate["subject"] == ((("commonName", name),),)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client_context(folder / "alice"), "other.example.org")


def test_the_server_is_localhost_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tls", "make-ca", str(tmp_path / "ca"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folders": [str(tmp_path / "ca" / "server")]}
    shown = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "ca" / "server" / "server-cert.pem", "-noout", "-ext", "subjectAltName"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1" in shown


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["make-ca", "full"], 5, "full is not empty"),
        (["make-ca", "new", "--host", "a b"], 2, "'a b' is no host's name"),
        (["make-ca", "new", "--host", "a,DNS:b"], 2, "is no host's name"),
        (["make-ca", "new", "--client", "../x"], 2, "can't be a client's name"),
        (["make-ca", "new", "--client", "server"], 2, "can't be a client's name"),
        (["make-ca", "new", "--days", "0"], 2, "--days"),
        (["make-client", "full", "alice"], 4, "ca-key.pem does not exist"),
        (["make-client", "new", "alice"], 4, "ca-key.pem does not exist"),
        (["make-client", "new", "a/b"], 2, "can't be a client's name"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    assert run(["tls", *words]) == code
    assert complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious"]


def test_a_client_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tls", "make-ca", str(tmp_path / "ca"), "--client", "alice"]) == 0
    before = (tmp_path / "ca" / "alice" / "client-cert.pem").read_bytes()
    assert run(["tls", "make-client", str(tmp_path / "ca"), "bob", "alice"]) == 5
    assert not (tmp_path / "ca" / "bob").exists()
    assert (tmp_path / "ca" / "alice" / "client-cert.pem").read_bytes() == before


def test_an_openssl_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ca"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["tls", "make-ca", str(folder)]) == 1
    assert "there is no openssl program" in capsys.readouterr().err
    assert not folder.exists()
    (tmp_path / "openssl").write_text("#!/bin/sh\necho no entropy >&2; exit 1\n")
    (tmp_path / "openssl").chmod(0o755)
    assert run(["tls", "make-ca", str(folder)]) == 1
    assert "no entropy" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
