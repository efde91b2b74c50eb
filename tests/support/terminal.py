"""A program on a terminal: a pseudo-terminal of a given width, read until the program ends or has said enough."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.deadline import Deadline

TIMEOUT_S = 30.0

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")


class Terminal:
    def __init__(
        self, command: Sequence[str | Path], width: int = 80, environment: Mapping[str, str] | None = None
    ) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**inherited, "TERM": "xterm", **(environment or {})},
            start_new_session=True,
        )
        os.close(slave)
        self.raw = ""

    @property
    def text(self) -> str:
        """What was shown so far: without colours, and with what was overwritten gone."""
        return "\n".join(_overwrite(line) for line in _ESCAPES.sub("", self.raw).split("\r\n"))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, wanted: str) -> str:
        deadline = Deadline(TIMEOUT_S)
        while wanted not in self.text:
            assert self._read(deadline), f"{wanted!r} was never shown, but: {self.text!r}"
        return self.text

    def read_all(self) -> str:
        """Up to the program's end."""
        deadline = Deadline(TIMEOUT_S)
        while self._read(deadline):
            pass
        self.process.wait(deadline.remaining())
        return self.text

    def _read(self, deadline: Deadline) -> bool:
        readable, _, _ = select.select([self._master], [], [], deadline.remaining())
        if not readable:
            return False
        try:
            chunk = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the terminal open any more
            return False
        self.raw += chunk.decode(errors="replace")
        return bool(chunk)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _overwrite(line: str) -> str:
    """Carriage returns and backspaces move back; what follows replaces what was there."""
    shown: list[str] = []
    position = 0
    for character in line:
        if character == "\r":
            position = 0
        elif character == "\b":
            position = max(0, position - 1)
        else:
            shown[position : position + 1] = [character]
            position += 1
    return "".join(shown)
