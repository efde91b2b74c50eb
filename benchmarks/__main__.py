"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import chart, machine, report
from benchmarks.cells import CELLS, Cell, select
from benchmarks.clients import Client
from benchmarks.peers import Peer, all_peers
from benchmarks.runner import Run, Runner, Settings
from nbdsnap.sizes import parse_size

_QUICK_PEERS = "nbdsnap,nbdkit,qemu,qcow2-ext"
_EPILOG = """examples:
  python -m benchmarks --quick                          a minute: the cells that matter most
  python -m benchmarks --cells live --peers nbdsnap,nbdkit --rounds 7
  python -m benchmarks --cells 'fresh/*' --json fresh.json --svg fresh.svg
  python -m benchmarks --load fresh.json --svg again.svg"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        cells, peers = _chosen(options)
        loaded = _load(options.load) if options.load else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.list:
        sys.stdout.write(_list_text(cells, peers))
        return 0
    if loaded is not None:
        runs, settings = loaded
    else:
        runs, settings = _run(options, cells, _installed(peers, cells))
    return _finish(options, runs, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs nbdsnap side by side with other NBD servers, and compares them round by round.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="few cells, few contenders, two short rounds: a minute or so"
    )
    parser.add_argument(
        "--cells", metavar="PATTERN", help="only these cells: parts of names or shell patterns, by commas"
    )
    parser.add_argument("--peers", metavar="PATTERN", help="only these contenders, likewise")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds (default: 5; with --quick: 2)")
    parser.add_argument("--seconds", type=float, metavar="S", help="time of one run (default: 2; with --quick: 0.7)")
    parser.add_argument("--size", default="512MiB", help="of the volume (default: %(default)s)")
    parser.add_argument(
        "--snapshots", type=int, default=1, metavar="N", help="nbdsnap has N snapshots in snapshot cells"
    )
    parser.add_argument(
        "--folder", type=Path, help="for data and servers (default: nbdsnap-bench in the temporary folder)"
    )
    parser.add_argument("--list", action="store_true", help="show cells and contenders, run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the chart")
    parser.add_argument("--load", type=Path, metavar="FILE", help="run nothing: report on a file that --json wrote")
    parser.add_argument("--check", action="store_true", help="end with 1 where a target is missed")
    return parser


def _chosen(options: argparse.Namespace) -> tuple[list[Cell], list[Peer]]:
    """The cells and peers that the options select; ValueError where an option makes no sense."""
    quick = options.quick
    options.rounds = (2 if quick else 5) if options.rounds is None else options.rounds
    options.seconds = (0.7 if quick else 2.0) if options.seconds is None else options.seconds
    options.size = parse_size(options.size)
    if options.rounds < 1 or options.seconds <= 0 or options.snapshots < 1 or options.size < 1 << 26:
        raise ValueError("--rounds and --snapshots are at least 1, --seconds more than 0, --size at least 64MiB")
    named = {cell.name: cell for cell in CELLS}
    names = [cell.name for cell in CELLS if cell.quick] if quick and options.cells is None else list(named)
    cells = [named[name] for name in select(names, options.cells)]
    peers = {peer.key: peer for peer in all_peers(options.snapshots)}
    wanted = options.peers or (_QUICK_PEERS if quick else None)
    return cells, [peers[key] for key in select(list(peers), wanted)]


def _list_text(cells: Sequence[Cell], peers: Sequence[Peer]) -> str:
    lines = ["Contenders:"]
    for peer in peers:
        lacking = peer.missing()
        note = f"  (not installed: {', '.join(lacking)})" if lacking else ""
        lines.append(f"  {peer.key:<16} {peer.label}{note}")
    lines.append("Cells:")
    lines += [f"  {cell.name:<34} {cell.describe()}" for cell in cells]
    return "\n".join(lines) + "\n"


def _installed(peers: Sequence[Peer], cells: Sequence[Cell]) -> list[Peer]:
    """The peers whose programs are there, saying which are not; exits where a client is missing or nobody is left."""
    for peer in peers:
        if peer.missing():
            sys.stderr.write(f"left out, not installed: {peer.label} ({', '.join(peer.missing())})\n")
    present = [peer for peer in peers if not peer.missing()]
    clients = {cell.load.client for cell in cells} - {Client.PIPELINE}
    if any(cell.before for cell in cells):
        clients.add(Client.FIO)
    lacking = sorted(client.value for client in clients if shutil.which(client.value) is None)
    if lacking or not present:
        what = (
            f"these clients are not installed: {', '.join(lacking)}"
            if lacking
            else "none of the contenders is installed"
        )
        raise SystemExit(f"python -m benchmarks: {what}")
    return present


def _run(options: argparse.Namespace, cells: Sequence[Cell], peers: Sequence[Peer]) -> tuple[list[Run], dict[str, Any]]:
    folder = options.folder or Path(tempfile.gettempdir()) / "nbdsnap-bench"
    settings = Settings(folder.resolve(), options.size, options.rounds, options.seconds)
    runs: list[Run] = []
    with Runner(settings, peers) as runner:
        for cell in cells:
            mine: list[Run] = []
            for run in runner.run_cell(cell):
                mine.append(run)
                _progress(run)
            _progress(None)
            for summary in report.summarise(mine):
                sys.stdout.write(report.cell_text(summary) + "\n\n")
                sys.stdout.flush()
            runs += mine
    about = {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(settings.folder),
        "size_bytes": settings.size,
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "snapshots": options.snapshots,
    }
    return runs, about


def _progress(run: Run | None) -> None:
    """One line on a terminal's standard error that the next one replaces; None clears it."""
    if sys.stderr.isatty():
        text = "" if run is None else f"{run.cell}, round {run.round + 1}: {run.contender}"
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _load(path: Path) -> tuple[list[Run], dict[str, Any]]:
    data = json.loads(path.read_text())
    runs = report.runs_from_json(data)
    return runs, {key: value for key, value in data.items() if key not in ("format", "cells", "runs")}


def _finish(options: argparse.Namespace, runs: list[Run], about: dict[str, Any]) -> int:
    """The table, the files that were asked for, and the exit code: 1 where a run (with --check: or a target) failed."""
    summaries = report.summarise(runs)
    sys.stdout.write(report.table_text(summaries) + "\n")
    if options.json:
        options.json.write_text(json.dumps(report.to_json(runs, summaries, about), indent=1) + "\n")
    if options.svg:
        _draw(options.svg, summaries, about)
    failed, missed = report.failures(summaries), report.missed(summaries)
    for heading, lines in (("Failed runs:", failed), ("Targets missed:", missed)):
        if lines:
            sys.stdout.write("\n".join(["", heading, *(f"  {line}" for line in lines)]) + "\n")
    return 1 if failed or (options.check and missed) else 0


def _draw(path: Path, summaries: list[report.Summary], about: dict[str, Any]) -> None:
    try:
        path.write_text(chart.svg(summaries, _caption(about)))
    except ValueError as error:
        sys.stderr.write(f"no chart: {error}\n")


def _caption(about: dict[str, Any]) -> str:
    machine_facts = about.get("machine", {})
    facts = [machine_facts.get(key, "") for key in ("cpu", "kernel", "file system")]
    return ", ".join(fact for fact in (about.get("taken", "")[:10], f"{about.get('rounds')} rounds", *facts) if fact)


if __name__ == "__main__":
    sys.exit(main())
