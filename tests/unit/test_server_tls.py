"""TLS from a client's side: everything works that works without, and nothing goes around it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import random
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from nbdsnap.errors import ConfigError
from nbdsnap.nbd.negotiation import TlsMode
from nbdsnap.server.context import Context, Limits
from nbdsnap.server.security import Security
from nbdsnap.server.tls import TlsKeeper, make_context
from nbdsnap.server.tlschannel import TlsChannel
from tests.support import nbdwire
from tests.support.blocks import stamped, write_stamped
from tests.support.client import Client, DisconnectedError, RefusedError
from tests.support.clients import require_client
from tests.support.deadline import wait_until
from tests.support.nbdserver import ServerThread
from tests.support.nbdwire import FLUSH, READ, WRITE
from tests.support.rawdevice import RawFile, RawPool
from tests.support.tlsfiles import Authority

SIZE = 32 << 20
SEED = 11
LIMITS = Limits(connections=20, handshake_s=0.5, shutdown_s=5.0, linger_s=0.5)

Tls = Callable[..., Client]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    require_client("openssl")
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[RawFile]:
    path = write_stamped(tmp_path / "raw.img", 4 << 20, SEED)
    with path.open("r+b") as file:
        file.truncate(SIZE)
    opened = RawFile(path)
    yield opened
    opened.close()


@contextlib.contextmanager
def serving(raw: RawFile, security: Security, limits: Limits = LIMITS) -> Iterator[ServerThread]:
    server = ServerThread(RawPool({"vol": raw}), limits, security=security)
    try:
        yield server
        wait_until(lambda: server.connections() == 0, "the end of all connections")
    finally:
        raw.gate.set()
        server.stop()
    assert raw.opened == 0, "a device was not given back"


@pytest.fixture
def server(raw: RawFile, authority: Authority) -> Iterator[ServerThread]:
    with serving(raw, Security(tls=TlsKeeper(authority.config()))) as running:
        yield running


def plain(server: ServerThread, mode: TlsMode = TlsMode.REQUIRED) -> Client:
    """Greeted, and in the clear."""
    return Client(server.connect(mode.value))


def secured(server: ServerThread, context: ssl.SSLContext, mode: TlsMode = TlsMode.REQUIRED) -> Client:
    return plain(server, mode).start_tls(context, "localhost")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("dialect", ["simple", "structured", "extended"])
def test_reads_and_writes_of_every_size(
    server: ServerThread, authority: Authority, version: ssl.TLSVersion, dialect: str
) -> None:
    context = authority.client_context()
    context.minimum_version = context.maximum_version = version
    client = secured(server, context)
    if dialect != "simple":
        getattr(client, dialect)()
    client.go("vol")
    sock = client.sock
    assert isinstance(sock, ssl.SSLSocket)
    assert sock.version() == version.name.replace("v1_", "v1.")
    rng = random.Random(SEED)
    for length in (1, 512, 4096, 16384, 100_000, 300_000, 1 << 20, 3 << 20, 9 << 20):
        data = rng.randbytes(length)
        client.write(SIZE - length, data)
        assert client.read(SIZE - length, length) == data, length
    assert client.read(4096, 3 << 20) == stamped(SEED, 4096, 3 << 20)
    client.flush()
    client.disconnect()


def test_a_deep_pipeline(server: ServerThread, authority: Authority) -> None:
    """More at once than any buffer on the way holds; as records of a request each, of all sizes, and in one piece."""
    rng = random.Random(SEED)
    with secured(server, authority.client_context()).structured().go("vol") as client:
        for pieces in ("one each", "any", "whole"):
            stream = b""
            data = {}
            for number in range(400):
                payload = rng.randbytes(rng.choice([512, 4096, 20_000]))
                request = client.request(WRITE, (4 << 20) + number * 20_000, len(payload), payload=payload)
                data[(4 << 20) + number * 20_000] = payload
                stream += request
                if pieces == "one each":
                    client.sock.sendall(request)
            position = 0
            while pieces != "one each" and position < len(stream):
                size = rng.choice([1, 27, 28, 29, 5000, 16384]) if pieces == "any" else len(stream)
                client.sock.sendall(stream[position : position + size])
                position += size
            assert not any(reply.error for reply in client.receive_all().values())
            reads = [client.request(READ, offset, len(payload)) for offset, payload in data.items()]
            sent = dict(zip(client.outstanding, data.values(), strict=True))
            client.sock.sendall(b"".join(reads))
            replies = client.receive_all()
            assert all(replies[cookie].data == payload for cookie, payload in sent.items())
        client.disconnect()


def test_requests_behind_the_handshake_in_one_record(server: ServerThread, authority: Authority) -> None:
    client = secured(server, authority.client_context())
    client.sock.sendall(nbdwire.go("vol") + nbdwire.request(READ, 4096, 100, cookie=5) + nbdwire.request(nbdwire.DISC))
    received = b""
    with contextlib.suppress(ssl.SSLZeroReturnError):
        while part := client.sock.recv(4096):
            received += part
    assert received.endswith(stamped(SEED, 4096, 100))
    client.close()


def test_a_client_that_does_not_read_is_held_to_its_limits(server: ServerThread, authority: Authority) -> None:
    with secured(server, authority.client_context()).structured().go("vol") as client:
        asked = 200
        client.sock.sendall(b"".join(client.request(READ, 0, 1 << 20) for _ in range(asked)))

        def held() -> int:
            (connection,) = server.server._connections
            path = connection._path
            assert path is not None
            return path.held + path.channel.queued

        assert wait_until(lambda: server.call(held), "replies to be queued") <= LIMITS.held_bytes + (3 << 20)
        expected = stamped(SEED, 0, 1 << 20)
        for _ in range(asked):
            assert client.receive().data == expected
        client.disconnect()


class OpenSsl:
    """What the ssl module does not offer, by its own library: a connection is the second pointer of its object."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libssl.so.3")
        except OSError:
            pytest.skip("this Python's OpenSSL is not a library that can be loaded")

    def _call(self, function: str, sock: socket.socket, *arguments: int) -> int:
        assert isinstance(sock, ssl.SSLSocket)
        pointers = ctypes.cast(id(sock._sslobj), ctypes.POINTER(ctypes.c_void_p))  # type: ignore[attr-defined]
        return int(getattr(self._library, function)(ctypes.c_void_p(pointers[3]), *arguments))

    def key_update(self, sock: socket.socket) -> None:
        """New keys from here on, and the server is asked for new ones, too."""
        assert self._call("SSL_key_update", sock, 1) == 1
        assert self._call("SSL_do_handshake", sock) == 1

    def renegotiate(self, sock: socket.socket) -> None:
        assert self._call("SSL_renegotiate", sock) == 1
        self._call("SSL_do_handshake", sock)


