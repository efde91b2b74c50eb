"""The protocol's parsers under a coverage-guided fuzzer (atheris, which drives libFuzzer).

``python -m tests.fuzz.guided handshake --seconds 3600 --corpus corpus/handshake`` runs for an hour and keeps the inputs
that reached something new; ``--seed`` and ``--runs`` make a run repeatable; a file's name runs that one input.  What
has to hold is in :mod:`tests.fuzz.targets`, the same for Hypothesis; an input that breaks it is left as ``crash-…``.

An input is one byte that chooses among modes, one for the number of cuts, two for each cut, and the peer's stream.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

from tests.support import nbdwire as wire

MAX_INPUT = 4096
MAX_CUTS = 7
MEMORY_MIB = 512
"""libFuzzer ends the run where the process takes more than that beyond what it begins with."""

SECONDS_PER_INPUT = 120
"""Far more than any takes; a machine may stand still for a while."""

EXPORTS = ("vol", "", "vol@monday", "none")


def split_input(data: bytes) -> tuple[int, list[int], bytes]:
    """Mode, cuts, stream."""
    mode, count = (data[0], data[1] % (MAX_CUTS + 1)) if len(data) > 1 else (0, 0)
    cuts = [int.from_bytes(data[at : at + 2], "big") % MAX_INPUT for at in range(2, 2 + 2 * count, 2)]
    return mode, cuts, data[2 + 2 * count :]


def handshake(data: bytes) -> None:
    mode, cuts, stream = split_input(data)
    targets.negotiation(stream, cuts, list(TlsMode)[mode % 3])


def requests(data: bytes) -> None:
    mode, cuts, stream = split_input(data)
    targets.transmission(stream, cuts, extended=bool(mode & 1))
    targets.checked_requests(stream, extended=bool(mode & 1), read_only=bool(mode & 2), structured=bool(mode & 4))


def option_data(data: bytes) -> None:
    targets.option_data(data)


def canary(data: bytes) -> None:
    """Fails as soon as a peer gets into transmission: shows that a failure is found and told."""
    pair = Pair(flags=None)
    with contextlib.suppress(ProtocolError):
        pair.server.receive(split_input(data)[2])
    assert pair.server.session is None, "a peer is in transmission"


def handshake_seeds() -> Iterable[bytes]:
    """Every option, alone and in the order of a real client, in all three modes of TLS."""
    options = [wire.option(number) for number in range(13)]
    options += [wire.info(name, [1, 2, 3], number) for name in EXPORTS for number in (wire.INFO, wire.GO)]
    queries = ["base:allocation", "base:", "qemu:dirty-bitmap:monday", "x:y"]
    options += [wire.contexts(name, queries, number) for name in EXPORTS[:2] for number in (9, 10)]
    options += [wire.option(1, name.encode()) for name in EXPORTS]
    options += [wire.option(99, bytes(50)), wire.option(3, bytes(3000)), wire.option(wire.GO, b"\xff" * 9)]
    streams = [wire.client_flags() + option + end for option in options for end in (b"", wire.go("vol"))]
    streams.append(wire.client_flags() + options[8] + options[3] + wire.contexts("vol", queries) + wire.go("vol", [3]))
    streams.append(wire.client_flags() + options[11] + wire.contexts("vol", queries) + wire.go("vol") + bytes(40))
    streams.append(wire.client_flags() + wire.option(99) * 41)
    for mode in range(3):
        for stream in streams:
            yield bytes([mode, 1, 0, 20]) + stream


def request_seeds() -> Iterable[bytes]:
    for extended in (False, True):
        for command in range(10):
            for flags in (0, wire.FUA, wire.PAYLOAD_LEN, 0x100):
                carries = flags & wire.PAYLOAD_LEN if extended else command == wire.WRITE
                payload = b"\0\0\0\0\0\0\x10\0\0\0\0\1" if carries else b""
                length = len(payload) or 4096
                one = wire.request(command, 512, length, flags=flags, cookie=7, payload=payload, extended=extended)
                for mode in (0, 2, 4):
                    yield bytes([mode | extended, 1, 0, 30]) + one + one
        long = bytes(700)
        flags = wire.PAYLOAD_LEN if extended else 0
        yield bytes([extended, 0]) + wire.request(1, 0, flags=flags, payload=long, extended=extended) * 2


def option_seeds() -> Iterable[bytes]:
    for name in EXPORTS:
        yield wire.info(name, [0, 3])[16:]
        yield wire.contexts(name, ["base:allocation", "x:"])[16:]


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], Iterable[bytes]]]] = {
    "handshake": (handshake, handshake_seeds),
    "requests": (requests, request_seeds),
    "options": (option_data, option_seeds),
    "canary": (canary, handshake_seeds),
}

WORDS = (b"IHAVEOPT", b"\x25\x60\x95\x13", b"\x21\xe4\x1c\x71", b"base:allocation", b"vol@monday", b"\xff\xff\xff\xff")
"""What a fuzzer would take long to guess."""


def dictionary_line(word: bytes) -> str:
    """In libFuzzer's format."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("file", nargs="*", type=Path, help="run these inputs and nothing else")
    parser.add_argument("--seconds", type=int, default=60, help="how long (60)")
    parser.add_argument("--runs", type=int, default=-1, help="how many inputs at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--crashes", type=Path, default=Path(), help="where an input that fails is left")
    parser.add_argument("--corpus", type=Path, help="a folder to begin with and to keep what is new")
    options = parser.parse_args()
    function, seeds = TARGETS[options.target]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "seeds").mkdir()
        for number, seed in enumerate(seeds()):
            (folder / "seeds" / str(number)).write_bytes(seed)
        dictionary = folder / "words"
        dictionary.write_text("".join(map(dictionary_line, WORDS)))
        arguments = [f"-seed={options.seed}", f"-max_len={MAX_INPUT}", f"-dict={dictionary}"]
        arguments += [f"-max_total_time={options.seconds}", f"-runs={options.runs}"]
        arguments += [f"-artifact_prefix={options.crashes}/"]
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # a large parent's, too
        arguments += [f"-rss_limit_mb={peak_mib + MEMORY_MIB}", f"-timeout={SECONDS_PER_INPUT}"]
        arguments += ["-print_final_stats=1"]
        if options.file:
            arguments = [str(path) for path in options.file]
        else:
            corpus = options.corpus or folder / "corpus"
            corpus.mkdir(parents=True, exist_ok=True)
            arguments += [str(corpus), str(folder / "seeds")]
        atheris.Setup([sys.argv[0], *arguments], function)
        atheris.Fuzz()


if __name__ == "__main__":
    with atheris.instrument_imports(include=["nbdsnap.nbd"]):
        from nbdsnap.errors import ProtocolError
        from nbdsnap.nbd.negotiation import TlsMode
        from tests.fuzz import targets
        from tests.support.nbdpair import Pair

    main()
