"""Who may do what: rules alone, and what a client that they hold for gets to see."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from nbdsnap.config import AllowConfig
from nbdsnap.errors import ConfigError
from nbdsnap.nbd.negotiation import TlsMode
from nbdsnap.server.access import Access
from nbdsnap.server.context import Limits
from nbdsnap.server.peer import Peer, peer_of
from nbdsnap.server.security import Security
from nbdsnap.server.tls import TlsKeeper
from tests.support import nbdwire
from tests.support.blocks import write_stamped
from tests.support.client import Client, DisconnectedError, NbdError, RefusedError
from tests.support.clients import require_client
from tests.support.nbdserver import ServerThread
from tests.support.rawdevice import RawFile, RawPool
from tests.support.tlsfiles import Authority

SEED = 5
EXPORTS = ("db", "db@monday", "db@tuesday", "web", "web@monday")


def access(*rules: dict[str, Any]) -> Access:
    return Access([AllowConfig.model_validate(rule) for rule in rules])


def modes(rules: Access, peer: Peer) -> dict[str, str]:
    """What the client may do, of EXPORTS."""
    found = {name: rules.rules_for(peer).mode(name) for name in EXPORTS}
    return {name: mode for name, mode in found.items() if mode is not None}


def internet(address: str) -> Peer:
    return Peer("", None, address=ip_address(address))


SOMEBODY = Peer("", None, uid=1000, gids=frozenset({1000, 44}))


def test_without_rules_everybody_may_do_everything() -> None:
    assert modes(access(), SOMEBODY) == dict.fromkeys(EXPORTS, "rw")


def test_a_rule_without_conditions_is_for_everybody_and_reads_only() -> None:
    assert modes(access({}), SOMEBODY) == dict.fromkeys(EXPORTS, "ro")


@pytest.mark.parametrize(
    ("patterns", "covered"),
    [
        (["*"], ["db", "web"]),
        (["*@*"], ["db@monday", "db@tuesday", "web@monday"]),
        (["db"], ["db"]),
        (["db@*"], ["db@monday", "db@tuesday"]),
        (["*@monday"], ["db@monday", "web@monday"]),
        (["d?", "w[ef]b@m*"], ["db", "web@monday"]),
        (["d"], []),
        (["b"], []),
        (["DB"], []),
    ],
)
def test_patterns(patterns: list[str], covered: list[str]) -> None:
    assert list(modes(access({"exports": patterns}), SOMEBODY)) == covered


def test_the_most_that_a_rule_gives() -> None:
    rules = access({}, {"exports": ["db"], "mode": "rw"}, {"exports": ["db"]}, {"mode": "rw", "uid": [7]})
    assert modes(rules, SOMEBODY) == {**dict.fromkeys(EXPORTS, "ro"), "db": "rw"}


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        ({"address": ["192.0.2.0/24"]}, ["192.0.2.9"]),
        ({"address": ["192.0.2.9"]}, ["192.0.2.9"]),
        ({"address": ["192.0.2.0/24", "2001:db8::/32"]}, ["192.0.2.9", "2001:db8::1"]),
        ({"address": ["0.0.0.0/0"]}, ["192.0.2.9", "127.0.0.1"]),
        ({"address": ["127.0.0.0/8", "::1"]}, ["127.0.0.1"]),
        ({"address": ["unix"]}, ["unix"]),
        ({"address": ["vsock"]}, ["vsock"]),
        ({"address": ["vsock:3"]}, ["vsock"]),
        ({"address": ["vsock:4"]}, []),
        ({"uid": [1000]}, ["unix"]),
        ({"uid": [0]}, []),
        ({"gid": [44]}, ["unix"]),
        ({"gid": [4]}, []),
        ({"gid": [44], "uid": [0]}, []),
        ({"gid": [44], "uid": [0, 1000]}, ["unix"]),
        ({"certificate": ["alice"]}, ["alice"]),
        ({"certificate": ["ALICE.example.org"]}, ["alice"]),
        ({"certificate": ["*.example.org"]}, ["alice"]),
        ({"certificate": ["*"]}, ["alice"]),
        ({"certificate": ["lice"]}, []),
        ({"certificate": ["alice"], "address": ["10.0.0.0/8"]}, []),
        ({"certificate": ["alice"], "address": ["198.51.100.0/24"]}, ["alice"]),
        ({"psk": ["bob"]}, ["bob"]),
        ({"psk": ["*"]}, ["bob"]),
        ({"psk": ["alice"]}, []),
        ({"certificate": ["bob"]}, []),
    ],
)
def test_conditions(conditions: dict[str, Any], holds: list[str]) -> None:
    peers = {
        **{text: internet(text) for text in ("192.0.2.9", "2001:db8::1", "127.0.0.1")},
        "unix": SOMEBODY,
        "vsock": Peer("", None, cid=3),
        "alice": Peer(
            "", None, address=ip_address("198.51.100.1"), certificates=frozenset({"alice", "Alice.Example.org"})
        ),
        "bob": Peer("", None, address=ip_address("203.0.113.1"), psk="bob"),
    }
    rules = access(conditions)
    expected = [*holds, *(["alice", "bob"] if conditions.get("address") == ["0.0.0.0/0"] else [])]
    assert [name for name, peer in peers.items() if modes(rules, peer)] == sorted(expected, key=list(peers).index)


def test_names_of_users_and_groups() -> None:
    assert modes(access({"uid": ["root"], "gid": ["root"]}), Peer("", None, uid=0, gids=frozenset({0})))
    with pytest.raises(ConfigError, match="uid: this machine knows no 'nobody-at-all'"):
        access({"uid": ["nobody-at-all"]})
    with pytest.raises(ConfigError, match="gid: this machine knows no 'nobody-at-all'"):
        access({"gid": ["nobody-at-all"]})


# Who is there


def test_the_peer_of_a_unix_socket() -> None:
    ours, theirs = socket.socketpair()
    peer = peer_of(theirs)
    assert (peer.uid, peer.gids >= {os.getgid(), *os.getgroups()}) == (os.getuid(), True)
    assert peer.key == ("uid", os.getuid())
    assert str(os.getpid()) in peer.label
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("family", "host", "address", "label"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1", "127.0.0.1:"),
        (socket.AF_INET6, "::1", "::1", "[::1]:"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1", "127.0.0.1:"),
    ],
)
def test_the_peer_of_a_tcp_socket(family: socket.AddressFamily, host: str, address: str, label: str) -> None:
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        listening.listen()
        with socket.create_connection((address, listening.getsockname()[1])) as client:
            accepted, _ = listening.accept()
            peer = peer_of(accepted)
            assert peer.address == ip_address(address)
            assert peer.label == f"{label}{client.getsockname()[1]}"
            accepted.close()


def test_the_peer_of_a_virtual_machine() -> None:
    class Fake:
        family = socket.AF_VSOCK

        def getpeername(self) -> tuple[int, int]:
            return 3, 1024

    peer = peer_of(Fake())  # type: ignore[arg-type]
    assert (peer.cid, peer.label, peer.key) == (3, "vsock 3:1024", ("vsock", 3))


def test_a_peer_that_has_left() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    assert peer_of(theirs).address is None
    ours.close()


def test_ipv6_clients_of_one_network_are_one() -> None:
    def key(text: str) -> object:
        class Fake:
            family = socket.AF_INET6

            def getpeername(self) -> tuple[str, int, int, int]:
                return text, 5, 0, 0

        return peer_of(Fake()).key  # type: ignore[arg-type]

    assert key("2001:db8::1") == key("2001:db8::ffff:1") != key("2001:db8:0:1::1")
    assert key("fe80::1%eth0") == key("fe80::2")


# Through the server


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RawPool]:
    files = {
        name: RawFile(write_stamped(tmp_path / f"{number}.img", 1 << 20, SEED + number), read_only="@" in name)
        for number, name in enumerate(EXPORTS)
    }
    yield RawPool(files)
    for file in files.values():
        file.close()


@contextmanager
def serving(pool: RawPool, security: Security) -> Iterator[ServerThread]:
    server = ServerThread(pool, Limits(shutdown_s=2.0), security=security)
    try:
        yield server
    finally:
        server.stop()
    assert not any(file.opened for file in pool.files.values())


def greeted(server: ServerThread) -> Client:
    return Client(server.connect())


MINE = {"uid": [os.getuid()]}


def test_a_listing_shows_what_the_client_may_open_and_nothing_else_is_there(pool: RawPool) -> None:
    rules = access({**MINE, "exports": ["db", "*@monday"]}, {"uid": [4711], "mode": "rw"})
    with serving(pool, Security(rules)) as server:
        with greeted(server) as client:
            assert client.list() == ["db", "db@monday", "web@monday"]
            texts = []
            for name in ("web", "db@tuesday", "nothing"):
                for request in (nbdwire.info(name), nbdwire.go(name)):
                    with pytest.raises(RefusedError) as caught:
                        client.option(request)
                    assert caught.value.reply == nbdwire.UNKNOWN
                    texts.append(caught.value.text.replace(name, ""))
            assert len(set(texts)) == 1, "what is forbidden can be told from what is not there"
            client.go("db@monday")
        for name in ("web", "db@tuesday"):
            old = greeted(server)
            old.sock.sendall(nbdwire.option(nbdwire.EXPORT_NAME, name.encode()))
            old.expect_end()
            old.close()
    assert pool.files["web"].opened == 0


def test_read_only_is_read_only(pool: RawPool) -> None:
    with serving(
        pool, Security(access({**MINE, "exports": ["*"]}, {**MINE, "exports": ["web"], "mode": "rw"}))
    ) as server:
        with greeted(server).structured().go("db") as client:
            assert client.flags & 2
            before = client.read(0, 8192)
            for command, flags in ((nbdwire.WRITE, 0), (nbdwire.WRITE, nbdwire.FUA)):
                assert client.error(command, 0, 4096, flags, bytes(4096)) == nbdwire.EPERM
            assert client.error(nbdwire.WRITE, 0, 300_000, 0, bytes(300_000)) == nbdwire.EPERM
            for command in (nbdwire.TRIM, nbdwire.WRITE_ZEROES):
                with pytest.raises(NbdError) as caught:
                    client.call(command, 0, 4096)
                assert caught.value.error == nbdwire.EPERM
            assert client.read(0, 8192) == before
        with greeted(server).structured().go("web") as client:
            assert not client.flags & 2
            client.write(0, b"mine")


def test_nobody_s_rule_is_an_empty_listing(pool: RawPool) -> None:
    with serving(pool, Security(access({"uid": [4711]}))) as server, greeted(server) as client:
        assert client.list() == []
        with pytest.raises(RefusedError):
            client.go("")


def test_contexts_tell_nothing_of_hidden_snapshots(pool: RawPool) -> None:
    pool.bases = lambda name: ["monday", "tuesday"] if name == "db" else []  # type: ignore[method-assign]
    rules = access({**MINE, "exports": ["db", "db@monday"]})
    with serving(pool, Security(rules)) as server, greeted(server).structured() as client:
        *replies, _ = client.option(nbdwire.contexts("db", [], nbdwire.LIST_META_CONTEXT))
        names = {reply.data[4:].decode() for reply in replies}
        assert {"base:allocation", "qemu:dirty-bitmap:monday", "x-nbdsnap:changed:monday"} <= names
        assert not any("tuesday" in name for name in names)
        assert client.set_contexts("db", "qemu:dirty-bitmap:tuesday") == {}
        for name in ("web", "nothing"):
            with pytest.raises(RefusedError) as caught:
                client.option(nbdwire.contexts(name, ["base:allocation"]))
            assert caught.value.reply == nbdwire.UNKNOWN


def test_a_reload_ends_what_is_no_longer_allowed(pool: RawPool) -> None:
    security = Security(access({**MINE, "mode": "rw"}))
    with serving(pool, security) as server:
        writer, reader, other = (greeted(server).go(name) for name in ("db", "db@monday", "web"))
        negotiating = greeted(server)

        def reload() -> None:
            security.access = access(MINE, {**MINE, "exports": ["web"], "mode": "rw"})
            server.server.reloaded()

        server.call(reload)
        writer.expect_end()
        assert reader.read(0, 10) and other.read(0, 10)
        assert negotiating.go("db").flags & 2
        for client in (writer, reader, other, negotiating):
            client.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    require_client("openssl")
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


def test_certificates_open_what_addresses_do_not(pool: RawPool, authority: Authority) -> None:
    rules = access(
        {"certificate": ["alice"], "exports": ["db"], "mode": "rw"}, {"certificate": ["b*"]}, {"exports": ["web"]}
    )
    with serving(pool, Security(rules, TlsKeeper(authority.config("optional", verify="optional")))) as server:

        def seen(certificate: str | None, *, tls: bool = True) -> list[str]:
            with Client(server.connect(TlsMode.OPTIONAL.value)) as client:
                assert client.list() == ["web"], "in the clear"
                if tls:
                    client.start_tls(authority.client_context(certificate), "localhost")
                listed = client.list()
                for name in EXPORTS:
                    if name not in listed:
                        with pytest.raises(RefusedError):
                            client.go(name)
                return listed

        assert seen(None, tls=False) == ["web"]
        assert seen(None) == ["web"]
        assert seen("alice") == ["db", "web"]
        assert seen("bob") == list(EXPORTS)


def test_a_stranger_s_certificate_is_no_proof(pool: RawPool, authority: Authority, tmp_path: Path) -> None:
    """Of another authority, with the right name."""
    stranger = Authority(tmp_path / "other")
    context = authority.client_context(None)
    context.load_cert_chain(stranger.folder / "alice" / "client-cert.pem", stranger.folder / "alice" / "client-key.pem")
    rules = access({"certificate": ["alice"], "mode": "rw"})
    with (
        serving(pool, Security(rules, TlsKeeper(authority.config(verify="optional")))) as server,
        pytest.raises((OSError, DisconnectedError)),
    ):
        Client(server.connect("required")).start_tls(context, "localhost").list()
