"""The control API over a real unix socket, with a real pool behind it."""

from __future__ import annotations

import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nbdsnap import __version__
from nbdsnap.client import RemoteClient, is_listening
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import (
    AlreadyExistsError,
    InUseError,
    NbdsnapError,
    NoSpaceError,
    NotFoundError,
    ServerError,
    UsageError,
)
from nbdsnap.operations import (
    CHECK,
    DIFF,
    EVENTS_AHEAD,
    OPERATIONS,
    SNAPSHOT_CREATE,
    SNAPSHOT_DELETE,
    SNAPSHOT_LIST,
    STATUS,
    VOLUME_CREATE,
    VOLUME_DELETE,
    VOLUME_LIST,
    VOLUME_SHOW,
    AbandonedError,
    CheckScope,
    DiffExtents,
    DiffRange,
    Emit,
    Nothing,
    Operation,
    Progress,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotList,
    VolumeCreate,
    VolumeDelete,
    VolumeShow,
)
from nbdsnap.server.control import MAX_REQUEST_BYTES, MAX_STREAMS
from tests.support.controlled import ControlThread
from tests.support.deadline import wait_until
from tests.support.enginepool import make_pool, write_blocks


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = make_pool(tmp_path, ["vol"])
    yield pool
    pool.close()


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def server(pool: Pool, control: Path) -> Iterator[ControlThread]:
    with ControlThread(pool, control) as server:
        yield server


@pytest.fixture
def client(server: ControlThread, control: Path) -> Iterator[RemoteClient]:
    with RemoteClient(control) as client:
        yield client


@pytest.fixture
def http(server: ControlThread, control: Path) -> Iterator[httpx.Client]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(control)), base_url="http://nbdsnap") as http:
        yield http


# Every operation


def test_volumes(client: RemoteClient, tmp_path: Path) -> None:
    created = client.call(VOLUME_CREATE, VolumeCreate(name="two", origin=tmp_path / "two.img", size=8192))
    assert (created.name, created.size, created.origin) == ("two", 8192, str(tmp_path / "two.img"))
    assert [one.name for one in client.call(VOLUME_LIST, Nothing())] == ["two", "vol"]
    assert client.call(VOLUME_SHOW, VolumeShow(name="two")).size == 8192
    client.call(VOLUME_DELETE, VolumeDelete(name="two", dry_run=True))
    assert len(client.call(VOLUME_LIST, Nothing())) == 2
    client.call(VOLUME_DELETE, VolumeDelete(name="two"))
    assert len(client.call(VOLUME_LIST, Nothing())) == 1


def test_snapshots(client: RemoteClient) -> None:
    (taken,) = client.call(SNAPSHOT_CREATE, SnapshotCreate(names=["vol@a"]))
    assert (taken.volume, taken.name) == ("vol", "a")
    assert [one.name for one in client.call(SNAPSHOT_LIST, SnapshotList(volume="vol"))] == ["a"]
    deleted = client.call(SNAPSHOT_DELETE, SnapshotDelete(names=["vol@a"]))
    assert deleted.names == ["vol@a"]
    assert client.call(SNAPSHOT_LIST, SnapshotList()) == []


def test_diff(client: RemoteClient, pool: Pool) -> None:
    pool.snapshot_create(["vol@a"])
    write_blocks(pool, "vol", [0, 4096, 1 << 20])
    events: list[DiffExtents] = []
    total = client.call(DIFF, DiffRange.model_validate({"from": "vol@a"}), events.append)
    extents = [(one.offset, one.length) for event in events for one in event.extents]
    assert extents == [(0, 8192), (1 << 20, 4096)]
    assert (total.from_, total.to, total.bytes) == ("vol@a", None, 12288)


def test_diff_without_a_change(client: RemoteClient, pool: Pool) -> None:
    pool.snapshot_create(["vol@a"])
    pool.snapshot_create(["vol@b"])
    events: list[DiffExtents] = []
    assert client.call(DIFF, DiffRange.model_validate({"from": "vol@a", "to": "vol@b"}), events.append).bytes == 0
    assert events == []


def test_status_and_check(client: RemoteClient, pool: Pool) -> None:
    pool.snapshot_create(["vol@a"])
    write_blocks(pool, "vol", [0])
    status = client.call(STATUS, Nothing())
    assert status.path == str(pool.path)
    assert status.volumes[0].snapshots[0].name == "a"
    events: list[Progress] = []
    report = client.call(CHECK, CheckScope(data=True), events.append)
    assert report.ok
    assert events[-1].done == events[-1].total


def test_check_says_the_same_with_nobody_listening_to_events(client: RemoteClient) -> None:
    assert client.call(CHECK, CheckScope()).ok


# Errors


