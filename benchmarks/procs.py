"""What /proc tells about a server and its helpers, and starting and stopping servers.

CPU time counts the whole family: the process, its live descendants, and its children that have ended (nbd-server forks
one per connection).  /proc/PID/stat counts in clock ticks (10 ms), so runs have to be long beside that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_TIMEOUT_S = 60.0
"""A server with ten million preserved chunks may take seconds; one that takes a minute has failed."""

STOP_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 5.0
"""How long work that a server does after its last reply is waited for, before its CPU time is read."""

POLL_INTERVAL_S = 0.02
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class PeerError(Exception):
    """A server or a client could not be run, or did not do what it was asked."""


def read_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (state, parent, …); empty where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 2 :].split()


def is_alive(pid: int) -> bool:
    stat = read_stat(pid)
    return bool(stat) and stat[0] not in ("Z", "X")


def family(pid: int) -> list[int]:
    """``pid`` and all its live descendants."""
    found = [pid]
    for member in found:
        for task in Path(f"/proc/{member}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found.extend(int(child) for child in task.read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process's family, ended children included."""
    ticks = 0
    for member in family(pid):
        stat = read_stat(member)
        if stat:
            ticks += sum(int(field) for field in stat[11:15])
    return ticks * TICK_S


def settled_cpu_seconds(pid: int, quiet_s: float = 0.08) -> float:
    """:func:`cpu_seconds`, once it has stood still for ``quiet_s``: work put off until after the reply counts too."""
    end = time.monotonic() + SETTLE_TIMEOUT_S
    last, since = cpu_seconds(pid), time.monotonic()
    while time.monotonic() < end:
        time.sleep(POLL_INTERVAL_S)
        now = cpu_seconds(pid)
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since >= quiet_s:
            break
    return last


def memory_bytes(pid: int) -> int:
    """Resident anonymous memory of the family: what the server itself holds, without the files that it has mapped."""
    return sum(_status_bytes(member, "RssAnon:") for member in family(pid))


def resident_bytes(pid: int) -> int:
    """All resident memory of the family, mapped files (LMDB's index is one) included."""
    return sum(_status_bytes(member, "VmRSS:") for member in family(pid))


def _status_bytes(pid: int, key: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            raise PeerError(f"after {timeout_s:g} s still waiting for {what}")
        time.sleep(POLL_INTERVAL_S)


def accepts(address: str | tuple[str, int]) -> bool:
    """True where somebody greets us as an NBD server: at a unix socket's path, or at a host and port."""
    kind = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.settimeout(5.0)
        try:
            probe.connect(address)
            return probe.recv(8) == b"NBDMAGIC"
        except OSError:
            return False


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(command: Sequence[str | Path], timeout_s: float, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that has to succeed; :class:`PeerError` with its last words where it does not."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=env,
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{words[0]} did not end within {timeout_s:g} s") from None
    if done.returncode != 0:
        raise PeerError(f"{words[0]}: exit {done.returncode}: {last_words(done.stderr or done.stdout)}")
    return done.stdout


def last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "(no message)"


def terminate(pid: int, reap: subprocess.Popen[bytes] | None) -> None:
    """SIGTERM, then SIGKILL where that does not help in time.  ``reap``: its handle, where it is our child."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)

    def gone() -> bool:
        return reap.poll() is not None if reap is not None else not is_alive(pid)

    try:
        wait_until(gone, f"process {pid} to end", STOP_TIMEOUT_S)
    except PeerError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if reap is not None:
            reap.wait()
        raise
