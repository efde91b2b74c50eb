"""Both ends of a replication show a certificate that the configured authority has signed; there is no way without."""

from __future__ import annotations

import ssl
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nbdsnap.config import AcceptConfig, Config
from nbdsnap.errors import ConfigError


def server_context(config: Config) -> ssl.SSLContext:
    section = config.replication
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # what a client can read before it has sent all is an answer, hence a refusal
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key = section.certificate or config.tls.certificate, section.key or config.tls.key
    return _load(context, certificate, key, section.ca or config.tls.ca, "certificate, key and ca")


def client_context(config: Config) -> ssl.SSLContext:
    section = config.replication
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca = section.ca or config.tls.ca
    return _load(context, section.client_certificate, section.client_key, ca, "client_certificate, client_key and ca")


def _load(
    context: ssl.SSLContext, certificate: Path | None, key: Path | None, ca: Path | None, names: str
) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if certificate is None or key is None or ca is None:
        raise ConfigError(f"[replication] needs {names}", hint="`nbdsnap tls make-ca` makes some to try it with")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
        context.load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"[replication] {certificate}, {key} and {ca} can't be used: {error}") from None
    return context


def _no_password() -> str:
    raise ValueError("the key has a passphrase")


def peer_names(tls: ssl.SSLSocket) -> frozenset[str]:
    """What the other side's certificate, which was verified, calls it."""
    certificate: Any = tls.getpeercert() or {}
    names = {value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"}
    return frozenset(names | {value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "URI")})


def find_rule(rules: list[AcceptConfig], names: frozenset[str], volume: str) -> AcceptConfig | None:
    """The first rule that lets one of ``names`` replicate to ``volume``."""
    for rule in rules:
        known = any(fnmatchcase(name, pattern) for name in names for pattern in rule.certificate)
        if known and any(fnmatchcase(volume, pattern) for pattern in rule.volumes):
            return rule
    return None
