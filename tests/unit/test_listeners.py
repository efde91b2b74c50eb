"""Where clients may connect: modes and owners, what is refused, what systemd passes, and trouble with accepting."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdsnap.addresses import VSOCK_ANY, Address, TcpAddress, UnixAddress, VsockAddress, parse_address, parse_listener
from nbdsnap.errors import ConfigError, InUseError, ServerError
from nbdsnap.server.listeners import RETRY_S, Listener, check_exposure, open_listeners
from nbdsnap.server.systemd import inherited_sockets, notify
from tests.support.blocks import write_stamped
from tests.support.client import Client
from tests.support.deadline import wait_until
from tests.support.nbdserver import ServerThread
from tests.support.rawdevice import RawFile, RawPool

# Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("vsock://any", VsockAddress(VSOCK_ANY, 10809)),
        ("vsock://2:5", VsockAddress(2, 5)),
        ("vsock://1", VsockAddress(1, 10809)),
    ],
)
def test_vsock_addresses(tmp_path: Path, text: str, address: Address) -> None:
    assert parse_address(text, tmp_path) == address
    assert parse_address(str(address), tmp_path) == address


@pytest.mark.parametrize("text", ["vsock://", "vsock://x", "vsock://-1", "vsock://4294967295", "vsock://2:99999"])
def test_vsock_addresses_that_are_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        parse_address(text, tmp_path)


def test_tables(tmp_path: Path) -> None:
    assert parse_listener(
        {"address": "unix://s", "mode": "0600", "owner": "root", "group": 7, "tls": "off"}, tmp_path
    ) == UnixAddress(tmp_path / "s", "off", 0o600, "root", 7)
    assert parse_listener({"address": "unix://s", "mode": 0o666}, tmp_path) == UnixAddress(tmp_path / "s", mode=0o666)
    assert parse_listener({"address": "tcp://a", "tls": "required"}, tmp_path) == TcpAddress("a", 10809, "required")
    assert parse_listener({"address": "vsock://3", "tls": "optional"}, tmp_path) == VsockAddress(3, 10809, "optional")


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({}, "has a string 'address'"),
        ({"address": 5}, "has a string 'address'"),
        ({"address": "nix"}, "no address"),
        ({"address": "tcp://a", "mode": "0600"}, "'mode' is no key of a listener on tcp://a:10809"),
        ({"address": "unix://s", "mod": "0600"}, "'mod' is no key"),
        ({"address": "unix://s", "mode": "0999"}, "is no mode"),
        ({"address": "unix://s", "mode": 0o7777}, "is no mode"),
        ({"address": "unix://s", "mode": True}, "is no mode"),
        ({"address": "unix://s", "owner": ""}, "neither a name nor a number"),
        ({"address": "unix://s", "group": -1}, "neither a name nor a number"),
        ({"address": "unix://s", "tls": "yes"}, "not one of off, optional, required"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, table: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_listener(table, tmp_path)


# Unix sockets


def close(*listeners: Listener) -> None:
    for listener in listeners:
        listener.close()


def test_mode_and_owner(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (listener,) = open_listeners([UnixAddress(path, mode=0o604)])
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o604, os.geteuid(), os.getegid())
    close(listener)
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(("owner", "group"), [("daemon", "daemon"), (1, None), (None, 1), (None, "daemon")])
def test_another_s(tmp_path: Path, owner: str | int | None, group: str | int | None) -> None:
    path = tmp_path / "s"
    (listener,) = open_listeners([UnixAddress(path, owner=owner, group=group)])
    status = path.stat()
    assert (status.st_uid, status.st_gid) == (1 if owner else 0, 1 if group else 0)
    assert stat.S_IMODE(status.st_mode) == 0o660
    close(listener)


def test_an_unknown_owner_leaves_nothing_behind(tmp_path: Path) -> None:
    for address in (UnixAddress(tmp_path / "s", owner="nobody-at-all"), UnixAddress(tmp_path / "s", group="nix")):
        with pytest.raises(ConfigError, match="this machine knows no"):
            open_listeners([TcpAddress("127.0.0.1", 0), address])
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_can_not_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.chown", refuse)
    with pytest.raises(ServerError, match="Operation not permitted"):
        open_listeners([UnixAddress(tmp_path / "s", owner=1)])
    assert list(tmp_path.iterdir()) == []


# Exposure


@pytest.mark.parametrize("address", [TcpAddress("127.0.0.1", 0), TcpAddress("::1", 0), TcpAddress("localhost", 0)])
def test_this_machine_needs_nothing(address: Address) -> None:
    close(*open_listeners([address]))


@pytest.mark.parametrize("address", [TcpAddress("0.0.0.0", 0), TcpAddress("::", 0)])
def test_others_need_tls_or_a_rule(address: TcpAddress, tmp_path: Path) -> None:
    for tls in ("off", "optional"):
        with pytest.raises(ConfigError, match="can be reached from other machines") as caught:
            open_listeners([UnixAddress(tmp_path / "s"), address], tls)  # type: ignore[arg-type]
        assert "insecure = true" in caught.value.advice
        assert not (tmp_path / "s").exists()
    close(*open_listeners([address], "required"))
    close(*open_listeners([TcpAddress(address.host, 0, "required")], "off"))
    close(*open_listeners([address], guarded=True))
    with pytest.raises(ConfigError):
        open_listeners([TcpAddress(address.host, 0, "off")], "required")


def test_uris() -> None:
    listeners = open_listeners([TcpAddress("::1", 0), TcpAddress("127.0.0.1", 0, "optional")], "required")
    assert listeners[0].uri.startswith("nbds://[::1]:")
    assert listeners[1].uri.startswith("nbd://127.0.0.1:")
    close(*listeners)


# vsock


def local_vsock() -> Listener:
    try:
        (listener,) = open_listeners([VsockAddress(1, 0)])
    except ServerError as error:
        pytest.skip(f"{error}")
    return listener


def test_vsock(tmp_path: Path) -> None:
    listener = local_vsock()
    raw = RawFile(write_stamped(tmp_path / "raw.img", 1 << 20, 1))
    server = ServerThread(RawPool({"vol": raw}), listeners=[listener])
    sock = socket.socket(socket.AF_VSOCK)
    sock.connect((1, int(listener.uri.rpartition(":")[2])))
    with Client(sock).go("vol") as client:
        assert len(client.read(0, 4096)) == 4096
        (connection,) = server.server._connections
        assert connection.peer.cid == 1
        client.disconnect()
    server.stop()
    raw.close()


def test_vsock_from_other_machines_needs_a_rule() -> None:
    try:
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            open_listeners([VsockAddress(VSOCK_ANY, 0)])
    except ServerError as error:
        pytest.skip(f"{error}")


def test_no_vsock_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without(family: int, *rest: int) -> socket.socket:
        if family == socket.AF_VSOCK:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *rest)

    monkeypatch.setattr("socket.socket", without)
    with pytest.raises(ServerError, match="cannot listen on vsock://any:10809: Address family") as caught:
        open_listeners([VsockAddress(VSOCK_ANY, 10809)])
    assert "vsock module" in caught.value.advice


# What systemd passes


def test_without_systemd() -> None:
    assert inherited_sockets({}) == []
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a", "PATH": "b"}
    assert inherited_sockets(environment) == []
    assert environment == {"PATH": "b"}


PASSED = """
import os, sys
from nbdsnap.errors import NbdsnapError
from nbdsnap.server.listeners import adopt_listeners
from nbdsnap.server.systemd import inherited_sockets
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    for listener in adopt_listeners(inherited_sockets()):
        print(listener.uri)
        listener.close()
