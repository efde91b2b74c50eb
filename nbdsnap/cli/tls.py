"""``nbdsnap tls``: certificates of one's own, to try TLS with, or for machines that all belong to one owner.

Made by the openssl program, which nearly every machine has, rather than by a package of Python's that every user of
nbdsnap would install for the sake of these two commands.  Folders and files are named as libnbd, qemu and nbdkit look
for them, so that one folder is all that a client needs.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import click

from nbdsnap.cli.options import Group, json_option
from nbdsnap.cli.output import print_json
from nbdsnap.errors import AlreadyExistsError, DeviceError, NbdsnapError, NotFoundError, UsageError

CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
"""What every TLS library knows, and quick to shake hands with.  No passphrase: nobody is there to type it."""

DAYS = 825

EXTENSIONS = """\
[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = {names}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
subjectAltName = {names}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""

SERVER = "server"
CA_CERTIFICATE = "ca-cert.pem"
CA_KEY = "ca-key.pem"

days_option = click.option(
    "--days",
    type=click.IntRange(1, 36500),
    default=DAYS,
    show_default=True,
    help="How long the certificates are valid.",
)
folder_argument = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


@click.group(cls=Group)
def tls() -> None:
    """Make certificates to try TLS with.

    \b
    Example:
      nbdsnap tls make-ca certificates --host nbd.example.org
    """


@tls.command("make-ca")
@folder_argument
@click.option(
    "--host", "hosts", metavar="NAME", multiple=True, help="A name or address of the server; may be repeated."
)
@click.option("--client", "clients", metavar="NAME", multiple=True, help="A client; may be repeated.")
@days_option
@json_option
def make_ca(folder: Path, hosts: tuple[str, ...], clients: tuple[str, ...], days: int, as_json: bool) -> None:
    """Make a certificate authority in FOLDER, with certificates for a server and for clients.

    FOLDER/server is what the server needs, FOLDER/NAME what the client NAME needs: copy it there, with ca-cert.pem,
    client-cert.pem and client-key.pem. FOLDER/ca-key.pem signs further ones: keep it away from both. Without --host,
    the server is known as localhost and by this machine's name.

    \b
    Example:
      nbdsnap tls make-ca certificates --host nbd.example.org --host 192.0.2.7 --client backup
    """
    if folder.exists() and any(folder.iterdir()):
        raise AlreadyExistsError(f"{folder} is not empty", hint="name a new folder, or use `nbdsnap tls make-client`")
    for name in clients:
        _check_client(name)
    hosts = hosts or ("localhost", "127.0.0.1", "::1", socket.gethostname())
    names = ", ".join(dict.fromkeys(map(_alternative_name, hosts)))
    with _Work(folder) as work:
        work.make_authority(days)
        work.sign(SERVER, hosts[0], SERVER, names, days)
        for name in clients:
            work.sign(name, name, "client", f"DNS:{name}", days)
    _report(folder, clients, as_json, server=True)


@tls.command("make-client")
@folder_argument
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@days_option
@json_option
def make_client(folder: Path, names: tuple[str, ...], days: int, as_json: bool) -> None:
    """Make certificates for further clients of the authority in FOLDER.

    A rule of the configuration ([[allow]], certificate) knows the client by NAME.

    \b
    Example:
      nbdsnap tls make-client certificates backup
    """
    for name in names:
        _check_client(name)
        if (folder / name).exists():
            raise AlreadyExistsError(f"{folder / name} exists already")
    if not (folder / CA_KEY).exists():
        raise NotFoundError(f"{folder / CA_KEY} does not exist", hint=f"`nbdsnap tls make-ca {folder}` makes it")
    with _Work(folder) as work:
        for name in names:
            work.sign(name, name, "client", f"DNS:{name}", days)
    _report(folder, names, as_json, server=False)


class _Work:
    """A folder beside the one that is asked for, in which everything is made: what fails leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._openssl = shutil.which("openssl")

    def __enter__(self) -> _Work:
        if self._openssl is None:
            raise NbdsnapError("there is no openssl program", hint="on Debian: apt-get install openssl")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder))
        except OSError as error:
            raise DeviceError(f"cannot write into {self._folder}: {error.strerror}") from None
        self._umask = os.umask(0o077)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        os.umask(self._umask)
        try:
            if kind is None:
                for path in sorted(self._scratch.iterdir()):
                    if path.is_dir() or path.name in (CA_CERTIFICATE, CA_KEY):
                        path.rename(self._folder / path.name)
        finally:
            shutil.rmtree(self._scratch)

    def make_authority(self, days: int) -> None:
        subject = f"/CN=nbdsnap {secrets.token_hex(4)}"
        self._run(
            *("req", "-x509", *CURVE, "-config", self._configuration("DNS:none"), "-extensions", "ca"),
            *("-subj", subject, "-days", str(days)),
            *("-keyout", self._scratch / CA_KEY, "-out", self._scratch / CA_CERTIFICATE),
        )

    def sign(self, folder: str, common_name: str, kind: str, names: str, days: int) -> None:
        """Make a key, and a certificate for it, in a folder with the authority's."""
        into = self._scratch / folder
        into.mkdir(mode=0o700)
        key, certificate, request = into / f"{kind}-key.pem", into / f"{kind}-cert.pem", self._scratch / "request"
        made = self._scratch if (self._scratch / CA_KEY).exists() else self._folder
        configuration = self._configuration(names)
        subject = f"/CN={common_name}"
        self._run("req", "-new", *CURVE, "-config", configuration, "-subj", subject, "-keyout", key, "-out", request)
        self._run(
            *("x509", "-req", "-in", request, "-CA", made / CA_CERTIFICATE, "-CAkey", made / CA_KEY),
            *("-set_serial", f"0x{secrets.token_hex(16)}", "-days", str(days)),
            *("-extfile", configuration, "-extensions", kind, "-out", certificate),
        )
        shutil.copyfile(made / CA_CERTIFICATE, into / CA_CERTIFICATE)

    def _configuration(self, names: str) -> Path:
        path = self._scratch / "openssl.cnf"
        path.write_text(EXTENSIONS.format(names=names))
        return path

    def _run(self, *words: str | Path) -> None:
        assert self._openssl is not None
        done = subprocess.run([self._openssl, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise NbdsnapError(f"openssl {words[0]} failed: {' '.join(done.stderr.split())}")


def _check_client(name: str) -> None:
    """A name is a folder, and a name in a certificate."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name) or name == SERVER or name.endswith(".pem"):
        raise UsageError(f"{name!r} can't be a client's name", hint="letters, digits, '.', '_' and '-', at most 63")


def _alternative_name(host: str) -> str:
    try:
        return f"IP:{ip_address(host)}"
    except ValueError:
        pass
    if not re.fullmatch(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", host):
        raise UsageError(f"{host!r} is no host's name or address")
    return f"DNS:{host}"


def _report(folder: Path, clients: Sequence[str], as_json: bool, *, server: bool) -> None:
    folder = folder.absolute()
    made = [folder / name for name in (*((SERVER,) if server else ()), *clients)]
    if as_json:
        print_json({"folders": [str(path) for path in made]})
        return
    for path in made:
        click.echo(f"made {path}")
    if server:
        click.echo(
            f"\nFor the server's configuration:\n\n[tls]\n"
            f'certificate = "{folder / SERVER / "server-cert.pem"}"\n'
            f'key = "{folder / SERVER / "server-key.pem"}"\n'
            f'ca = "{folder / SERVER / CA_CERTIFICATE}"'
        )
