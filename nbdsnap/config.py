"""The configuration file: TOML in, checked and frozen models out.

Invariants of a :class:`Config` that :func:`load_config` returned:

* every path is absolute: a relative one in the file was relative to the file's folder;
* volume names are distinct and valid, and no two volumes lie on one file (or one block device);
* the listeners and the control socket are distinct, and their paths fit a socket address.

Everything else (is the origin readable, is the port free) is found out by whoever opens it.  An error names the file,
the key and what is allowed; nothing on disk is changed here.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, ValidationInfo

from nbdsnap.engine.names import check_name
from nbdsnap.errors import ConfigError, UsageError
from nbdsnap.sizes import parse_size
from nbdsnap.store.layout import DEFAULT_LOG_SIZE

DEFAULT_CONFIG = Path("/etc/nbdsnap/nbdsnap.toml")
DEFAULT_PORT = 10809
"""NBD's port at IANA."""

MAX_SOCKET_PATH = 107
"""Bytes of a unix socket's path: ``sun_path`` of 108, less the terminating NUL (unix(7))."""

MAX_CONFIG_BYTES = 16 << 20
"""A configuration of a hundred thousand volumes fits; a disk image given by mistake is refused before it is read."""


@dataclass(frozen=True)
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    path: Path

    def __str__(self) -> str:
        return f"unix://{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str, folder: Path) -> Address:
    """``tcp://HOST[:PORT]`` or ``unix://PATH``; ValueError, with a message for a person, where it is neither."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme == "unix":
        return UnixAddress(_socket_path(rest, folder))
    if not separator or scheme != "tcp":
        raise ValueError(f"{text!r} is no address")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{text!r} is no address: {error}") from None
    if not host or parts.path or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{text!r} is no address")
    return TcpAddress(host, DEFAULT_PORT if port is None else port)


def _absolute(text: str, folder: Path) -> Path:
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path")
    return Path(os.path.normpath(folder / text))


def _socket_path(text: str, folder: Path) -> Path:
    path = _absolute(text, folder)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(f"{path} is longer than a socket's path may be, {MAX_SOCKET_PATH} bytes")
    return path


# What the validators below get is what TOML had: a wrong type raises ValueError, pydantic adds the key.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _folder(info: ValidationInfo) -> Path:
    folder: Path = info.context["folder"] if info.context else Path.cwd()
    return folder


def _path(value: object, info: ValidationInfo) -> Path:
    return value if isinstance(value, Path) else _absolute(_text(value), _folder(info))


def _control(value: object, info: ValidationInfo) -> Path:
    return value if isinstance(value, Path) else _socket_path(_text(value), _folder(info))


def _address(value: object, info: ValidationInfo) -> Address:
    return value if isinstance(value, Address) else parse_address(_text(value), _folder(info))


def _size(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str | int):
        raise ValueError(f"{value!r} is no size")
    size = parse_size(value)
    if size == 0:
        raise ValueError("a size is at least 1 byte")
    return size


def _name(value: object) -> str:
    try:
        return check_name(_text(value))
    except UsageError as error:
        raise ValueError(str(error)) from None


ConfigPath = Annotated[Path, PlainValidator(_path)]
SocketPath = Annotated[Path, PlainValidator(_control)]
ListenAddress = Annotated[Address, PlainValidator(_address)]
Size = Annotated[int | None, BeforeValidator(_size)]
LogSize = Annotated[int, Field(ge=64 << 10, le=64 << 30), BeforeValidator(_size)]
Name = Annotated[str, PlainValidator(_name)]

Percent = Annotated[int, Field(ge=1, le=100)]

SIZE_ALLOWED = "bytes, or a string with a unit of K M G T (powers of 1024) such as '10GiB'"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ServerConfig(_Section):
    listen: list[ListenAddress] = Field(
        default=[TcpAddress("127.0.0.1", DEFAULT_PORT)],
        min_length=1,
        description="a list of one or more addresses such as 'tcp://127.0.0.1:10809' or 'unix:///run/nbdsnap/nbd.sock'",
    )
    control: SocketPath = Field(
        default=Path("/run/nbdsnap/control.sock"),
        description="the path of the management API's unix socket, at most 107 bytes",
    )


class PoolConfig(_Section):
    path: ConfigPath = Field(default=Path("/var/lib/nbdsnap"), description="the path of the pool's directory")
    store_limit: Size = Field(default=None, description=SIZE_ALLOWED)
    log_size: LogSize = Field(default=DEFAULT_LOG_SIZE, description=f"{SIZE_ALLOWED}, from 64KiB to 64GiB")
    on_full: Literal["refuse-writes", "drop-snapshots"] = Field(
        default="refuse-writes", description="'refuse-writes' or 'drop-snapshots'"
    )
    warn_at: list[Percent] = Field(default=[80, 90], description="a list of percentages, 1 to 100, such as [80, 90]")


class VolumeConfig(_Section):
    name: Name = Field(description="a letter or digit, then up to 127 of letters, digits and ._-")
    origin: ConfigPath | None = Field(default=None, description="the path of a raw file or block device")
    thin: bool = Field(default=False, description="true, for a volume without an origin")
    size: Size = Field(default=None, description=SIZE_ALLOWED)


class Config(_Section):
    """The whole file.  ``file`` is where it was read from."""

    file: Path = Field(exclude=True)
    server: ServerConfig = Field(default=ServerConfig(), description="a table: [server]")
    pool: PoolConfig = Field(default=PoolConfig(), description="a table: [pool]")
    volumes: list[VolumeConfig] = Field(default=[], alias="volume", description="an array of tables: [[volume]]")


def load_config(path: Path) -> Config:
    """Read and check the file; :class:`ConfigError` where anything is wrong with it."""
    file = path.absolute()  # links are not resolved: "relative to its folder" is the folder that the user named
    document = _read(file)
    if "file" in document:
        raise ConfigError(f"{file}: unknown key 'file'; allowed here: {_keys(Config)}")
    try:
        config = Config.model_validate({**document, "file": file}, context={"folder": file.parent})
    except ValidationError as error:
        raise ConfigError(f"{file}: {_explain(error, document)}") from None
    _check_sockets(config)
    _check_volumes(config)
    return config


def _read(file: Path) -> dict[str, Any]:
    hint = "name another with --config FILE or NBDSNAP_CONFIG, or write it after the example conf/nbdsnap.toml"
    try:
        if stat.S_ISDIR(file.stat().st_mode):
            raise ConfigError(f"{file}: the configuration is a directory", hint=hint)
        with file.open("rb") as stream:
            content = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the configuration: {error.strerror}", hint=hint) from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{file}: the configuration is longer than {MAX_CONFIG_BYTES} bytes", hint=hint)
    try:
        return tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None


# Errors, in a user's words


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(field.alias or name for name, field in model.model_fields.items() if not field.exclude)


def _explain(error: ValidationError, document: dict[str, Any]) -> str:
    """The most telling one of the errors: a mistyped key explains the missing one beside it."""
    found = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location, kind = found["loc"], found["type"]
    where = _locate(location, document)
    if kind == "extra_forbidden":
        return f"{where}: unknown key; allowed here: {_keys(_model_at(location[:-1]))}"
    allowed = _allowed(location)
    if kind == "missing":
        return f"{where}: missing; it is {allowed}"
    problem = str(found["ctx"]["error"]) if kind == "value_error" else f"{found['input']!r} does not fit"
    return f"{where}: {problem}; allowed: {allowed}"


def _locate(location: tuple[int | str, ...], document: dict[str, Any]) -> str:
    """As the file shows it: ``[server] listen[0]``, ``[[volume]] 2 (vol): size``, its tables counted from 1."""
    if location[0] != "volume" or len(location) == 1:
        section, *rest = location
        if not rest:
            return f"[{section}]" if section in ("server", "pool") else str(section)
        return f"[{section}] {rest[0]}" + "".join(f"[{index}]" for index in rest[1:])
    index = int(location[1])
    volume = document["volume"][index]
    name = volume.get("name") if isinstance(volume, dict) else None
    where = f"[[volume]] {index + 1}" + (f" ({name})" if isinstance(name, str) else "")
    return where + "".join(f": {key}" for key in location[2:])


_MODELS: dict[str, type[BaseModel]] = {"server": ServerConfig, "pool": PoolConfig, "volume": VolumeConfig}


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    return _MODELS[str(location[0])] if location else Config


def _allowed(location: tuple[int | str, ...]) -> str:
    fields = {field.alias or name: field for name, field in Config.model_fields.items()}
    allowed = fields[str(location[0])].description
    keys = [key for key in location[1:] if isinstance(key, str)]
    if keys:
        allowed = _model_at(location).model_fields[keys[0]].description
    assert allowed is not None, location
    return allowed


# What no single key shows


def _check_sockets(config: Config) -> None:
    seen: set[Address] = set()
    for index, address in enumerate(config.server.listen):
        where = f"{config.file}: [server] listen[{index}]"
        if address in seen:
            raise ConfigError(f"{where}: {address} stands twice; allowed: distinct addresses")
        if isinstance(address, UnixAddress) and address.path == config.server.control:
            raise ConfigError(f"{where}: {address} is the control socket too; allowed: a path of its own")
        if not (isinstance(address, TcpAddress) and address.port == 0):  # 0 is a new port each time
            seen.add(address)


def _check_volumes(config: Config) -> None:
    names: dict[str, int] = {}
    origins: dict[object, int] = {}
    for number, volume in enumerate(config.volumes, start=1):
        where = f"{config.file}: [[volume]] {number} ({volume.name})"
        if volume.name in names:
            raise ConfigError(f"{where}: name: [[volume]] {names[volume.name]} has it too; allowed: distinct names")
        names[volume.name] = number
        if volume.origin is None and not volume.thin:
            raise ConfigError(f"{where}: origin: missing; it is the path of a raw file or block device")
        if volume.thin and volume.origin is not None:
            raise ConfigError(f"{where}: thin: it has an origin; allowed: one of both")
        if volume.thin and volume.size is None:
            raise ConfigError(f"{where}: size: missing; a thin volume needs one: {SIZE_ALLOWED}")
        if volume.origin is None:
            continue
        for identity in _identities(volume.origin):
            if identity in origins:
                first = origins[identity]
                raise ConfigError(
                    f"{where}: origin: {volume.origin} is the origin of [[volume]] {first} too; "
                    "allowed: a file or device of its own for each volume"
                )
            origins[identity] = number


def _identities(origin: Path) -> Iterable[object]:
    """What two paths to one file or device share: the path without links; where it exists, the inode or device."""
    identities: set[object] = {os.path.realpath(origin)}
    try:
        status = origin.stat()
    except OSError:
        return identities  # a missing one may be created; an unreadable one is reported by who opens it
    block = stat.S_ISBLK(status.st_mode)
    identities.add(("device", status.st_rdev) if block else ("inode", status.st_dev, status.st_ino))
    return identities
