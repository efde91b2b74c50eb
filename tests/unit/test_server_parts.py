"""The small parts below the data path: completions, the busy-poll, cold reads, buffers, the channel."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdsnap.server.buffers import BufferPool, new_buffer
from nbdsnap.server.busypoll import MOST_SKIPPED, BusyPoll
from nbdsnap.server.channel import Channel
from nbdsnap.server.completions import Completions
from nbdsnap.server.workers import Workers
from tests.support.blocks import stamped, write_stamped
from tests.support.deadline import wait_until
from tests.support.nbdserver import ServerThread
from tests.support.nbdwire import READ
from tests.support.rawdevice import RawDevice, RawFile, RawPool

SEED = 7


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that is a coroutine, in the server's kind of loop."""

    def run() -> None:
        uvloop.run(test())

    run.__name__ = test.__name__
    return run


# Completions


class Gatherer:
    def __init__(self) -> None:
        self.bursts = 0
        self.results: list[int] = []

    def end_of_burst(self) -> None:
        self.bursts += 1


@in_loop
async def test_results_of_many_threads_arrive_once_and_in_each_thread_s_order() -> None:
    completions = Completions(asyncio.get_running_loop())
    results: list[tuple[int, int]] = []
    done = asyncio.Event()

    def finish(result: tuple[int, int]) -> None:
        results.append(result)
        if len(results) == 4000:
            done.set()

    def work(name: int) -> None:
        for number in range(1000):
            completions.post(finish, (name, number))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.wait_for(done.wait(), 30)
    for thread in threads:
        thread.join()
    for name in range(4):
        assert [number for thread, number in results if thread == name] == list(range(1000))


@in_loop
async def test_a_burst_is_gathered_once() -> None:
    completions = Completions(asyncio.get_running_loop())
    gatherer = Gatherer()

    def finish(result: int) -> None:
        gatherer.results.append(result)
        completions.touch(gatherer)

    for number in range(100):
        completions.post(finish, number)
    assert completions.waiting
    await asyncio.sleep(0)
    assert gatherer.results == list(range(100))
    assert gatherer.bursts == 1
    assert not completions.waiting


@in_loop
async def test_what_a_result_posts_comes_in_the_next_drain() -> None:
    completions = Completions(asyncio.get_running_loop())
    seen: list[int] = []

    def finish(result: int) -> None:
        seen.append(result)
        if result < 3:
            completions.post(finish, result + 1)

    completions.post(finish, 0)
    completions.drain()
    assert seen == [0]
    while completions.waiting:
        await asyncio.sleep(0)
    assert seen == [0, 1, 2, 3]


@in_loop
async def test_a_result_that_fails_does_not_stop_the_others() -> None:
    completions = Completions(asyncio.get_running_loop())
    seen: list[int] = []
    completions.post(lambda _: 1 / 0, None)
    completions.post(seen.append, 1)
    completions.drain()
    assert seen == [1]


def test_a_result_after_the_end_is_nobody_s() -> None:
    loop = uvloop.new_event_loop()
    completions = Completions(loop)
    loop.close()
    completions.post(print, None)


def test_a_job_that_fails_does_not_end_its_worker() -> None:
    workers = Workers(1)
    done: list[int] = []
    workers.submit(lambda: 1 / 0)
    workers.submit(lambda: done.append(1))
    workers.close()
    assert done == [1]


# Buffers


def test_buffers_are_used_again_and_bounded() -> None:
    pool = BufferPool(kept_bytes=1 << 20)
    first = pool.take(300_000)
    assert 300_000 <= len(first) < 1 << 20
    pool.give(first)
    assert pool.take(300_001) is first
    big = pool.take(4 << 20)
    pool.give(big)
    assert pool.take(4 << 20) is not big  # more than is kept
    for size in (1, 64 << 10, (1 << 20) + 64, 64 << 20):
        assert len(pool.take(size)) >= size


def test_a_new_buffer_takes_memory_only_when_touched() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    buffer = new_buffer(1 << 30)
    buffer[5] = 1
    assert resident() - before < 64 << 20


# Channel


