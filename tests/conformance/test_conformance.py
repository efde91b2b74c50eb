"""The table, held against nbdsnap: no MUST and no SHOULD fails, and every MAY is as the table says.

Whole over TCP, and over TLS where that is required; over a unix socket what the transport could matter to; the cases
about TLS in all its modes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conformance.steps import run_case
from tests.conformance.table import CASES as CASES_FOLDER
from tests.conformance.table import Case, load, rows
from tests.conformance.target import Target
from tests.support.server import SERVERS, Server, Volume
from tests.support.tlsfiles import Authority

SIZE = 8 << 30
CASES = load()

TABLES: dict[str, Callable[[Case], bool]] = {
    "tcp": lambda case: not {"tls", "tls=optional", "tls=required"}.intersection(case.needs),
    "unix": lambda case: case.file in ("1-handshake", "4-transmission"),
    "tls": lambda case: (
        not {"tls=off", "tls=optional"}.intersection(case.needs)
        and (case.start not in ("connected", "plain") or case.file == "7-tls")
    ),
    "tls=optional": lambda case: case.file == "7-tls" and not {"tls=off", "tls=required"}.intersection(case.needs),
}
"""Which cases apply to a server, by how it is reached."""


def start(folder: Path, kind: str) -> tuple[Server, Target]:
    """A server with a sparse volume; its URIs."""
    origin = folder / "vol.img"
    with origin.open("wb") as file:
        file.seek(1 << 20)
        file.write(bytes(range(1, 251)) * 5000)
        file.truncate(SIZE)
    keys, certificates = 'log_size = "2MiB"', None
    if kind.startswith("tls"):
        authority = Authority(folder / "pki", clients=["alice"])
        names = {"certificate": "server-cert.pem", "key": "server-key.pem", "ca": "ca-cert.pem"}
        mode = "optional" if kind == "tls=optional" else "required"
        keys += f'\n[tls]\nmode = "{mode}"\n'
        keys += "".join(f'{key} = "{authority.server / name}"\n' for key, name in names.items())
        certificates = authority.folder / "alice"
    server = Server(folder / "server", [Volume("vol", origin)], keys)
    server.start()
    server.snapshot("vol@fixed")  # with data and holes
    transport = "unix" if kind == "unix" else "tcp"
    uris = [server.uri(name, transport) for name in ("vol", "vol@fixed")]
    if kind == "tls":
        uris = [uri.replace("nbd:", "nbds:", 1) for uri in uris]
    target = Target(*uris, certificates=certificates, timeout_s=20.0)
    target.probe()
    return server, target


@pytest.fixture(scope="module")
def targets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Target]]:
    """A server of each kind, started when it is first asked for."""
    started: dict[str, Target] = {}
    servers = request.node.stash.setdefault(SERVERS, [])
    with ExitStack() as running:

        def target(kind: str) -> Target:
            if kind not in started:
                server, started[kind] = start(tmp_path_factory.mktemp("conformance"), kind)
                running.callback(server.stop)
                servers.append(server)
            return started[kind]

        yield target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, id=f"{kind}-{case.id}")
        for kind, applies in TABLES.items()
        for case in filter(applies, CASES)
    ],
)
def test_case(targets: Callable[[str], Target], kind: str, case: Case) -> None:
    outcome = run_case(case, targets(kind))
    assert outcome.status == "pass", f"{case.level}, {case.section}: {case.says}\n{outcome.detail}"


def test_the_table_is_large_enough() -> None:
    assert rows() >= 150
    assert {case.level for case in CASES} == {"MUST", "SHOULD", "MAY"}
    assert all(any(applies(case) for applies in TABLES.values()) for case in CASES)


def test_every_step_is_documented() -> None:
    readme = (CASES_FOLDER.parent / "README.md").read_text()
    used = {word for case in CASES for step in case.steps for word in re.findall(r"(?:^|; )([a-z0-9-]+)", step)}
    for word in used:
        assert re.search(rf"`{re.escape(word)}[ `]", readme), f"README.md does not explain the step {word!r}"