except NbdsnapError as error:
    print(f"{type(error).__name__}: {error}")
"""


def passed(*sockets: socket.socket) -> list[str]:
    """What a process says of the sockets that it gets as systemd passes them: 3, 4, …"""
    script = PASSED.replace("import os, sys", "import os, sys\n" + _place(sockets))
    done = subprocess.run(
        [sys.executable, "-c", script],
        pass_fds=[sock.fileno() for sock in sockets],
        env={**os.environ, "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": "x"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _place(sockets: tuple[socket.socket, ...]) -> str:
    """First far away, lest one takes another's place."""
    moves = [f"os.dup2({sock.fileno()}, {100 + number})" for number, sock in enumerate(sockets)]
    moves += [f"os.dup2({100 + number}, {3 + number}, True)" for number in range(len(sockets))]
    return "; ".join(moves)


def test_sockets_that_were_passed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        port = tcp.getsockname()[1]
        assert passed(tcp, unix) == [f"nbd://127.0.0.1:{port}", f"nbd+unix:///?socket={tmp_path}/s"]
        assert (tmp_path / "s").exists(), "its file is systemd's"


def test_passed_sockets_are_held_to_the_same_rules() -> None:
    with socket.create_server(("0.0.0.0", 0)) as everywhere:
        (said,) = passed(everywhere)
        assert said.startswith("ConfigError: nbd://0.0.0.0:")
    with socket.socket() as silent, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        silent.bind(("127.0.0.1", 0))
        datagrams.bind(("127.0.0.1", 0))
        for wrong in (silent, datagrams):
            (said,) = passed(wrong)
            assert said == "ServerError: descriptor 3, which LISTEN_FDS announces, does not listen for streams"


