"""Who may do what: the configuration's ``[[allow]]`` rules, and the exports as one client sees them.

A rule holds for a client that meets all of its conditions.  What a client may do with an export is the most that a rule
gives it; without any rule, everybody may do everything.  An export that a client may not open does not exist for
it: it is not listed, and asking for it is answered like asking for what is not there.

A pattern without ``@`` names volumes (their live data), one with ``@`` snapshots: ``*`` is every volume, ``vol@*``
every snapshot of ``vol``.
"""

from __future__ import annotations

import fnmatch
import grp
import pwd
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Literal

from nbdsnap.config import AllowConfig
from nbdsnap.engine.device import Device
from nbdsnap.errors import ConfigError
from nbdsnap.nbd.session import ExportInfo, ExportSource
from nbdsnap.server.maps import base_of
from nbdsnap.server.peer import Peer

Mode = Literal["ro", "rw"]


class Rule:
    """One ``[[allow]]`` table.  ConfigError for a user or group that this machine does not know."""

    def __init__(self, config: AllowConfig) -> None:
        self.mode: Mode = config.mode
        self._live = _any_of(pattern for pattern in config.exports if "@" not in pattern)
        self._snapshots = _any_of(pattern for pattern in config.exports if "@" in pattern)
        self._conditions = list(_conditions(config))

    def holds_for(self, peer: Peer) -> bool:
        return all(condition(peer) for condition in self._conditions)

    def covers(self, export: str) -> bool:
        pattern = self._snapshots if "@" in export else self._live
        return pattern is not None and pattern.fullmatch(export) is not None


class Access:
    """All the rules.  In memory, and quick."""

    def __init__(self, rules: Sequence[AllowConfig] = ()) -> None:
        self._rules = [Rule(rule) for rule in rules]

    def rules_for(self, peer: Peer) -> Rules:
        return Rules([rule for rule in self._rules if rule.holds_for(peer)] if self._rules else None)


class Rules:
    """Those that hold for one client; None: there are none at all."""

    def __init__(self, rules: Sequence[Rule] | None) -> None:
        self._rules = rules

    def mode(self, export: str) -> Mode | None:
        """What the client may do with it; None: nothing."""
        if self._rules is None:
            return "rw"
        modes = {rule.mode for rule in self._rules if rule.covers(export)}
        return "rw" if "rw" in modes else "ro" if modes else None

    def narrow(self, info: ExportInfo) -> ExportInfo | None:
        mode = self.mode(info.name)
        if mode is None:
            return None
        return info if mode == "rw" or info.read_only else replace(info, read_only=True)


class ClientExports:
    """An :class:`~nbdsnap.nbd.session.ExportSource` of what ``peer`` may open, by the rules of the moment."""

    def __init__(self, source: ExportSource[Device], access: Callable[[], Access], peer: Peer) -> None:
        self._source = source
        self._access = access
        self._peer = peer

    def _rules(self) -> Rules:
        return self._access().rules_for(self._peer)

    def list(self) -> Iterator[ExportInfo]:
        rules = self._rules()
        for info in self._source.list():
            narrowed = rules.narrow(info)
            if narrowed is not None:
                yield narrowed

    def find(self, name: str) -> ExportInfo | None:
        info = self._source.find(name)
        return None if info is None else self._rules().narrow(info)

    def open(self, name: str, contexts: Sequence[str]) -> Device | None:
        info = self.find(name)
        return None if info is None else self._source.open(info.name, contexts)

    def meta_contexts(self, name: str) -> Sequence[str]:
        info = self.find(name)
        if info is None:
            return ()
        volume = info.name.partition("@")[0]
        rules = self._rules()
        return [context for context in self._source.meta_contexts(name) if _tells_nothing(context, volume, rules)]


def _tells_nothing(context: str, volume: str, rules: Rules) -> bool:
    """Whether a context tells nothing of a snapshot that the client may not open."""
    base = base_of(context)
    return base is None or rules.mode(f"{volume}@{base}") is not None


# Conditions


def _conditions(config: AllowConfig) -> Iterator[Callable[[Peer], bool]]:
    if config.address is not None:
        yield _address_condition(config.address)
    if config.uid is not None:
        users = {_number(user, _find_user, "uid") for user in config.uid}
        yield lambda peer: peer.uid in users
    if config.gid is not None:
        groups = frozenset(_number(group, _find_group, "gid") for group in config.gid)
        yield lambda peer: bool(peer.gids & groups)
    if config.certificate is not None:
        names = _any_of(map(str.lower, config.certificate))
        assert names is not None
        yield lambda peer: any(names.fullmatch(name.lower()) for name in peer.certificates)
    if config.psk is not None:
        keys = _any_of(config.psk)
        assert keys is not None
        yield lambda peer: peer.psk is not None and keys.fullmatch(peer.psk) is not None


def _address_condition(entries: Iterable[str]) -> Callable[[Peer], bool]:
    networks: list[IPv4Network | IPv6Network] = []
    machines: set[int] = set()
    words: set[str] = set()
    for entry in entries:
        if entry in ("unix", "vsock"):
            words.add(entry)
        elif entry.startswith("vsock:"):
            machines.add(int(entry.removeprefix("vsock:")))
        else:
            networks.append(ip_network(entry))

    def holds(peer: Peer) -> bool:
        if peer.address is not None:
            return any(peer.address in network for network in networks)
        if peer.cid is not None:
            return "vsock" in words or peer.cid in machines
        return peer.uid is not None and "unix" in words

    return holds


def _any_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    """One expression for all; None where there are none."""
    found = "|".join(fnmatch.translate(pattern) for pattern in patterns)
    return re.compile(found) if found else None


def _number(account: str | int, find: Callable[[str], int], key: str) -> int:
    if isinstance(account, int):
        return account
    try:
        return find(account)
    except KeyError:
        raise ConfigError(f"[[allow]] {key}: this machine knows no {account!r}") from None


def _find_user(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _find_group(name: str) -> int:
    return grp.getgrnam(name).gr_gid