def test_new_keys_in_the_middle(server: ServerThread, authority: Authority) -> None:
    """A client changes its keys after so many records, as GnuTLS does by itself, and asks for the server's, too."""
    openssl = OpenSsl()
    with secured(server, authority.client_context()).structured().go("vol") as client:
        for number in range(20):
            openssl.key_update(client.sock)
            client.write(number * 5000, stamped(number, 0, 200_000))
            openssl.key_update(client.sock)
            openssl.key_update(client.sock)
            assert client.read(number * 5000, 200_000) == stamped(number, 0, 200_000)
        client.disconnect()


def test_no_renegotiation(server: ServerThread, authority: Authority) -> None:
    openssl = OpenSsl()
    context = authority.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with secured(server, authority.client_context()).go("vol") as other:
        client = secured(server, context).go("vol")
        client.sock.settimeout(10)
        openssl.renegotiate(client.sock)
        with pytest.raises((OSError, DisconnectedError)):
            client.read(0, 10)
        client.close()
        assert other.read(0, 10) == stamped(SEED, 0, 10)


# Modes


def test_required_refuses_everything_else(server: ServerThread, authority: Authority) -> None:
    with plain(server) as client:
        for request in (nbdwire.option(nbdwire.LIST), nbdwire.go("vol"), nbdwire.option(nbdwire.STRUCTURED_REPLY)):
            with pytest.raises(RefusedError) as caught:
                client.option(request)
            assert caught.value.reply == nbdwire.TLS_REQD
        client.start_tls(authority.client_context(), "localhost")
        assert client.list() == ["vol"]
        client.option(nbdwire.option(nbdwire.ABORT))


def test_optional_serves_both(server: ServerThread, authority: Authority) -> None:
    with plain(server, TlsMode.OPTIONAL).go("vol") as client:
        assert client.read(4096, 10) == stamped(SEED, 4096, 10)
    with secured(server, authority.client_context(), TlsMode.OPTIONAL).go("vol") as client:
        assert client.read(4096, 10) == stamped(SEED, 4096, 10)


def test_off_refuses_starttls_and_goes_on(server: ServerThread) -> None:
    with plain(server, TlsMode.OFF) as client:
        with pytest.raises(RefusedError) as caught:
            client.option(nbdwire.option(nbdwire.STARTTLS))
        assert caught.value.reply == nbdwire.POLICY
        client.go("vol")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_are_refused(server: ServerThread, authority: Authority) -> None:
    context = authority.client_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        secured(server, context)


def test_a_minimum_of_1_3(raw: RawFile, authority: Authority) -> None:
    with serving(raw, Security(tls=TlsKeeper(authority.config(minimum_version="1.3")))) as server:
        context = authority.client_context()
        secured(server, context).go("vol").close()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError):
            secured(server, context)


# Clients' certificates


