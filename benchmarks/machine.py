"""What the numbers depend on: the machine, its file system, and the programs' versions, as far as they can be asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_VERSION_COMMANDS = {
    "fio": ("fio", "--version"),
    "nbdcopy": ("nbdcopy", "--version"),
    "nbdkit": ("nbdkit", "--version"),
    "qemu-nbd": ("qemu-nbd", "--version"),
    "nbd-server": ("nbd-server", "-V"),
}


def describe(folder: Path) -> dict[str, str]:
    """Names and values, for people; what can't be found out is left out."""
    uname = os.uname()
    facts = {
        "kernel": f"{uname.sysname} {uname.release}",
        "cpu": f"{os.cpu_count()} x {_proc_value('/proc/cpuinfo', 'model name')}",
        "memory": _proc_value("/proc/meminfo", "MemTotal"),
        "file system": _file_system(folder),
        "python": sys.version.split()[0],
        **{name: _version(command) for name, command in _VERSION_COMMANDS.items()},
    }
    return {name: value for name, value in facts.items() if value}


def _proc_value(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _file_system(folder: Path) -> str:
    """The type of the file system with the longest mount point that ``folder`` lies below."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, mount, this_kind = line.split()[:3]
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, this_kind
    return kind


def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0].strip() if lines else ""