@pytest.mark.parametrize("abstract", [False, True])
def test_notification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@nbdsnap-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1", "STATUS=fine")
        assert systemd.recv(100) == b"READY=1\nSTATUS=fine"
    notify("READY=1")  # nobody is there: no error
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


# Trouble with accepting


class Failing:
    """A listening socket whose ``accept`` always fails."""

    family = socket.AF_INET

    def __init__(self, code: int) -> None:
        self.code = code
        self.accepts = 0
        self.real = socket.create_server(("127.0.0.1", 0))
        self.client = socket.create_connection(self.real.getsockname())

    def accept(self) -> None:
        self.accepts += 1
        raise OSError(self.code, os.strerror(self.code))

    def listen(self, _: int) -> None: ...

    def setblocking(self, _: bool) -> None: ...

    def fileno(self) -> int:
        return self.real.fileno()

    def getsockname(self) -> tuple[str, int]:
        return ("127.0.0.1", 5)

    def close(self) -> None:
        self.client.close()
        self.real.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM, errno.EINVAL])
def test_accept_that_fails_neither_spins_nor_ends(code: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    failing = Failing(code)
    listener = Listener([failing], "nbd://test")  # type: ignore[list-item]

    async def main() -> None:
        listener.start(asyncio.get_running_loop(), lambda *_: None)
        started = time.monotonic()
        while failing.accepts < 4:
            await asyncio.sleep(0.01)
        assert time.monotonic() - started > 2.9 * RETRY_S

    asyncio.run(asyncio.wait_for(main(), 20))
    listener.close()
    assert caplog.text.count("clients have to wait") == 1


def test_what_was_open_before_is_served_while_there_are_no_descriptors(tmp_path: Path) -> None:
    """Of a server with a limit of its own: see also test_no_file_descriptors_left_makes_clients_wait."""
    path = tmp_path / "s"
    raw = RawFile(write_stamped(tmp_path / "raw.img", 1 << 20, 1))
    (listener,) = open_listeners([UnixAddress(path)])
    server = ServerThread(RawPool({"vol": raw}), listeners=[listener])
    real = listener._sockets[0]
    failing = Failing(errno.EMFILE)
    failing.fileno = real.fileno  # type: ignore[method-assign]
    with Client.connect(path).go("vol") as client:
        server.call(setattr, listener, "_sockets", [failing])
        server.call(server.loop.remove_reader, real.fileno())
        server.call(
            server.loop.add_reader, real.fileno(), listener._accept, server.loop, failing, server.server.add_client
        )
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(str(path))
        wait_until(lambda: failing.accepts >= 3, "the server to try again")
        for _ in range(100):
            assert len(client.read(0, 4096)) == 4096
        failing.accept = real.accept  # type: ignore[method-assign,assignment]
        with Client(waiting).go("vol") as late:
            assert len(late.read(0, 4096)) == 4096
    server.call(setattr, listener, "_sockets", [real])
    failing.close()
    server.stop()
    raw.close()


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other, pytest.raises(InUseError):
        open_listeners([TcpAddress("::1", other.getsockname()[1])])


def test_exposure_is_looked_at_again(tmp_path: Path) -> None:
    listeners = open_listeners([UnixAddress(tmp_path / "s"), TcpAddress("0.0.0.0", 0)], guarded=True)
    check_exposure(listeners, guarded=True)
    with pytest.raises(ConfigError):
        check_exposure(listeners, guarded=False)
    close(*listeners)