def refused(server: ServerThread, context: ssl.SSLContext) -> None:
    """With TLS 1.3 the client learns of it only behind its own handshake."""
    with pytest.raises((ssl.SSLError, ConnectionError, DisconnectedError)):
        secured(server, context).list()


def test_a_certificate_is_demanded(
    server: ServerThread, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        refused(server, authority.client_context(None))
    assert caplog.text.count("the TLS handshake failed: PEER_DID_NOT_RETURN_A_CERTIFICATE") == 1
    other = Authority(tmp_path / "other")
    context = other.client_context()
    context.load_verify_locations(authority.server / "ca-cert.pem")
    refused(server, context)
    assert secured(server, authority.client_context("bob")).list() == ["vol"]


def test_a_server_s_certificate_is_none_of_a_client(server: ServerThread, authority: Authority) -> None:
    context = authority.client_context(None)
    context.load_cert_chain(authority.server / "server-cert.pem", authority.server / "server-key.pem")
    refused(server, context)


@pytest.mark.parametrize("verify", ["off", "optional"])
def test_without_a_certificate_where_none_is_demanded(raw: RawFile, authority: Authority, verify: str) -> None:
    with serving(raw, Security(tls=TlsKeeper(authority.config(verify=verify)))) as server:
        for name in (None, "alice"):
            assert secured(server, authority.client_context(name)).list() == ["vol"]


# Attacks and accidents


def test_plaintext_behind_starttls_is_never_parsed(server: ServerThread, raw: RawFile) -> None:
    """CVE-2021-3716: what somebody on the way puts behind STARTTLS must not be taken for the client's."""
    sock = server.connect("required")
    sock.settimeout(10)
    sock.sendall(nbdwire.client_flags() + nbdwire.option(nbdwire.STARTTLS) + nbdwire.go("vol"))
    received = b""
    while part := sock.recv(4096):
        received += part
    assert [reply.option for reply in nbdwire.split_option_replies(received[18:])] == [nbdwire.STARTTLS]
    assert raw.opened == 0
    sock.close()


def test_plaintext_in_place_of_tls_is_never_parsed(server: ServerThread, raw: RawFile) -> None:
    """As above, but it arrives when the answer has left already."""
    client = plain(server)
    client.option(nbdwire.option(nbdwire.STARTTLS))
    client.sock.sendall(nbdwire.go("vol") + nbdwire.request(READ, 0, 100))
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.sock.recv(4096):
            answer += part
    assert not answer or answer[0] == 21, "more than a TLS alert"
    assert raw.opened == 0
    client.close()


def test_what_was_negotiated_before_is_forgotten(server: ServerThread, authority: Authority) -> None:
    client = plain(server, TlsMode.OPTIONAL).structured()
    client.set_contexts("vol", "base:allocation")
    client.start_tls(authority.client_context(), "localhost")
    client.kind = "simple"
    client.go("vol")
    assert not client.flags & 1 << 7, "DF needs structured replies"
    assert client.read(0, 10) == stamped(SEED, 0, 10)  # simple replies: the client checks
    client.disconnect()


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_that_never_ends_is_ended(server: ServerThread, sent: bytes) -> None:
    client = plain(server)
    client.option(nbdwire.option(nbdwire.STARTTLS))
    client.sock.sendall(sent)
    started = time.monotonic()
    client.expect_end()
    assert time.monotonic() - started < 5
    client.close()


def test_garbage_in_the_stream_ends_the_connection(server: ServerThread, authority: Authority) -> None:
    with secured(server, authority.client_context()).go("vol") as other:
        client = secured(server, authority.client_context()).go("vol")
        naked = socket.socket(fileno=client.sock.detach())
        naked.settimeout(10)
        naked.sendall(random.Random(1).randbytes(5000))
        with contextlib.suppress(ConnectionResetError):
            while naked.recv(4096):
                pass
        naked.close()
        assert other.read(4096, 10) == stamped(SEED, 4096, 10)


@pytest.mark.parametrize("clean", [True, False])
def test_the_end_of_the_client_s_stream(server: ServerThread, authority: Authority, raw: RawFile, clean: bool) -> None:
    """What was asked for before it is answered."""
    raw.cold = True
    client = secured(server, authority.client_context()).go("vol")
    for number in range(50):
        client.send(READ, number * 4096, 4096)
    sock = client.sock
    assert isinstance(sock, ssl.SSLSocket)
    if clean:
        with pytest.raises(ssl.SSLWantReadError):
            sock.setblocking(False)
            sock.unwrap()
        sock.settimeout(10)
        wait_until(lambda: server.connections() == 0, "the end of the connection")
    else:
        sock.shutdown(socket.SHUT_WR)
        naked = socket.socket(fileno=sock.detach())
        wait_until(lambda: server.connections() == 0, "the end of the connection")
        naked.close()
    wait_until(lambda: raw.opened == 0, "the device to be given back")


def test_the_server_says_that_it_is_the_end(raw: RawFile, authority: Authority) -> None:
    """A cut connection can be told from one that the server closes: it has sent close_notify."""
    server = ServerThread(RawPool({"vol": raw}), LIMITS, security=Security(tls=TlsKeeper(authority.config())))
    client = secured(server, authority.client_context()).go("vol")
    server.begin_stop()
    assert client.sock.recv(1) == b""  # an SSLEOFError without it
    server.stop()
    client.close()


def test_many_clients_at_once(server: ServerThread, authority: Authority) -> None:
    context = authority.client_context()
    clients = [secured(server, context).structured().go("vol") for _ in range(12)]
    for turn in range(5):
        for number, client in enumerate(clients):
            client.send(WRITE, (8 + number) << 20, 200_000, payload=stamped(number + turn, 0, 200_000))
            client.send(FLUSH)
        for number, client in enumerate(clients):
            client.receive_all()
            assert client.read((8 + number) << 20, 200_000) == stamped(number + turn, 0, 200_000)
    for client in clients:
        client.disconnect()


# Certificates that change


def serial(client: Client) -> str:
    assert isinstance(client.sock, ssl.SSLSocket)
    certificate = client.sock.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


def test_a_renewed_certificate_is_used_at_the_next_handshake(
    raw: RawFile, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    used = tmp_path / "used"
    shutil.copytree(authority.server, used)
    renewed = Authority(tmp_path / "renewed")
    config = authority.config(certificate=used / "server-cert.pem", key=used / "server-key.pem", verify="off")
    context = authority.client_context()
    context.load_verify_locations(renewed.server / "ca-cert.pem")
    with serving(raw, Security(tls=TlsKeeper(config))) as server:
        old = secured(server, context).go("vol")

        shutil.copyfile(renewed.server / "server-cert.pem", used / "server-cert.pem")  # and not yet its key
        unchanged = secured(server, context).go("vol")
        assert serial(unchanged) == serial(old)
        assert "the former stay in use" in caplog.text

        shutil.copyfile(renewed.server / "server-key.pem", used / "server-key.pem")
        new = secured(server, context).go("vol")
        assert serial(new) != serial(old)
        for client in (old, unchanged, new):
            assert client.read(4096, 10) == stamped(SEED, 4096, 10)
            client.disconnect()


# Files that can't be used


@pytest.mark.parametrize(
    ("key", "content", "complaint"),
    [
        ("certificate", None, "certificate: cannot read"),
        ("certificate", "rubbish", "can't be used"),
        ("key", None, "key: cannot read"),
        ("key", "rubbish", "can't be used"),
        ("ca", None, "ca: cannot read"),
        ("ca", "rubbish", "can't be used"),
    ],
)
def test_files_that_can_not_be_used(
    authority: Authority, tmp_path: Path, key: str, content: str | None, complaint: str
) -> None:
    path = tmp_path / "file.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        TlsKeeper(authority.config(**{key: path}))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_of_another_certificate(authority: Authority, tmp_path: Path) -> None:
    other = authority.folder / "alice" / "client-key.pem"
    with pytest.raises(ConfigError, match="key values mismatch"):
        TlsKeeper(authority.config(key=other))


# The channel


def test_what_was_received_already_is_read_without_another_word_of_the_client(authority: Authority) -> None:
    """A reader that takes little at a time, and one that stops and goes on: the socket has nothing more to tell."""
    data = stamped(SEED, 0, 20_000)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        theirs, ours = socket.socketpair()
        received = bytearray()
        done = asyncio.Event()
        scratch = memoryview(bytearray(64))

        def take() -> None:
            count = channel.recv_into(scratch)
            received.extend(scratch[: max(0, count)])
            if len(received) > len(data) // 2 and not paused:
                paused.append(True)
                channel.set_reading(False)
                loop.call_later(0.01, channel.set_reading, True)
            if len(received) == len(data):
                done.set()

        paused: list[bool] = []
        steps: list[Callable[[], None]] = []

        def shake_hands() -> None:
            if channel.handshake():
                steps[0] = take
                channel.set_reading(True)

        steps.append(shake_hands)
        context = Context(loop, LIMITS)
        channel = TlsChannel(
            ours, loop, context.poll, context.buffers, lambda: steps[0](), lambda: None, lambda error: None
        )
        channel.secure(make_context(authority.config()), context.records)
        channel.set_reading(True)
        client = await asyncio.to_thread(authority.client_context().wrap_socket, theirs, server_hostname="localhost")
        client.sendall(data)
        await asyncio.wait_for(done.wait(), 10)
        assert bytes(received) == data
        channel.close()
        client.close()
        await asyncio.to_thread(context.close)

    uvloop.run(main())
