"""A small pipelining NBD client: exactly the requests that a cell asks for, with next to no work in between.

It keeps ``depth`` requests in flight on one connection.  All that arrives together is taken together, and the requests
that follow go out in one send.  A FLUSH is sent after each ``flush_every`` *answered* writes (the protocol promises
nothing about writes that are not), takes a place in the pipeline like any other request, and is not counted as an
operation.  With ``wait_at_flush`` the pipeline runs empty before the FLUSH and waits for it.

It reads, or it writes, never both: with both, each side could wait for the other to take its payloads.

    python -m benchmarks.pipeline 'nbd+unix:///vol?socket=/tmp/nbd.sock' --rw randwrite --depth 32 --flush-every 32
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import struct
import sys
import time
from urllib.parse import parse_qs, unquote, urlsplit

from benchmarks.stats import percentile

_HELLO = struct.Struct(">QQH")
_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")
_INFO_EXPORT = struct.Struct(">HQH")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")

_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698
_FIXED_NO_ZEROES = 3
_OPT_GO = 7
_REP_ACK = 1
_REP_INFO = 3
_REP_ERROR = 1 << 31
_CMD_READ, _CMD_WRITE, _CMD_DISC, _CMD_FLUSH = 0, 1, 2, 3

_OFFSETS = 1 << 17
"""How many random offsets are drawn before the clock starts; a longer run goes round."""

_TIMEOUT_S = 60.0

FLUSH = -1
"""In place of an offset: a FLUSH is next."""


class PipelineError(Exception):
    """The server did not answer as the protocol says."""


def connect(uri: str) -> tuple[socket.socket, int]:
    """A connection in the transmission phase (simple replies), and the export's size in bytes."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(_TIMEOUT_S)
        sock.connect(parse_qs(parts.query)["socket"][0])
    else:
        sock = socket.create_connection((parts.hostname, parts.port or 10809), _TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        return sock, _negotiate(sock, export.encode())
    except BaseException:
        sock.close()
        raise


def _negotiate(sock: socket.socket, export: bytes) -> int:
    magic, have_opt, _flags = _HELLO.unpack(receive(sock, _HELLO.size))
    if (magic, have_opt) != (_NBDMAGIC, _IHAVEOPT):
        raise PipelineError("no newstyle NBD server")
    data = struct.pack(">I", len(export)) + export + b"\0\0"
    sock.sendall(struct.pack(">I", _FIXED_NO_ZEROES) + _OPTION.pack(_IHAVEOPT, _OPT_GO, len(data)) + data)
    size = -1
    while True:
        magic, _option, kind, length = _OPTION_REPLY.unpack(receive(sock, _OPTION_REPLY.size))
        payload = receive(sock, length)
        if magic != _REPLY_MAGIC or kind & _REP_ERROR:
            raise PipelineError(f"the export was refused: {payload.decode(errors='replace') or hex(kind)}")
        if kind == _REP_INFO and payload[:2] == b"\0\0":
            _info, size, _flags = _INFO_EXPORT.unpack(payload)
        if kind == _REP_ACK:
            return size


def receive(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise PipelineError("the server closed the connection")
        data += part
    return bytes(data)


def offsets_of(rw: str, block: int, region: int, seed: int, once: bool) -> list[int]:
    """The offsets to use, in order: each block of the region at most once, or (``once`` false) to be gone round."""
    blocks = region // block
    if blocks < 1:
        raise PipelineError(f"the region of {region} bytes holds no block of {block}")
    rng = random.Random(seed)
    if not rw.startswith("rand"):
        numbers = list(range(blocks))
    elif once:
        numbers = list(range(blocks))
        rng.shuffle(numbers)
    else:
        numbers = [rng.randrange(blocks) for _ in range(_OFFSETS)]
    return [number * block for number in numbers]


class Schedule:
    """Which request comes next: the order of the load, without any I/O.

    ``next`` gives an offset, ``FLUSH``, or None where nothing may be sent now (ever again, if nothing is in
    flight).
    """

    def __init__(self, offsets: list[int], once: bool, flush_every: int = 0, wait_at_flush: bool = False) -> None:
        self.offsets = offsets
        self.once = once
        self.flush_every = flush_every
        self.wait_at_flush = wait_at_flush
        self.sent = 0
        self.flushes = 0
        self._unflushed = 0  # writes answered since the last FLUSH was sent; with wait_at_flush: sent since then
        self._flushing = False

    def next(self, in_flight: int) -> int | None:
        if self.wait_at_flush and self._flushing:
            if in_flight:
                return None
            self._flushing = False
        if self.flush_every and self._unflushed >= self.flush_every:
            if self.wait_at_flush and in_flight:
                return None
            return self._flush()
        if self.once and self.sent >= len(self.offsets):
            return None
        offset = self.offsets[self.sent % len(self.offsets)]
        self.sent += 1
        if self.wait_at_flush:
            self._unflushed += 1
        return offset

    def answered(self) -> None:
        """A read or write (no FLUSH) has been answered."""
        if not self.wait_at_flush:
            self._unflushed += 1

    def _flush(self) -> int:
        self._unflushed -= self.flush_every
        self._flushing = True
        self.flushes += 1
        return FLUSH


class Pipeline:
    """One load on one connection."""

    def __init__(self, sock: socket.socket, schedule: Schedule, write: bool, block: int, depth: int) -> None:
        self.sock = sock
        self.schedule = schedule
        self.command = _CMD_WRITE if write else _CMD_READ
        self.payload = os.urandom(block) if write else b""
        self.block = block
        self.depth = depth
        self.latencies_ns: list[int] = []
        self._answer = _REPLY.size if write else _REPLY.size + block
        self._buffer = bytearray(depth * (_REPLY.size + block))
        self._filled = 0
        self._sent_at = [0] * depth  # by slot, which is the cookie too; 0 for a FLUSH
        self._free = list(range(depth))

    def run(self, seconds: float) -> float:
        """Send until the schedule or the time is used up, and take all answers: the seconds that took."""
        begin = now = time.perf_counter_ns()
        end = begin + int(seconds * 1e9)
        while True:
            if now < end:
                self._fill_pipeline()
            if len(self._free) == self.depth:
                return (now - begin) / 1e9
            received = self.sock.recv_into(memoryview(self._buffer)[self._filled :])
            if not received:
                raise PipelineError("the server closed the connection")
            self._filled += received
            now = time.perf_counter_ns()
            self._take_answers(now)

    def _fill_pipeline(self) -> None:
        out: list[bytes] = []
        now = time.perf_counter_ns()
        while self._free:
            offset = self.schedule.next(self.depth - len(self._free))
            if offset is None:
                break
            slot = self._free.pop()
            if offset == FLUSH:
                self._sent_at[slot] = 0
                out.append(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_FLUSH, slot, 0, 0))
                continue
            self._sent_at[slot] = now
            out.append(_REQUEST.pack(_REQUEST_MAGIC, 0, self.command, slot, offset, self.block))
            if self.payload:
                out.append(self.payload)
        if out:
            self.sock.sendall(b"".join(out))

    def _take_answers(self, now: int) -> None:
        position = 0
        while self._filled - position >= _REPLY.size:
            magic, error, slot = _REPLY.unpack_from(self._buffer, position)
            if magic != _SIMPLE_REPLY_MAGIC or error or slot >= self.depth:
                raise PipelineError(f"a bad answer: magic {magic:#x}, error {error}")
            sent_at = self._sent_at[slot]
            length = self._answer if sent_at else _REPLY.size
            if self._filled - position < length:
                break
            position += length
            self._free.append(slot)
            if sent_at:
                self.latencies_ns.append(now - sent_at)
                self.schedule.answered()
        rest = self._filled - position
        if position and rest:
            self._buffer[:rest] = self._buffer[position : self._filled]
        self._filled = rest


def run_load(uri: str, options: argparse.Namespace) -> dict[str, float | int | None]:
    """Run one load; the result has the shape of :class:`benchmarks.clients.Outcome`."""
    sock, size = connect(uri)
    with sock:
        region = min(options.region or size, size)
        offsets = offsets_of(options.rw, options.block, region, options.seed, options.once)
        schedule = Schedule(offsets, options.once, options.flush_every, options.wait_at_flush)
        pipeline = Pipeline(sock, schedule, options.rw.endswith("write"), options.block, options.depth)
        seconds = pipeline.run(options.seconds)
        sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0))
    ordered = sorted(pipeline.latencies_ns)
    return {
        "operations": len(ordered),
        "bytes": len(ordered) * options.block,
        "seconds": seconds,
        "p50_us": percentile(ordered, 50) / 1000 if ordered else None,
        "p99_us": percentile(ordered, 99) / 1000 if ordered else None,
    }


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("uri", help="nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH")
    parser.add_argument("--rw", choices=["read", "write", "randread", "randwrite"], default="randread")
    parser.add_argument("--block", type=int, default=4096, help="bytes per request (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=1, help="requests in flight (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="run time (default: %(default)s)")
    parser.add_argument("--region", type=int, default=0, help="bytes from the export's start (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of random blocks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="touch each block at most once")
    parser.add_argument("--flush-every", type=int, default=0, help="a FLUSH per so many answered writes")
    parser.add_argument("--wait-at-flush", action="store_true", help="run empty before each FLUSH, and wait for it")
    options = parser.parse_args(arguments)
    if min(options.block, options.depth) < 1:
        parser.error("--block and --depth must be at least 1")
    if options.flush_every and not options.rw.endswith("write"):
        parser.error("--flush-every needs a load that writes")
    return options


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    try:
        result = run_load(options.uri, options)
    except (PipelineError, OSError, struct.error) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
