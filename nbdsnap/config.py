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
import re
import stat
import sys
import tomllib
from collections.abc import Iterable
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, ValidationInfo

from nbdsnap.addresses import (
    DEFAULT_PORT,
    Address,
    TcpAddress,
    Tls,
    UnixAddress,
    absolute_path,
    parse_address,
    parse_listener,
    socket_path,
)
from nbdsnap.engine.names import check_name
from nbdsnap.engine.schedule import Schedule, parse_schedules
from nbdsnap.errors import ConfigError, UsageError
from nbdsnap.sizes import parse_size
from nbdsnap.store.layout import DEFAULT_LOG_SIZE

DEFAULT_CONFIG = Path("/etc/nbdsnap/nbdsnap.toml")
MAX_CONFIG_BYTES = 16 << 20
"""A configuration of a hundred thousand volumes fits; a disk image given by mistake is refused before it is read."""


# What the validators below get is what TOML had: a wrong type raises ValueError, pydantic adds the key.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _folder(info: ValidationInfo) -> Path:
    folder: Path = info.context["folder"] if info.context else Path.cwd()
    return folder


def _path(value: object, info: ValidationInfo) -> Path:
    return value if isinstance(value, Path) else absolute_path(_text(value), _folder(info))


def _control(value: object, info: ValidationInfo) -> Path:
    return value if isinstance(value, Path) else socket_path(_text(value), _folder(info))


def _address(value: object, info: ValidationInfo) -> Address:
    if isinstance(value, Address):
        return value
    if isinstance(value, dict):
        return parse_listener(value, _folder(info))
    return parse_address(_text(value), _folder(info))


def _size(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str | int):
        raise ValueError(f"{value!r} is no size")
    size = parse_size(value)
    if size == 0:
        raise ValueError("a size is at least 1 byte")
    return size