def test_errors_keep_class_message_and_hint(client: RemoteClient, pool: Pool, tmp_path: Path) -> None:
    pool.snapshot_create(["vol@a"])
    for error, call in {
        NotFoundError: lambda: client.call(VOLUME_SHOW, VolumeShow(name="nix")),
        AlreadyExistsError: lambda: client.call(
            VOLUME_CREATE, VolumeCreate(name="vol", origin=tmp_path / "x", size=4096)
        ),
        UsageError: lambda: client.call(SNAPSHOT_CREATE, SnapshotCreate(names=["no-at-sign"])),
        InUseError: lambda: client.call(VOLUME_DELETE, VolumeDelete(name="vol")),
    }.items():
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error
        assert str(caught.value)
    with pytest.raises(NotFoundError) as remote:
        client.call(VOLUME_SHOW, VolumeShow(name="nix"))
    with pytest.raises(NotFoundError) as local:
        pool.volume_show("nix")
    assert (str(remote.value), remote.value.advice) == (str(local.value), local.value.advice)


def test_error_before_the_first_event_has_its_status(http: httpx.Client) -> None:
    answer = http.post("/v1/diff", json={"from": "vol@nix"})
    assert answer.status_code == 404
    assert answer.json()["kind"] == "NotFoundError"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/volume.show", b"{", 400, "Invalid JSON"),
        ("/v1/volume.show", b"", 400, "name: Field required"),
        ("/v1/volume.show", b'{"name":"a","mane":"b"}', 400, "mane: Extra inputs"),
        ("/v1/volume.show", b"[]", 400, "volume.show"),
        ("/v1/volume.create", b'{"name":"a","origin":"relative"}', 400, "has to be absolute"),
        ("/v1/volume.create", b'{"name":"a","origin":"/x","size":0}', 400, "size"),
        ("/v1/snapshot.create", b'{"names":[]}', 400, "names"),
        ("/v1/volume.explode", b"{}", 404, "no operation 'volume.explode'"),
        ("/v2/volume.list", b"{}", 404, "no POST /v2/volume.list here"),
        ("/v1/volume.list", b" " * (MAX_REQUEST_BYTES + 1), 400, "longer than"),
    ],
)
def test_wrong_requests(http: httpx.Client, path: str, body: bytes, status: int, message: str) -> None:
    answer = http.post(path, content=body)
    assert answer.status_code == status
    assert message in answer.json()["message"]
    assert http.post("/v1/volume.list").status_code == 200  # an empty body is {}


def test_wrong_method(http: httpx.Client) -> None:
    answer = http.get("/v1/volume.list")
    assert answer.status_code == 404
    assert answer.json()["hint"] == "GET /v1 lists the operations"


def test_garbage_and_early_leavers_bother_nobody(client: RemoteClient, control: Path) -> None:
    for garbage in (b"\0" * 100, b"POST /v1/volume.list HTTP/1.1\r\ncontent-length: 9\r\n\r\n{", b""):
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(control))
            rude.sendall(garbage)
    assert len(client.call(VOLUME_LIST, Nothing())) == 1


def test_index_describes_every_operation(http: httpx.Client) -> None:
    index = http.get("/v1").json()
    assert index["version"] == __version__
    assert set(index["operations"]) == set(OPERATIONS)
    assert index["operations"]["diff"]["request"]["required"] == ["from"]
    assert index["operations"]["volume.list"]["event"] is None


# Operations that behave badly, run by the same table


def register(monkeypatch: pytest.MonkeyPatch, run: Any, streams: bool) -> Operation[Nothing, Progress]:
    operation: Operation[Nothing, Progress] = Operation(
        "test", "A test's.", Nothing, Progress, run, Progress if streams else None
    )
    monkeypatch.setitem(OPERATIONS, "test", operation)
    return operation


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("raised", "reported", "message"),
    [
        (OSError(28, "No space left on device"), NoSpaceError, "No space left on device"),
        (OSError(5, "Input/output error", "/pool/x"), NbdsnapError, "/pool/x: Input/output error"),
        (ZeroDivisionError("oops"), NbdsnapError, "unexpected ZeroDivisionError: oops"),
    ],
)
def test_exceptions_become_errors(
    client: RemoteClient,
    monkeypatch: pytest.MonkeyPatch,
    streams: bool,
    raised: Exception,
    reported: type[NbdsnapError],
    message: str,
) -> None:
    def run(pool: Pool, request: Nothing, emit: Emit) -> Progress:
        raise raised

    operation = register(monkeypatch, run, streams)
    with pytest.raises(reported) as caught:
        client.call(operation, Nothing())
    assert str(caught.value) == message


