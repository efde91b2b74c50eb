"""The table, held against nbdsnap: no MUST and no SHOULD fails, and every MAY is as the table says."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.conformance.steps import run_case
from tests.conformance.table import CASES as CASES_FOLDER
from tests.conformance.table import Case, load, rows
from tests.conformance.target import Target
from tests.support.server import SERVERS, Server, Volume

SIZE = 8 << 30
CASES = load()
NOT_YET = {"hole", "hole-among-data"}
"""What a server MAY do, and nbdsnap does not."""

TLS = {"tls", "tls=optional", "tls=required"}
WITHOUT_TLS = [case for case in CASES if not TLS.intersection(case.needs)]


@pytest.fixture(scope="module", params=["tcp", "unix"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server with a sparse volume, and a snapshot with data and holes."""
    folder = tmp_path_factory.mktemp("conformance")
    origin = folder / "vol.img"
    with origin.open("wb") as file:
        file.seek(1 << 20)
        file.write(bytes(range(1, 251)) * 5000)
        file.truncate(SIZE)
    server = Server(folder / "server", [Volume("vol", origin)])
    request.node.stash[SERVERS] = [server]
    with server:
        server.snapshot("vol@fixed")
        one = Target(server.uri("vol", request.param), server.uri("vol@fixed", request.param), timeout_s=20.0)
        one.probe()
        yield one


@pytest.mark.slow
@pytest.mark.parametrize("case", WITHOUT_TLS, ids=lambda case: case.id)
def test_case(target: Target, case: Case) -> None:
    outcome = run_case(case, target)
    if outcome.status == "fail" and case.id.partition("[")[0] in NOT_YET:
        pytest.xfail(outcome.detail)
    assert outcome.status == "pass", f"{case.level}, {case.section}: {case.says}\n{outcome.detail}"


def test_the_table_is_large_enough() -> None:
    assert rows() >= 150
    assert {case.level for case in CASES} == {"MUST", "SHOULD", "MAY"}


def test_every_step_is_documented() -> None:
    readme = (CASES_FOLDER.parent / "README.md").read_text()
    used = {word for case in CASES for step in case.steps for word in re.findall(r"(?:^|; )([a-z0-9-]+)", step)}
    for word in used:
        assert re.search(rf"`{re.escape(word)}[ `]", readme), f"README.md does not explain the step {word!r}"