def _network(value: object) -> str:
    """An entry of a rule's ``address``: a network, or one of the words for what has no network."""
    text = _text(value)
    if text in ("unix", "vsock") or re.fullmatch(r"vsock:[0-9]{1,10}", text):
        return text
    try:
        return str(ip_network(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no network: {error}") from None


def _account(value: object) -> str | int:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32:
        return value
    raise ValueError(f"{value!r} is neither a name nor a number")


def _pattern(value: object) -> str:
    """Of export names: VOLUME or VOLUME@NAME, with ``*``, ``?`` and ``[…]``."""
    text = _text(value)
    if not re.fullmatch(r"[^@]+(@[^@]+)?", text):
        raise ValueError(f"{text!r} is no pattern of an export's name")
    return text


def _name(value: object) -> str:
    try:
        return check_name(_text(value))
    except UsageError as error:
        raise ValueError(str(error)) from None


def _target(value: object) -> str:
    text = _text(value)
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    volume = parts.path.strip("/")
    if parts.scheme != "https" or not parts.hostname or port is None or parts.query or parts.fragment:
        raise ValueError(f"{text!r} is no target")
    if volume:
        _name(volume)
    return text


def _times(value: object) -> Schedule | None:
    """Due times, of a schedule without a name."""
    return None if value is None else parse_schedules({"at": {"at": _text(value), "keep": 1}})[0]


def _duration(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*(s|min|m|h|d)", _text(value))
        if match is None:
            raise ValueError(f"{value!r} is no span of time")
        seconds = float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[match[2]]
    if not 0.1 <= seconds <= 366 * 86400:
        raise ValueError(f"{value!r} is out of range: a tenth of a second to a year")
    return seconds


def _schedules(value: object) -> tuple[Schedule, ...]:
    if isinstance(value, tuple):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no table")
    return parse_schedules(value)


ConfigPath = Annotated[Path, PlainValidator(_path)]
SocketPath = Annotated[Path, PlainValidator(_control)]
ListenAddress = Annotated[Address, PlainValidator(_address)]
Size = Annotated[int | None, BeforeValidator(_size)]
LogSize = Annotated[int, Field(ge=64 << 10, le=64 << 30), BeforeValidator(_size)]
Name = Annotated[str, PlainValidator(_name)]
Network = Annotated[str, PlainValidator(_network)]
Account = Annotated[str | int, PlainValidator(_account)]
Pattern = Annotated[str, PlainValidator(_pattern)]
Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]
OptionBytes = Annotated[int, Field(ge=4 << 10, le=64 << 20), BeforeValidator(_size)]
FlightBytes = Annotated[int, Field(ge=1 << 20, le=1 << 40), BeforeValidator(_size)]

Target = Annotated[str, PlainValidator(_target)]
Times = Annotated[Schedule | None, PlainValidator(_times)]
Duration = Annotated[float, PlainValidator(_duration)]
DURATION_ALLOWED = "a number of seconds, or a string such as '30s', '15min', '1h' or '1d'"

Schedules = Annotated[tuple[Schedule, ...], PlainValidator(_schedules)]
Words = Annotated[list[str], Field(min_length=1)]
Timeout = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
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
    insecure: bool = Field(
        default=False,
        description="true or false: whether to listen beyond this machine without TLS and without an [[allow]] rule",
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
    snapshots: Schedules = Field(
        default=(),
        description="a table such as { hourly = 24, daily = 7, nightly = { at = '30 3 * * *', keep = 7 } }",
    )
    before_snapshot: Words = Field(default=[], description="a command: a list of one or more words")
    after_snapshot: Words = Field(default=[], description="a command: a list of one or more words")
    hook_timeout_s: Timeout = Field(default=30.0, description="seconds, above 0")


class TlsConfig(_Section):
    """``verify`` is None where the file leaves it to ``ca``: see :attr:`verify_clients`."""

    mode: Tls = Field(default="required", description="'off', 'optional' or 'required'")
    certificate: ConfigPath | None = Field(
        default=None,
        description="the path of the server's certificate, PEM, with those between it and the CA's behind it",
    )
    key: ConfigPath | None = Field(default=None, description="the path of its private key, PEM, without a passphrase")
    ca: ConfigPath | None = Field(
        default=None, description="the path of the certificates, PEM, that clients' certificates must descend from"
    )
    verify: Tls | None = Field(default=None, description="'off', 'optional' or 'required'")
    psk: ConfigPath | None = Field(
        default=None, description="the path of a file of lines NAME:KEY, the key in hexadecimal"
    )
    minimum_version: Literal["1.2", "1.3"] = Field(default="1.2", description="'1.2' or '1.3'")

    @property
    def verify_clients(self) -> Tls:
        """Whether a client has to show a certificate that ``ca`` has signed."""
        return self.verify or ("required" if self.ca is not None else "off")

    @property
    def files(self) -> tuple[Path, ...]:
        """What there is to read."""
        return tuple(path for path in (self.certificate, self.key, self.ca, self.psk) if path is not None)


class AllowConfig(_Section):
    """A client that meets every condition given may open these exports.  An empty tuple: no condition."""

    exports: list[Pattern] = Field(
        default=["*", "*@*"], min_length=1, description="a list of patterns such as ['vol', 'vol@*']"
    )
    mode: Literal["ro", "rw"] = Field(default="ro", description="'ro' or 'rw'")
    address: list[Network] | None = Field(
        default=None,
        min_length=1,
        description="a list of networks such as '10.0.0.0/8', 'fd00::/8', and of 'unix', 'vsock' and 'vsock:CID'",
    )
    uid: list[Account] | None = Field(default=None, min_length=1, description="a list of user names or numbers")
    gid: list[Account] | None = Field(default=None, min_length=1, description="a list of group names or numbers")
    certificate: list[str] | None = Field(
        default=None, min_length=1, description="a list of names in clients' certificates, or patterns of such names"
    )
    psk: list[str] | None = Field(
        default=None, min_length=1, description="a list of names of keys, or patterns of them"
    )


class ReplicationConfig(_Section):
    """What both ends of a replication need.  ``listen`` is for the receiving end."""

    listen: ListenAddress | None = Field(
        default=None, description="a TCP address such as 'tcp://0.0.0.0:10810', for those who replicate to here"
    )
    certificate: ConfigPath | None = Field(
        default=None, description="the path of the listener's certificate, PEM; without it, that of [tls]"
    )
    key: ConfigPath | None = Field(default=None, description="the path of its key, PEM; without it, that of [tls]")
    ca: ConfigPath | None = Field(
        default=None, description="the path of the authority's certificate, PEM; without it, that of [tls]"
    )
    client_certificate: ConfigPath | None = Field(
        default=None, description="the path of the certificate, PEM, to show to targets"
    )
    client_key: ConfigPath | None = Field(default=None, description="the path of its key, PEM")


class ReplicateConfig(_Section):
    """A volume of this pool that another pool is to follow."""

    volume: Name = Field(description="the name of a volume")
    target: Target = Field(description="https://HOST:PORT or https://HOST:PORT/VOLUME")
    every: Duration = Field(default=900.0, description=DURATION_ALLOWED)
    at: Times = Field(default=None, description="times as cron writes them, in UTC, such as '30 3 * * *'")
    rate_limit: Size = Field(default=None, description=f"{SIZE_ALLOWED}, per second")
    compress: Literal["none", "auto", "best"] = Field(default="auto", description="'none', 'auto' or 'best'")
    keep: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="how many of its snapshots to keep on the target; 0: all"
    )
    full: bool = Field(
        default=False, description="true or false: whether to send all again where no common snapshot is left"
    )


class AcceptConfig(_Section):
    """Who may replicate to which volumes of this pool."""

    certificate: list[str] = Field(
        min_length=1, description="a list of names in senders' certificates, or patterns of such names"
    )
    volumes: list[str] = Field(min_length=1, description="a list of names of volumes, or patterns of them")
    create: bool = Field(default=False, description="true or false: whether volumes are made where there are none")


class LimitsConfig(_Section):
    """0 seconds: no limit."""

    connections: Count = Field(default=1000, description="a number from 1")
    connections_per_client: Count = Field(default=500, description="a number from 1")
    handshake_s: Seconds = Field(default=10, gt=0, description="a number of seconds above 0")
    option_bytes: OptionBytes = Field(default=256 << 10, description=f"{SIZE_ALLOWED}, from 4KiB to 64MiB")
    in_flight_bytes: FlightBytes = Field(default=32 << 20, description=f"{SIZE_ALLOWED}, from 1MiB")
    in_flight_bytes_total: FlightBytes = Field(default=1 << 30, description=f"{SIZE_ALLOWED}, from 1MiB")
    in_flight_requests: Count = Field(default=4096, description="a number from 1")
    idle_s: Seconds = Field(default=0, description="a number of seconds; 0: without limit")
    stalled_s: Seconds = Field(default=600, description="a number of seconds; 0: without limit")
    linger_s: Seconds = Field(default=30, gt=0, description="a number of seconds above 0")
    shutdown_s: Seconds = Field(default=10, description="a number of seconds")
    keepalive_s: Annotated[int, Field(ge=0, le=32767)] = Field(
        default=60, description="a number of seconds to 32767; 0: off"
    )
    keepalive_interval_s: Annotated[int, Field(ge=1, le=32767)] = Field(
        default=15, description="a number of seconds from 1 to 32767"
    )
    keepalive_probes: Annotated[int, Field(ge=1, le=127)] = Field(default=4, description="a number from 1 to 127")


class Config(_Section):
    """The whole file.  ``file`` is where it was read from."""

    file: Path = Field(exclude=True)
    server: ServerConfig = Field(default=ServerConfig(), description="a table: [server]")
    pool: PoolConfig = Field(default=PoolConfig(), description="a table: [pool]")
    volumes: list[VolumeConfig] = Field(default=[], alias="volume", description="an array of tables: [[volume]]")
    tls: TlsConfig = Field(default=TlsConfig(mode="off"), description="a table: [tls]")
    limits: LimitsConfig = Field(default=LimitsConfig(), description="a table: [limits]")
    allow: list[AllowConfig] = Field(default=[], description="an array of tables: [[allow]]")
    replication: ReplicationConfig = Field(default=ReplicationConfig(), description="a table: [replication]")
    replicate: list[ReplicateConfig] = Field(default=[], description="an array of tables: [[replicate]]")
    accept: list[AcceptConfig] = Field(default=[], description="an array of tables: [[accept]]")


def hooks_of(config: Config) -> dict[str, dict[str, Any]]:
    """What to run around snapshots, by volume: the arguments of :class:`nbdsnap.engine.hooks.Hooks`."""
    return {
        volume.name: {
            "before": volume.before_snapshot,
            "after": volume.after_snapshot,
            "timeout_s": volume.hook_timeout_s,
        }
        for volume in config.volumes
        if volume.before_snapshot or volume.after_snapshot
    }


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
    _check_tls(config)
    _check_volumes(config)
    _check_replication(config)
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
    if location[0] not in _ARRAYS or len(location) == 1:
        section, *rest = location
        if not rest:
            return f"[{section}]" if section in _MODELS and section not in _ARRAYS else str(section)
        return f"[{section}] {rest[0]}" + "".join(f"[{index}]" for index in rest[1:])
    index = int(location[1])
    table = document[str(location[0])][index]
    name = table.get("name") if isinstance(table, dict) else None
    where = f"[[{location[0]}]] {index + 1}" + (f" ({name})" if isinstance(name, str) else "")
    if len(location) > 2:
        where += f": {location[2]}" + "".join(f"[{index}]" for index in location[3:])
    return where


_ARRAYS = ("allow", "volume", "replicate", "accept")
_MODELS: dict[str, type[BaseModel]] = {
    "server": ServerConfig,
    "pool": PoolConfig,
    "tls": TlsConfig,
    "limits": LimitsConfig,
    "allow": AllowConfig,
    "volume": VolumeConfig,
    "replication": ReplicationConfig,
    "replicate": ReplicateConfig,
    "accept": AcceptConfig,
}


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
    seen: set[str] = set()
    for index, address in enumerate(config.server.listen):
        where = f"{config.file}: [server] listen[{index}]"
        if str(address) in seen:
            raise ConfigError(f"{where}: {address} stands twice; allowed: distinct addresses")
        if isinstance(address, UnixAddress) and address.path == config.server.control:
            raise ConfigError(f"{where}: {address} is the control socket too; allowed: a path of its own")
        if not (isinstance(address, TcpAddress) and address.port == 0):  # 0 is a new port each time
            seen.add(str(address))


def _check_tls(config: Config) -> None:
    tls = config.tls
    where = f"{config.file}: [tls]"
    listeners = [address.tls or tls.mode for address in config.server.listen]
    if tls.mode == "off" and all(mode == "off" for mode in listeners):
        return
    if tls.psk is not None and sys.version_info < (3, 13):
        version = ".".join(map(str, sys.version_info[:3]))
        raise ConfigError(f"{where} psk: pre-shared keys need Python 3.13 or later, and this is {version}")
    if tls.certificate is None and tls.psk is None:
        raise ConfigError(
            f"{where} certificate: missing; TLS needs it, and its key",
            hint="`nbdsnap tls make-ca` makes some to try TLS with",
        )
    if tls.psk is not None and (tls.certificate or tls.ca):
        raise ConfigError(f"{where} psk: pre-shared keys take the place of certificates; allowed: one of the two")
    if (tls.certificate is None) != (tls.key is None):
        raise ConfigError(f"{where} key: a certificate and its key go together")
    if tls.verify_clients != "off" and tls.ca is None:
        raise ConfigError(f"{where} ca: missing; clients' certificates are verified with it")


def _check_replication(config: Config) -> None:
    if isinstance(config.replication.listen, UnixAddress) or (
        config.replication.listen is not None and not isinstance(config.replication.listen, TcpAddress)
    ):
        raise ConfigError(f"{config.file}: [replication] listen: allowed: a TCP address such as 'tcp://0.0.0.0:10810'")
    seen: set[tuple[str, str]] = set()
    for number, entry in enumerate(config.replicate, start=1):
        if (entry.volume, entry.target) in seen:
            raise ConfigError(f"{config.file}: [[replicate]] {number}: {entry.volume} to {entry.target} stands twice")
        seen.add((entry.volume, entry.target))


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
