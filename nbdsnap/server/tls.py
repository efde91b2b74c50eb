"""Certificates and keys: read at the start, and again when they have changed, without a restart.

Whoever shakes hands asks :meth:`TlsKeeper.current` for a context.  It looks at the files (inodes, sizes and times) and
reads them anew where they differ: a certificate that was renewed is used by the next client, those connected keep
theirs.  Files that can't be used are an error at the start; later they are logged, and the last good ones stay in use.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from nbdsnap.config import TlsConfig
from nbdsnap.errors import ConfigError

log = logging.getLogger(__name__)

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: forward secrecy and authenticated encryption.  TLS 1.3 has nothing else."""

PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES256-GCM-SHA384:DHE-PSK-AES128-GCM-SHA256"
"""The same, with pre-shared keys."""

MAX_PSK_BYTES = 1 << 20
MIN_PSK_BITS = 128

Stamp = tuple[tuple[int, int, int, int] | None, ...]


class TlsKeeper:
    """``current`` and ``reload`` wait for a disk: call them on a worker thread, or before the loop runs."""

    def __init__(self, config: TlsConfig) -> None:
        self._lock = threading.Lock()
        self._config = config
        self._stamp = _stamp(config)
        self._context = make_context(config)

    def current(self) -> ssl.SSLContext:
        """The context for the next handshake."""
        with self._lock:
            stamp = _stamp(self._config)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._context = make_context(self._config)
                    log.info("the certificates have changed, and are used from now on")
                except ConfigError as error:
                    log.error("the certificates have changed, and the former stay in use: %s", error)
            return self._context

    def reload(self, config: TlsConfig) -> None:
        """Use another configuration; ConfigError, with nothing changed, where it can't be used."""
        stamp = _stamp(config)
        context = make_context(config)
        with self._lock:
            self._config, self._stamp, self._context = config, stamp, context


def make_context(config: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if config.minimum_version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.num_tickets = 0  # no client of NBD's resumes a session
    context.set_ciphers(CIPHERS if config.psk is None else PSK_CIPHERS)
    if config.certificate is not None and config.key is not None:
        _load(config.certificate, "certificate")
        _load(config.key, "key")
        try:
            context.load_cert_chain(config.certificate, config.key, password=_no_password)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"[tls] certificate {config.certificate} and key {config.key} can't be used: {_reason(error)}",
                hint="both are PEM, and the key has no passphrase and belongs to the certificate",
            ) from None
    if config.verify_clients != "off" and config.ca is not None:
        _load(config.ca, "ca")
        try:
            context.load_verify_locations(config.ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"[tls] ca {config.ca} can't be used: {_reason(error)}") from None
        required = config.verify_clients == "required"
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    if config.psk is not None:
        _use_psk(context, read_psk(config.psk))
    return context


class Handshake:
    """Whose key the handshake under way asked for last: with that it was made, where it was made with a key at all.

    One for all: a step of a handshake is one call, on the loop's thread.
    """

    identity: ClassVar[str | None] = None


def certificate_names(tls: ssl.SSLObject) -> frozenset[str]:
    """What the client's certificate calls it: the common name and the alternative names of its subject.

    Empty without a certificate.  One that was not verified is not told by the ssl module, and so counts as none.
    """
    certificate: Mapping[str, Any] = tls.getpeercert() or {}
    names = {value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"}
    names |= {value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "URI", "email")}
    return frozenset(names)


# Pre-shared keys


def read_psk(path: Path) -> dict[str, bytes]:
    """The keys by name, of lines ``NAME:HEX`` as GnuTLS's psktool writes them."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_load(path, "psk").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, text = line.rpartition(":")
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if not name or len(key) * 8 < MIN_PSK_BITS:
            raise ConfigError(
                f"[tls] psk {path}, line {number}: not NAME:KEY, with {MIN_PSK_BITS // 4} hexadecimal digits or more"
            )
        keys[name] = key
    return keys


def _use_psk(context: ssl.SSLContext, keys: Mapping[str, bytes]) -> None:
    set_callback = getattr(context, "set_psk_server_callback", None)
    if set_callback is None:
        raise ConfigError("[tls] psk: this Python's ssl module has no pre-shared keys")

    def find(identity: str | None) -> bytes:
        Handshake.identity = identity
        return keys.get(identity or "", b"")

    set_callback(find)


# Files


def _stamp(config: TlsConfig) -> Stamp:
    """What tells a file from a changed one."""
    return tuple(map(_stamp_of, config.files))


def _stamp_of(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _load(path: Path, key: str) -> str:
    """The file's text: a certificate that is missing should be called just that, not a failure of OpenSSL's."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_PSK_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(f"[tls] {key}: cannot read {path}: {error.strerror}") from None


def _no_password() -> bytes:
    """Instead of asking at the terminal."""
    return b""


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")
