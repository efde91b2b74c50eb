"""``python -m tests.conformance URI`` runs the table against a server, ``--peers`` against four, side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.conformance.connection import Failure
from tests.conformance.report import Column, run_all, table
from tests.conformance.table import Case, load
from tests.conformance.target import Target


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description="Hold an NBD server to the protocol document.  The export is overwritten.",
        epilog="example: python -m tests.conformance nbd://127.0.0.1:10809/scratch --read-only nbd://127.0.0.1:10809/other",
    )
    parser.add_argument("uri", nargs="?", metavar="URI", help="an export that may be overwritten")
    parser.add_argument("--read-only", default="", metavar="URI", help="an export that can't be written")
    parser.add_argument(
        "--certificates", type=Path, metavar="FOLDER", help="ca-cert.pem, client-cert.pem, client-key.pem"
    )
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="for each answer")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose id contains it")
    parser.add_argument("--peers", action="store_true", help="compare nbdsnap, qemu-nbd, nbdkit, nbd-server")
    parser.add_argument("--size", type=int, default=8 << 30, metavar="BYTES", help="of the peers' volumes")
    options = parser.parse_args()
    cases = [case for case in load() if options.only in case.id]
    if options.peers:
        from tests.conformance import peers  # which needs nbdsnap, unlike the rest

        columns = peers.compare(cases, options.size, options.timeout)
    elif options.uri:
        columns = [_one(options, cases)]
    else:
        parser.error("name a URI, or --peers")
    print(table(cases, columns))
    ours = columns[0]
    return int(bool(ours.failures(cases, "MUST") or ours.failures(cases, "SHOULD")))


def _one(options: argparse.Namespace, cases: list[Case]) -> Column:
    target = Target(options.uri, options.read_only, options.certificates, options.timeout)
    try:
        return run_all("server", target, cases)
    except Failure as failure:
        sys.exit(f"{options.uri}: {failure}")


if __name__ == "__main__":
    sys.exit(main())
