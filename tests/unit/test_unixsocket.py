"""Sockets to listen on: stale ones are replaced, live and foreign ones are left as they are."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from nbdsnap.errors import InUseError, ServerError
from nbdsnap.server.unixsocket import bind_unix_socket, socket_inode, unlink_unix_socket


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_mode_and_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s"
    with bind_unix_socket(path, 0o600) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(ConnectionRefusedError):  # nobody gets in before its server is ready
            connect(path)
        listener.listen()
        connect(path)


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with bind_unix_socket(path, 0o600) as killed:
        killed.listen()
    with bind_unix_socket(path, 0o600) as listener:
        listener.listen()
        connect(path)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_live_socket_is_refused(tmp_path: Path, kind: socket.SocketKind) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, kind) as live:
        live.bind(str(path))
        if kind == socket.SOCK_STREAM:
            live.listen()
        inode = socket_inode(path)
        with pytest.raises(InUseError, match="another process listens there"):
            bind_unix_socket(path, 0o600)
        assert socket_inode(path) == inode


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(InUseError, match="is not a socket"):
        bind_unix_socket(path, 0o600)
    assert path.read_text() == "precious"


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InUseError, match="is not a socket"):
        bind_unix_socket(tmp_path, 0o600)


def test_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").symlink_to("nowhere")
    with pytest.raises(InUseError, match="leads nowhere"):
        bind_unix_socket(tmp_path / "s", 0o600)


def test_no_folder_for_it(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"cannot listen on .*No such file"):
        bind_unix_socket(tmp_path / "a" / "b" / "s", 0o600)
    assert list(tmp_path.iterdir()) == []


def test_unlink_leaves_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with bind_unix_socket(path, 0o600):
        first = socket_inode(path)
        path.rename(tmp_path / "old")  # keeps the inode's number taken
        with bind_unix_socket(path, 0o600):
            unlink_unix_socket(path, first)
            assert path.exists()
            unlink_unix_socket(path, socket_inode(path))
            assert not path.exists()
