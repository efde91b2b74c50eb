"""Commands before and after a snapshot: so that what uses the volume is at rest at that instant.

``before`` runs while writes still go on, since it causes some: a file system that is frozen writes back what it has.
Where it fails, or takes too long, there is no snapshot.  ``after`` runs in any case once ``before`` was begun: what is
frozen is thawed whatever has happened.

Of several volumes, each ``before`` runs in turn, then the snapshots are taken at one instant, then each ``after``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nbdsnap.errors import NbdsnapError

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
KILL_S = 2.0
"""Between asking a command that takes too long to end, and killing it."""

OUTPUT_BYTES = 500
"""Of a failed command's output: the end, where it says why."""


@dataclass(frozen=True)
class Hooks:
    """Of one volume.  Commands are lists of words, run without a shell; an empty one is none.

    They find the volume's name in NBDSNAP_VOLUME, and what is about to be taken in NBDSNAP_SNAPSHOTS.
    """

    before: Sequence[str] = ()
    after: Sequence[str] = ()
    timeout_s: float = TIMEOUT_S


@contextlib.contextmanager
def at_rest(hooks: Mapping[str, Hooks], snapshots: Sequence[str]) -> Iterator[None]:
    """Run what comes before, the block, and what comes after.  ``hooks``: by volume.

    Raises NbdsnapError where a command failed; of several, the first.
    """
    begun: list[tuple[str, Hooks]] = []
    taken = False
    failures: list[NbdsnapError] = []
    try:
        for volume, one in hooks.items():
            begun.append((volume, one))
            _run("before", one.before, volume, snapshots, one.timeout_s)
        yield
        taken = True
    finally:
        for volume, one in reversed(begun):
            try:
                _run("after", one.after, volume, snapshots, one.timeout_s)
            except NbdsnapError as error:
                log.error("%s", error)
                failures.append(error)
        if failures and taken:
            raise NbdsnapError(
                f"{', '.join(snapshots)} was taken, but {failures[0]}",
                hint="look whether what uses the volume goes on; the snapshot is good",
            )


def _run(when: str, command: Sequence[str], volume: str, snapshots: Sequence[str], timeout_s: float) -> None:
    if not command:
        return
    environment = {**os.environ, "NBDSNAP_VOLUME": volume, "NBDSNAP_SNAPSHOTS": " ".join(snapshots)}
    what = f"the command {when} a snapshot of {volume}"
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise NbdsnapError(f"{what} can't be run: {command[0]}: {error.strerror}") from None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise NbdsnapError(f"{what} ({command[0]}) was not done in {timeout_s:g} s") from None
        finally:
            _end(process)
        if code:
            end = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise NbdsnapError(f"{what} ({command[0]}) failed with {end}", hint=_last_words(output.fileno()))


def _end(process: subprocess.Popen[bytes]) -> None:
    """It, and what it has started, where it still runs."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_S)
            return


def _last_words(fd: int) -> str:
    size = os.fstat(fd).st_size
    text = os.pread(fd, OUTPUT_BYTES, max(0, size - OUTPUT_BYTES)).decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return f"it said: {lines[-1].strip()}" if lines else ""