class Peer:
    """A channel and the other end of its socket."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.sock, ours = socket.socketpair()
        self.sock.setblocking(False)
        self.buffers = BufferPool()
        self.poll = BusyPoll(loop, Completions(loop))
        self.drained = 0
        self.lost: list[OSError] = []
        self.channel = Channel(ours, loop, self.poll, self.buffers, lambda: None, self.on_drained, self.lost.append)

    def on_drained(self) -> None:
        self.drained += 1

    async def receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            data += await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)
        return bytes(data)


@in_loop
async def test_a_channel_keeps_the_order_whatever_the_peer_takes() -> None:
    peer = Peer()
    scratch = memoryview(bytearray(600_000))
    expected = b""
    for number in range(12):
        part = stamped(number, 0, 500_000)
        expected += part
        if number % 3:
            scratch[: len(part)] = part
            peer.channel.send(scratch[: len(part)])
            scratch[:] = bytes(len(scratch))  # used again at once
        else:
            buffer = peer.buffers.take(len(part))
            buffer[: len(part)] = part
            peer.channel.queue(buffer[: len(part)], buffer)
            peer.channel.flush()
    assert peer.channel.queued > 0
    assert await peer.receive(len(expected)) == expected
    assert peer.channel.queued == 0
    assert peer.drained > 0
    peer.channel.close()


@in_loop
async def test_a_channel_gives_buffers_back_when_the_peer_has_gone() -> None:
    peer = Peer()
    given: list[memoryview] = []
    peer.buffers.give = given.append  # type: ignore[method-assign]
    buffers = [peer.buffers.take(1 << 20) for _ in range(4)]
    for buffer in buffers:
        peer.channel.queue(buffer, buffer)
    peer.channel.queue(memoryview(b""), buffers[0])
    peer.channel.flush()
    peer.sock.close()
    while not peer.lost:
        await asyncio.sleep(0)
    assert peer.channel.closed
    assert peer.channel.queued == 0
    assert len(given) == 5
    peer.channel.send(memoryview(b"late"))
    peer.channel.queue(buffers[1], buffers[1])
    assert len(given) == 6


# Busy-poll


@in_loop
async def test_a_busy_poll_that_does_not_pay_is_left_out() -> None:
    peer = Peer()
    peer.channel.set_reading(True)
    calls = 0
    real = peer.poll._epoll

    class Counting:
        def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
            nonlocal calls
            calls += 1
            return real.poll(timeout, most)

    peer.poll._epoll = Counting()  # type: ignore[assignment]
    spins = 0
    for _ in range(1000):
        before = calls
        peer.poll.spin()
        spins += calls > before
    assert spins < 1000 // MOST_SKIPPED + 10
    peer.poll._epoll = real
    peer.channel.close()


@in_loop
async def test_a_busy_poll_gives_way_to_other_threads() -> None:
    poll = BusyPoll(asyncio.get_running_loop(), Completions(asyncio.get_running_loop()))
    poll.outstanding = 1
    given_up: list[bool] = []

    class Never:
        def look(self) -> bool:
            raise AssertionError("looked")

        def give_up(self) -> None:
            given_up.append(True)

    poll.expect(Never())
    await asyncio.sleep(0)
    assert given_up == [True]


# Cold reads


class SlowDisk(RawDevice):
    """``read_now`` refuses a range this many times: the pages are on their way."""

    refusals = 3

    def __init__(self, file: RawFile, name: str) -> None:
        super().__init__(file, name)
        self.refused: dict[int, int] = {}

    def read_now(self, buffer: memoryview, offset: int) -> bool:
        count = self.refused[offset] = self.refused.get(offset, 0) + 1
        return count > self.refusals and super().read_now(buffer, offset)


class SlowPool(RawPool):
    def open_device(self, name: str, bases: Sequence[str] = ()) -> SlowDisk:
        return SlowDisk(self.files[name], name)


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[RawFile]:
    opened = RawFile(write_stamped(tmp_path / "raw.img", 1 << 20, SEED))
    yield opened
    opened.close()


@pytest.fixture
def server(raw: RawFile) -> Iterator[ServerThread]:
    running = ServerThread(SlowPool({"vol": raw}))
    yield running
    running.stop()
    assert raw.opened == 0


@pytest.mark.parametrize("dialect", ["simple", "structured", "extended"])
def test_cold_reads_are_found_by_the_busy_poll(
    server: ServerThread, raw: RawFile, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsnap.server.reads.PATIENCE_S", 60.0)
    raw.gate.clear()  # no worker gets anything done
    with server.client("vol", dialect) as client:
        cookies = [client.send(READ, number * 8192, 8192) for number in range(100)]
        replies = client.receive_all()
        for number, cookie in enumerate(cookies):
            assert replies[cookie].data == stamped(SEED, number * 8192, 8192)
        client.disconnect()


def test_cold_reads_of_a_slow_disk_are_a_worker_s(
    server: ServerThread, raw: RawFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowDisk, "refusals", 1 << 60)
    raw.gate.clear()
    with server.client() as client:
        cookies = [client.send(READ, number * 4096, 4096) for number in range(200)]
        wait_until(lambda: raw.waiting == 1, "one worker, for one connection, to wait for the disk")
        with server.client() as other:  # whose disk is not slow, say
            monkeypatch.setattr(SlowDisk, "refusals", 0)
            for _ in range(100):
                assert other.read(4096, 100) == stamped(SEED, 4096, 100)
        raw.gate.set()
        replies = client.receive_all()
        assert all(replies[cookie].data == stamped(SEED, n * 4096, 4096) for n, cookie in enumerate(cookies))


def test_a_client_that_leaves_while_its_cold_reads_are_looked_for(
    server: ServerThread, raw: RawFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsnap.server.reads.PATIENCE_S", 0.2)
    monkeypatch.setattr(SlowDisk, "refusals", 1 << 60)
    client = server.client()
    for number in range(100):
        client.send(READ, number * 4096, 4096)
    client.close()
    wait_until(lambda: server.connections() == 0, "the end of the connection")
    wait_until(lambda: raw.opened == 0, "the device to be given back")


def test_a_slow_disk_costs_the_processor_little(
    server: ServerThread, raw: RawFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that take long are not looked for again and again."""
    monkeypatch.setattr(SlowDisk, "refusals", 1 << 60)
    raw.gate.clear()
    with server.client() as client:
        client.send(READ, 0, 4096)
        wait_until(lambda: raw.waiting, "the read to wait for the disk")
        before = time.process_time()
        started = time.monotonic()
        wait_until(lambda: time.monotonic() > started + 0.5, "half a second of nothing")
        assert time.process_time() - before < 0.1
        raw.gate.set()
        client.receive_all()
