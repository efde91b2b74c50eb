"""The real clients: how each is found, run with a deadline, and read.

A client that is missing skips its tests on a developer's machine, and fails them in CI (where ``CI`` is set).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CLIENT_TIMEOUT_S = 60.0

_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Where Debian's clients are.  Its nbdsh needs Debian's python3, so this path stands before the environment's."""


def client_environment() -> dict[str, str]:
    environment = {**os.environ, "PATH": f"{_SYSTEM_PATH}:{os.environ.get('PATH', '')}", "LC_ALL": "C"}
    for inherited in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        environment.pop(inherited, None)
    return environment


def require_client(*names: str) -> None:
    """Skip the running test where one of the programs is missing; fail it in CI."""
    missing = [name for name in names if shutil.which(name, path=client_environment()["PATH"]) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def run(
    *command: str | Path, exit_code: int | None = 0, timeout_s: float = CLIENT_TIMEOUT_S, cwd: Path | None = None
) -> str:
    """Standard output of a client, which must end with ``exit_code`` (None: any)."""
    require_client(str(command[0]))
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        env=client_environment(),
        cwd=cwd,
    )
    shown = " ".join(str(word) for word in command)
    assert exit_code is None or done.returncode == exit_code, (
        f"{shown}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


def qemu_io(uri: str, *commands: str, read_only: bool = False, exit_code: int = 0) -> str:
    """Run qemu-io's commands one after the other on a raw image; fail where one reports an error or a wrong pattern."""
    words: list[str] = []
    for command in commands:
        words += ["-c", command]
    mode = ["-r"] if read_only else []
    output = run("qemu-io", "-f", "raw", *mode, *words, uri, exit_code=exit_code)
    assert "Pattern verification failed" not in output, output
    return output


def qemu_img_json(*words: str | Path) -> Any:
    return json.loads(run("qemu-img", words[0], "--output=json", *words[1:]))


def nbdinfo_json(uri: str, *options: str) -> Any:
    return json.loads(run("nbdinfo", "--json", *options, uri))


def nbdsh(script: str) -> str:
    """Run a script in libnbd's shell, with ``h`` not yet connected; its output."""
    return run("nbdsh", "-c", script)


def pread(uri: str, offset: int, length: int) -> bytes:
    """Bytes of an export, read with one request of libnbd's."""
    return bytes.fromhex(nbdsh(f"h.connect_uri({uri!r}); print(h.pread({length}, {offset}).hex())"))


def read_export(uri: str, into: Path) -> Path:
    """Copy a whole export into a new file with nbdcopy."""
    run("nbdcopy", uri, into)
    return into


def sha256_of_export(uri: str, scratch: Path) -> str:
    """SHA-256 of an export's whole content, read by nbdcopy."""
    copy = scratch / "export.copy"
    copy.unlink(missing_ok=True)
    try:
        return sha256_of_file(read_export(uri, copy))
    finally:
        copy.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
