"""Names of volumes and snapshots."""

from __future__ import annotations

import re

from nbdsnap.errors import UsageError

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(NAME_PATTERN, re.ASCII)


def check_name(text: str) -> str:
    """``text``, where it may name a volume or a snapshot; UsageError else."""
    if not _NAME.fullmatch(text):
        raise UsageError(
            f"{text!r} is no name",
            hint="a name has 1 to 128 letters, digits, '.', '_' or '-', and begins with a letter or digit",
        )
    return text


def parse_snapshot_name(text: str) -> tuple[str, str]:
    """``VOLUME@NAME`` as its two names."""
    volume, at, name = text.partition("@")
    if not at:
        raise UsageError(f"{text!r} is no snapshot", hint="a snapshot is written VOLUME@NAME")
    return check_name(volume), check_name(name)
