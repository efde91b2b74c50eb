"""The configuration file: what is accepted, and what each mistake is called."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from nbdsnap.addresses import TcpAddress, UnixAddress
from nbdsnap.config import (
    AcceptConfig,
    AllowConfig,
    Config,
    LimitsConfig,
    PoolConfig,
    ReplicateConfig,
    ReplicationConfig,
    ServerConfig,
    TlsConfig,
    VolumeConfig,
    load_config,
)
from nbdsnap.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "conf" / "nbdsnap.toml"


def load(folder: Path, text: str) -> Config:
    file = folder / "nbdsnap.toml"
    file.write_text(text)
    return load_config(file)


def test_empty_file_has_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert config.server.listen == [TcpAddress("127.0.0.1", 10809)]
    assert config.server.control == Path("/run/nbdsnap/control.sock")
    assert config.pool.path == Path("/var/lib/nbdsnap")
    assert config.pool.store_limit is None
    assert config.volumes == []


def test_all_keys(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        [server]
        listen = ["tcp://[::1]:1", "tcp://localhost", "unix:///run/nbd.sock"]
        control = "/run/c.sock"
        [pool]
        path = "/pool"
        store_limit = "1K"
        [[volume]]
        name = "a"
        origin = "/dev/a"
        [[volume]]
        name = "b"
        origin = "/b"
        size = 4096
        [[volume]]
        name = "c"
        thin = true
        size = "1TiB"
        """,
    )
    assert config.server.listen == [
        TcpAddress("::1", 1),
        TcpAddress("localhost", 10809),
        UnixAddress(Path("/run/nbd.sock")),
    ]
    assert [str(address) for address in config.server.listen] == [
        "tcp://[::1]:1",
        "tcp://localhost:10809",
        "unix:///run/nbd.sock",
    ]
    assert config.pool.store_limit == 1024
    assert [(one.name, one.origin, one.size, one.thin) for one in config.volumes] == [
        ("a", Path("/dev/a"), None, False),
        ("b", Path("/b"), 4096, False),
        ("c", None, 1 << 40, True),
    ]


def test_relative_paths_are_relative_to_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "etc" / "c.toml").write_text(
        '[server]\nlisten = ["unix://n.sock"]\ncontrol = "../c.sock"\n[pool]\npath = "p"\n'
        '[[volume]]\nname = "v"\norigin = "sub/v.img"\n'
    )
    config = load_config(Path("etc/c.toml"))
    assert config.file == tmp_path / "etc" / "c.toml"
    assert config.server.listen == [UnixAddress(tmp_path / "etc" / "n.sock")]
    assert config.server.control == tmp_path / "c.sock"
    assert config.pool.path == tmp_path / "etc" / "p"
    assert config.volumes[0].origin == tmp_path / "etc" / "sub" / "v.img"


VOLUME = '[[volume]]\nname = "v"\norigin = "v.img"\n'

