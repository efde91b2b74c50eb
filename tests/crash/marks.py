"""Marks: how a traced program enters what its clients saw into the timeline of its file operations.

A mark is one line of JSON, written with one system call into a file of its own, so that the tracer sees it in order
with every other call.  What a mark tells of has happened before its call is entered (an acknowledgement was
received), or happens only after the call has returned (a request is about to be sent).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MARKS_VARIABLE = "NBDSNAP_TEST_MARKS"
"""The environment variable that names the file of marks to a traced program."""

ATTACHMENTS_SUFFIX = ".attachments"
"""After the marks' name: the folder of attachments."""

SITE = "site"
"""The key of a mark that names the place in the code of the same thread's next recorded operation."""

MODIFIED = "modified"
"""The key of a mark that tells a file's modification time."""


class Marks:
    """The file of marks, opened; safe to use from any thread."""

    def __init__(self) -> None:
        self._fd = os.open(os.environ[MARKS_VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def mark(self, **fields: Any) -> None:
        os.write(self._fd, json.dumps(fields, separators=(",", ":")).encode() + b"\n")

    def attach(self, name: str, content: bytes) -> None:
        """Keep something large with the recording."""
        folder = Path(os.environ[MARKS_VARIABLE] + ATTACHMENTS_SUFFIX)
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    def modified(self, path: str, mtime_ns: int) -> None:
        """Tell when a file (``path`` is relative to the recorded folder) was last changed, as fstat(2) says.  It must
        not be changed meanwhile."""
        self.mark(**{MODIFIED: path, "ns": mtime_ns})

    def site(self, name: str) -> None:
        """Name the place of this thread's next file operation, so that it can be told from others on the same file."""
        self.mark(**{SITE: name})
