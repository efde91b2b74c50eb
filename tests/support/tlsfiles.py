"""Certificates for tests, made by the command that users have for it."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from nbdsnap.cli.main import run
from nbdsnap.config import TlsConfig


class Authority:
    """A test CA: ``server`` is the server's folder, ``folder / NAME`` each client's."""

    def __init__(self, folder: Path, clients: Sequence[str] = ("alice", "bob")) -> None:
        self.folder = folder
        words = ["tls", "make-ca", str(folder), *(word for name in clients for word in ("--client", name))]
        assert run(words) == 0
        self.server = folder / "server"

    def config(self, mode: str = "required", **keys: object) -> TlsConfig:
        """Of a server that demands certificates of its clients, unless ``keys`` say otherwise."""
        files = {
            "certificate": self.server / "server-cert.pem",
            "key": self.server / "server-key.pem",
            "ca": self.server / "ca-cert.pem",
        }
        return TlsConfig.model_validate({"mode": mode, **files, **keys})

    def toml(self, mode: str = "required", **keys: str) -> str:
        """The ``[tls]`` section of a configuration."""
        files = {
            "certificate": str(self.server / "server-cert.pem"),
            "key": str(self.server / "server-key.pem"),
            "ca": str(self.server / "ca-cert.pem"),
        }
        return "[tls]\n" + "".join(f'{key} = "{value}"\n' for key, value in {"mode": mode, **files, **keys}.items())

    def client_context(self, name: str | None = "alice") -> ssl.SSLContext:
        """Of a client that knows this authority and has the certificate of ``name``; None: it has none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.server / "ca-cert.pem")
        if name is not None:
            context.load_cert_chain(self.folder / name / "client-cert.pem", self.folder / name / "client-key.pem")
        return context