MISTAKES = {
    "unknown section": ("[sever]\nlisten = []", "sever: unknown key; allowed here: server, pool, volume"),
    "unknown key": ("[server]\nport = 1", "[server] port: unknown key; allowed here: listen, control"),
    "unknown key beside a missing one": (
        '[[volume]]\nname = "v"\norgin = "x"',
        "[[volume]] 1 (v): orgin: unknown key; allowed here: name, origin, thin, size",
    ),
    "a key that is ours": ("file = 1", "unknown key 'file'; allowed here: server, pool, volume"),
    "section of a wrong type": ("server = 5", "[server]: 5 does not fit; allowed: a table"),
    "listen is no list": ('[server]\nlisten = "tcp://a"', "[server] listen: 'tcp://a' does not fit; allowed: a list"),
    "listen is empty": ("[server]\nlisten = []", "[server] listen: [] does not fit; allowed: a list of one or more"),
    "listen holds a number": ("[server]\nlisten = [5]", "[server] listen[0]: 5 is not a string; allowed: "),
    "no scheme": ('[server]\nlisten = ["a:1"]', "[server] listen[0]: 'a:1' is no address; allowed: "),
    "unknown scheme": ('[server]\nlisten = ["udp://a:1"]', "listen[0]: 'udp://a:1' is no address"),
    "no host": ('[server]\nlisten = ["tcp://:1"]', "listen[0]: 'tcp://:1' is no address"),
    "a path after the port": ('[server]\nlisten = ["tcp://a:1/b"]', "listen[0]: 'tcp://a:1/b' is no address"),
    "port out of range": ('[server]\nlisten = ["tcp://a:65536"]', "listen[0]: 'tcp://a:65536' is no address: Port"),
    "no path": ('[server]\nlisten = ["unix://"]', "listen[0]: '' is no path"),
    "listens twice": ('[server]\nlisten = ["unix://a", "unix://b/../a"]', "listen[1]: unix:///"),
    "control is a listener": ('[server]\nlisten = ["unix://a"]\ncontrol = "a"', "is the control socket too"),
    "control is a number": ("[server]\ncontrol = 5", "[server] control: 5 is not a string; allowed: the path"),
    "control is too long": (f'[server]\ncontrol = "/{"x" * 107}"', "longer than a socket's path may be, 107 bytes"),
    "pool path is a list": ('[pool]\npath = ["p"]', "[pool] path: ['p'] is not a string; allowed: the path"),
    "limit is no size": ('[pool]\nstore_limit = "10Q"', "[pool] store_limit: '10Q' is no size"),
    "limit is zero": ("[pool]\nstore_limit = 0", "[pool] store_limit: a size is at least 1 byte; allowed: bytes"),
    "limit is a boolean": ("[pool]\nstore_limit = true", "[pool] store_limit: a size is a number of bytes"),
    "volume is one table": ('[volume]\nname = "v"', "volume: {'name': 'v'} does not fit; allowed: an array of tables"),
    "volume is a number": ("volume = [5]", "[[volume]] 1: 5 does not fit; allowed: an array of tables"),
    "thin, with an origin": (VOLUME + "thin = true\nsize = 1\n", "[[volume]] 1 (v): thin: it has an origin"),
    "thin, without a size": ('[[volume]]\nname = "v"\nthin = true', "[[volume]] 1 (v): size: missing; a thin volume"),
    "no origin": ('[[volume]]\nname = "v"', "[[volume]] 1 (v): origin: missing; it is the path of a raw file"),
    "no name": (VOLUME + '[[volume]]\norigin = "x"', "[[volume]] 2: name: missing; it is a letter or digit"),
    "name out of the alphabet": (
        '[[volume]]\nname = "a/b"\norigin = "x"',
        "[[volume]] 1 (a/b): name: 'a/b' is no name",
    ),
    "name is a number": ('[[volume]]\nname = 5\norigin = "x"', "[[volume]] 1: name: 5 is not a string"),
    "negative size": (VOLUME + "size = -1", "[[volume]] 1 (v): size: size -1 is out of range"),
    "size is a float": (VOLUME + "size = 1.5", "[[volume]] 1 (v): size: 1.5 is no size"),
    "one name twice": (
        VOLUME + '[[volume]]\nname = "v"\norigin = "w.img"',
        "[[volume]] 2 (v): name: [[volume]] 1 has it too; allowed: distinct names",
    ),
    "one path twice": (
        VOLUME + '[[volume]]\nname = "w"\norigin = "x/../v.img"',
        "v.img is the origin of [[volume]] 1 too; allowed: a file or device of its own for each volume",
    ),
    "not TOML": ("[server", "not TOML: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named_with_its_file_and_key(tmp_path: Path, mistake: str) -> None:
    text, complaint = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/nbdsnap.toml: ")
    assert complaint in message
    assert "\n" not in message
    assert caught.value.exit_code == 3
    assert [one.name for one in tmp_path.iterdir()] == ["nbdsnap.toml"]


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_two_volumes_on_one_file_by_a_link(tmp_path: Path, link: str) -> None:
    (tmp_path / "v.img").touch()
    if link == "hard":
        (tmp_path / "w.img").hardlink_to(tmp_path / "v.img")
    else:
        (tmp_path / "w.img").symlink_to("v.img")
    with pytest.raises(ConfigError, match=r"\[\[volume\]\] 2 \(w\): origin: .*w.img is the origin of \[\[volume\]\] 1"):
        load(tmp_path, VOLUME + '[[volume]]\nname = "w"\norigin = "w.img"')


def test_distinct_volumes_are_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "v.img").touch()
    (tmp_path / "w.img").touch()
    config = load(tmp_path, VOLUME + '[[volume]]\nname = "w"\norigin = "w.img"\n[[volume]]\nname = "x"\norigin = "x"')
    assert [one.name for one in config.volumes] == ["v", "w", "x"]


def test_port_0_may_stand_twice(tmp_path: Path) -> None:
    assert len(load(tmp_path, '[server]\nlisten = ["tcp://a:0", "tcp://a:0"]').server.listen) == 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: cannot read the configuration: No such file") as caught:
        load_config(tmp_path / "no.toml")
    assert "--config" in caught.value.advice


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(tmp_path / "image")


def test_endless_file() -> None:
    with pytest.raises(ConfigError, match="longer than"):
        load_config(Path("/dev/zero"))


# The example in conf/


def test_example_loads() -> None:
    config = load_config(EXAMPLE)
    assert config.pool.path == Path("/var/lib/nbdsnap")
    assert config.volumes[0].size == 10 << 30


def leaf_keys(model: type[BaseModel]) -> Iterator[str]:
    return (field.alias or name for name, field in model.model_fields.items() if not field.exclude)


def switched_on() -> str:
    """The example with the settings that it only shows."""
    return re.sub(r"^#(?=[a-z\[])", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_example_mentions_every_key() -> None:
    example = tomllib.loads(switched_on())
    assert set(example) == set(leaf_keys(Config))
    assert set(example["server"]) == set(leaf_keys(ServerConfig))
    assert set(example["pool"]) == set(leaf_keys(PoolConfig))
    assert set(example["volume"][0]) == set(leaf_keys(VolumeConfig))
    assert set(example["tls"]) == set(leaf_keys(TlsConfig))
    assert set(example["limits"]) == set(leaf_keys(LimitsConfig))
    assert set(example["allow"][0]) == set(leaf_keys(AllowConfig))
    assert set(example["replication"]) == set(leaf_keys(ReplicationConfig))
    assert set(example["replicate"][0]) == set(leaf_keys(ReplicateConfig))
    assert set(example["accept"][0]) == set(leaf_keys(AcceptConfig))


def test_example_shows_the_defaults_of_limits() -> None:
    assert load_config(EXAMPLE).limits == LimitsConfig()


def test_example_with_everything_loads(tmp_path: Path) -> None:
    """But the keys, which take the place of certificates."""
    config = load(tmp_path, re.sub(r"^psk = \"/.*$", "", switched_on(), flags=re.MULTILINE))
    assert len(config.allow) == 1
    assert config.tls.verify_clients == "required"


def test_example_comments_every_key() -> None:
    lines = switched_on().splitlines()
    for number, line in enumerate(lines):
        if line and not line.startswith(("#", "[")):
            assert lines[number - 1].startswith("# "), f"{line!r} has no comment"


# Replication


def test_replication(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        [replication]
        listen = "tcp://0.0.0.0:10810"
        [[replicate]]
        volume = "vol"
        target = "https://host:10810"
        every = "90s"
        rate_limit = "1MiB"
        [[replicate]]
        volume = "vol"
        target = "https://[::1]:1/other"
        [[accept]]
        certificate = ["a*"]
        volumes = ["v*"]
        """,
    )
    first, second = config.replicate
    assert (first.every, first.rate_limit, first.keep, first.full) == (90.0, 1 << 20, 0, False)
    assert (second.target, second.every) == ("https://[::1]:1/other", 900.0)
    assert config.accept[0].create is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[replication]\nlisten = "unix:///x"', "[replication] listen: allowed: a TCP address"),
        (
            '[[replicate]]\nvolume = "vol"\ntarget = "http://host:1"',
            "[[replicate]] 1: target: 'http://host:1' is no target",
        ),
        ('[[replicate]]\nvolume = "vol"\ntarget = "https://host"', "is no target"),
        ('[[replicate]]\nvolume = "vol"\ntarget = "https://host:1/a/b"', "is no name"),
        ('[[replicate]]\nvolume = "vol"\ntarget = "https://host:1"\nevery = "soon"', "'soon' is no span of time"),
        ('[[replicate]]\nvolume = "vol"\ntarget = "https://host:1"\nevery = 0', "out of range"),
        (
            '[[replicate]]\nvolume = "vol"\ntarget = "https://host:1"\nat = "noon"',
            "1: at: at: 'noon' is no time of day",
        ),
        ('[[replicate]]\nvolume = "vol"', "[[replicate]] 1: target: missing"),
        ('[[replicate]]\nvolume = "v"\ntarget = "https://h:1"\n' * 2, "stands twice"),
        ('[[accept]]\ncertificate = ["a"]', "[[accept]] 1: volumes: missing"),
    ],
)
def test_mistakes_of_replication(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, text)


# TLS, rules and limits

CERTIFICATE = '[tls]\ncertificate = "c.pem"\nkey = "k.pem"\n'

SECURITY_MISTAKES = {
    "TLS without a certificate": ("[tls]\n", "[tls] certificate: missing; TLS needs it"),
    "a listener's TLS without a certificate": (
        '[server]\nlisten = [{ address = "tcp://a", tls = "optional" }]',
        "[tls] certificate: missing",
    ),
    "a certificate without its key": (
        '[tls]\ncertificate = "c.pem"',
        "[tls] key: a certificate and its key go together",
    ),
    "verification without a ca": (CERTIFICATE + 'verify = "required"', "[tls] ca: missing"),
    "unknown mode": ('[tls]\nmode = "on"', "[tls] mode: 'on' does not fit; allowed: 'off', 'optional' or 'required'"),
    "unknown key of TLS": (
        '[tls]\ncert = "c.pem"',
        "[tls] cert: unknown key; allowed here: mode, certificate, key, ca, verify, psk, minimum_version",
    ),
    "an old version": (CERTIFICATE + 'minimum_version = "1.1"', "[tls] minimum_version: '1.1' does not fit"),
    "a listener's table": (
        '[server]\nlisten = [{ address = "unix://s", mode = "9" }]',
        "[server] listen[0]: mode = '9' is no mode such as '0660'; allowed: a list",
    ),
    "a rule that is a table": ("[allow]", "allow: {} does not fit; allowed: an array of tables"),
    "unknown key of a rule": (
        '[[allow]]\nexport = ["a"]',
        "[[allow]] 1: export: unknown key; allowed here: exports, mode, address, uid, gid, certificate, psk",
    ),
    "a network with bits behind it": (
        '[[allow]]\n[[allow]]\naddress = ["unix", "10.0.0.1/8"]',
        "[[allow]] 2: address[1]: '10.0.0.1/8' is no network: 10.0.0.1/8 has host bits set",
    ),
    "a network that is none": ('[[allow]]\naddress = ["here"]', "[[allow]] 1: address[0]: 'here' is no network"),
    "no network at all": ("[[allow]]\naddress = []", "[[allow]] 1: address: [] does not fit; allowed: a list"),
    "a pattern that is none": ('[[allow]]\nexports = ["a@b@c"]', "[[allow]] 1: exports[0]: 'a@b@c' is no pattern"),
    "a mode of access": ('[[allow]]\nmode = "w"', "[[allow]] 1: mode: 'w' does not fit; allowed: 'ro' or 'rw'"),
    "a user": ("[[allow]]\nuid = [-1]", "[[allow]] 1: uid[0]: -1 is neither a name nor a number"),
    "a handshake of no time": ("[limits]\nhandshake_s = 0", "[limits] handshake_s: 0 does not fit; allowed: a number"),
    "a negative time": ("[limits]\nidle_s = -1", "[limits] idle_s: -1 does not fit"),
    "endless": ("[limits]\nidle_s = inf", "[limits] idle_s: inf does not fit"),
    "no connection": ("[limits]\nconnections = 0", "[limits] connections: 0 does not fit"),
    "tiny options": ('[limits]\noption_bytes = "1K"', "[limits] option_bytes: 1024 does not fit; allowed: bytes"),
    "nothing in flight": ("[limits]\nin_flight_bytes = 5", "[limits] in_flight_bytes: 5 does not fit"),
    "insecure is a word": (
        '[server]\ninsecure = "yes"',
        "[server] insecure: 'yes' does not fit; allowed: true or false",
    ),
}


@pytest.mark.parametrize("mistake", SECURITY_MISTAKES)
def test_security_mistake_is_named_with_its_key(tmp_path: Path, mistake: str) -> None:
    text, complaint = SECURITY_MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tls_and_rules(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        CERTIFICATE + 'ca = "ca.pem"\n[[allow]]\naddress = ["192.0.2.1", "::1", "vsock:3"]\nuid = ["root", 5]\n'
        '[server]\nlisten = [{ address = "unix://s", mode = "0600", tls = "off" }, "tcp://a"]\n',
    )
    assert (config.tls.mode, config.tls.verify_clients) == ("required", "required")
    assert config.tls.files == tuple(tmp_path / name for name in ("c.pem", "k.pem", "ca.pem"))
    assert config.server.listen == [UnixAddress(tmp_path / "s", "off", 0o600), TcpAddress("a", 10809)]
    (rule,) = config.allow
    assert rule.address == ["192.0.2.1/32", "::1/128", "vsock:3"]
    assert (rule.mode, rule.exports, rule.uid, rule.gid) == ("ro", ["*", "*@*"], ["root", 5], None)


def test_without_tls_it_is_off_and_with_it_required(tmp_path: Path) -> None:
    assert load(tmp_path, "").tls.mode == "off"
    config = load(tmp_path, CERTIFICATE)
    assert (config.tls.mode, config.tls.verify_clients) == ("required", "off")
