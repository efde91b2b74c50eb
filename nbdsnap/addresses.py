"""Where a server listens: addresses as a configuration writes them.

::

    tcp://HOST[:PORT]      a host name, an IPv4 address, an IPv6 address in brackets
    unix://PATH            relative to the configuration's folder
    vsock://CID[:PORT]     a machine's own context id, or "any"

or a table with the address and what else is to be said about that listener.  An address that is malformed is a
ValueError with a message for a person.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

DEFAULT_PORT = 10809
"""NBD's port at IANA."""

MAX_SOCKET_PATH = 107
"""Bytes of a unix socket's path: ``sun_path`` of 108, less the terminating NUL (unix(7))."""

VSOCK_ANY = 0xFFFFFFFF
"""VMADDR_CID_ANY, VMADDR_PORT_ANY (vsock(7))."""

UNIX_MODE = 0o660
"""Of a unix socket: its owner and group may connect."""

Tls = Literal["off", "optional", "required"]


@dataclass(frozen=True)
class TcpAddress:
    """``tls``: this listener's own mode; None: the configuration's."""

    host: str
    port: int
    tls: Tls | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """``owner``, ``group``: a name or a number; None: the server's."""

    path: Path
    tls: Tls | None = None
    mode: int = UNIX_MODE
    owner: str | int | None = None
    group: str | int | None = None

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True)
class VsockAddress:
    cid: int
    port: int
    tls: Tls | None = None

    def __str__(self) -> str:
        return f"vsock://{'any' if self.cid == VSOCK_ANY else self.cid}:{self.port}"


Address = TcpAddress | UnixAddress | VsockAddress


def parse_address(text: str, folder: Path) -> Address:
    scheme, separator, rest = text.partition("://")
    if separator and scheme == "unix":
        return UnixAddress(socket_path(rest, folder))
    if not separator or scheme not in ("tcp", "vsock"):
        raise ValueError(f"{text!r} is no address")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{text!r} is no address: {error}") from None
    if not host or parts.path or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{text!r} is no address")
    port = DEFAULT_PORT if port is None else port
    if scheme == "tcp":
        return TcpAddress(host, port)
    if host != "any" and not (re.fullmatch(r"[0-9]{1,10}", host) and int(host) < VSOCK_ANY):
        raise ValueError(f"{text!r} is no address: a context id is a number, or 'any'")
    return VsockAddress(VSOCK_ANY if host == "any" else int(host), port)


def parse_listener(table: Mapping[str, Any], folder: Path) -> Address:
    """An address in a table: ``{ address = "unix://…", mode = "0660", owner = "root", group = "kvm" }``."""
    keys = dict(table)
    text = keys.pop("address", None)
    if not isinstance(text, str):
        raise ValueError("a listener's table has a string 'address'")
    address = parse_address(text, folder)
    unix = isinstance(address, UnixAddress)
    allowed = ("tls", "mode", "owner", "group") if unix else ("tls",)
    unknown = [key for key in keys if key not in allowed]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no key of a listener on {address}, which may have {', '.join(allowed)}")
    tls = keys.get("tls")
    if tls is not None and tls not in get_args(Tls):
        raise ValueError(f"tls = {tls!r} is not one of {', '.join(get_args(Tls))}")
    if isinstance(address, TcpAddress):
        return TcpAddress(address.host, address.port, tls)
    if isinstance(address, VsockAddress):
        return VsockAddress(address.cid, address.port, tls)
    return UnixAddress(address.path, tls, _mode(keys.get("mode")), _account(keys, "owner"), _account(keys, "group"))


def absolute_path(text: str, folder: Path) -> Path:
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path")
    return Path(os.path.normpath(folder / text))


def socket_path(text: str, folder: Path) -> Path:
    path = absolute_path(text, folder)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(f"{path} is longer than a socket's path may be, {MAX_SOCKET_PATH} bytes")
    return path


def _mode(value: object) -> int:
    """A string of octal digits, as chmod takes it; or TOML's 0o660."""
    if value is None:
        return UNIX_MODE
    if isinstance(value, str) and re.fullmatch(r"[0-7]{3,4}", value):
        value = int(value, 8)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 0o777:
        raise ValueError(f"mode = {value!r} is no mode such as '0660'")
    return value


def _account(keys: Mapping[str, Any], key: str) -> str | int | None:
    value = keys.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32:
        return value
    raise ValueError(f"{key} = {value!r} is neither a name nor a number")