def test_error_after_events(client: RemoteClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(pool: Pool, request: Nothing, emit: Emit) -> Progress:
        emit(Progress(done=1, total=2))
        raise InUseError("half way")

    events: list[Progress] = []
    with pytest.raises(InUseError, match="half way"):
        client.call(register(monkeypatch, run, True), Nothing(), events.append)
    assert events == [Progress(done=1, total=2)]


class Endless:
    """Emits for ever; says how far it got, and whether it was made to end."""

    def __init__(self) -> None:
        self.emitted = 0
        self.ended = threading.Event()

    def __call__(self, pool: Pool, request: Nothing, emit: Emit) -> Progress:
        try:
            while True:
                emit(Progress(done=self.emitted, total=1 << 60))
                self.emitted += 1
        except AbandonedError:
            self.ended.set()
            raise


def stream_of(control: Path) -> socket.socket:
    """A client that asks for the endless answer, and has read nothing of it."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(control))
    client.sendall(b"POST /v1/test HTTP/1.1\r\nhost: nbdsnap\r\ncontent-length: 0\r\n\r\n")
    return client


def test_slow_reader_holds_the_operation_up_and_leaving_ends_it(
    server: ControlThread, control: Path, client: RemoteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = Endless()
    register(monkeypatch, endless, True)
    last = -1

    def stalled() -> bool:
        nonlocal last
        still, last = endless.emitted == last, endless.emitted
        return still and last > EVENTS_AHEAD

    with stream_of(control):
        wait_until(stalled, "the stream to stall")
        assert len(client.call(VOLUME_LIST, Nothing())) == 1  # the others go on
    assert endless.ended.wait(10)
    assert endless.emitted < 1_000_000


def test_too_many_streams_are_refused(
    server: ControlThread, control: Path, client: RemoteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, Endless(), True)
    streams = [stream_of(control) for _ in range(MAX_STREAMS)]
    for stream in streams:
        assert stream.recv(1)
    with pytest.raises(InUseError, match="diffs and checks run already"):
        client.call(CHECK, CheckScope())
    for stream in streams:
        stream.close()

    def check() -> bool:
        try:
            return client.call(CHECK, CheckScope()).ok
        except InUseError:
            return False

    wait_until(check, "a place")


def test_stop_ends_streams_with_an_error(
    server: ControlThread, client: RemoteClient, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()
    operation = register(monkeypatch, Endless(), True)
    stopping = threading.Thread(target=lambda: started.wait(10) and server.stop())
    stopping.start()
    with pytest.raises(ServerError, match="the server is shutting down"):
        client.call(operation, Nothing(), lambda _: started.set())
    stopping.join(10)
    assert not control.exists()


def test_stop_waits_for_what_changes_the_pool(
    server: ControlThread, client: RemoteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release, stopped = threading.Event(), threading.Event(), threading.Event()
    results: list[Progress] = []

    def run(pool: Pool, request: Nothing, emit: Emit) -> Progress:
        started.set()
        release.wait(10)
        assert not stopped.is_set()
        return Progress(done=1, total=1)

    operation = register(monkeypatch, run, False)
    calling = threading.Thread(target=lambda: results.append(client.call(operation, Nothing())))
    calling.start()
    assert started.wait(10)

    def stop() -> None:
        server.stop()
        stopped.set()

    stopping = threading.Thread(target=stop)
    stopping.start()
    wait_until(lambda: server.runner._closing, "the stop to begin")
    release.set()
    stopping.join(10)
    calling.join(10)
    assert results == [Progress(done=1, total=1)]


# The socket


def test_socket_is_the_owners_alone(server: ControlThread, control: Path) -> None:
    assert stat.S_IMODE(control.stat().st_mode) == 0o600


def test_a_proxy_in_the_environment_is_not_asked(
    server: ControlThread, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with RemoteClient(control) as client:
        assert len(client.call(VOLUME_LIST, Nothing())) == 1


def test_stopping_twice_is_stopping(server: ControlThread, control: Path) -> None:
    server.stop()
    server.stop()
    assert not is_listening(control)


def test_live_socket_is_refused(server: ControlThread, pool: Pool, control: Path) -> None:
    with pytest.raises(InUseError, match="another process listens there"), ControlThread(pool, control):
        pass
    assert is_listening(control)


def test_client_without_server(control: Path) -> None:
    assert not is_listening(control)
    with RemoteClient(control) as client, pytest.raises(ServerError, match="broke off"):
        client.call(VOLUME_LIST, Nothing())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\nOops",
        b"SSH-2.0-OpenSSH\r\n",
        b"",
    ],
)
def test_something_else_on_the_socket(control: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with RemoteClient(control) as client, pytest.raises(ServerError):
            client.call(VOLUME_LIST, Nothing())
        thread.join(10)


def test_cut_stream_is_an_error(control: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            line = b'{"event":{"extents":[]}}\n'
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(line), line))
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with RemoteClient(control) as client, pytest.raises(ServerError, match="ended before its answer did"):
            client.call(DIFF, DiffRange.model_validate({"from": "vol@a"}))
        thread.join(10)


def test_unknown_kinds_of_error_are_plain_errors(client: RemoteClient, monkeypatch: pytest.MonkeyPatch) -> None:
    class LaterError(NbdsnapError):
        def to_wire(self) -> dict[str, str]:
            return {**super().to_wire(), "kind": "of a later version"}

    def run(pool: Pool, request: Nothing, emit: Emit) -> Progress:
        raise LaterError("what happened")

    with pytest.raises(NbdsnapError, match="what happened") as caught:
        client.call(register(monkeypatch, run, False), Nothing())
    assert type(caught.value) is NbdsnapError
