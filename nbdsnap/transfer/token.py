"""What a receiver gives to whoever is to send the rest of a stream that was cut: a line of text."""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from dataclasses import asdict, dataclass

from nbdsnap.delta.format import DIGEST_SIZE, MAX_SIZE
from nbdsnap.errors import UsageError

VERSION = 1
MAX_LENGTH = 1024


@dataclass(frozen=True)
class Token:
    """``to`` and ``base``: identifiers of snapshots.  ``digest``: of the stream's checkpoint at ``position``."""

    to: str
    base: str | None
    position: int
    digest: str

    def encode(self) -> str:
        data = json.dumps({"v": VERSION, **asdict(self)}, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Token:
        try:
            if len(text) > MAX_LENGTH:
                raise ValueError
            fields = json.loads(base64.urlsafe_b64decode(text.strip() + "=" * (-len(text.strip()) % 4)))
            if fields.pop("v") != VERSION:
                raise UsageError("the token is of another version of nbdsnap")
            token = cls(**fields)
            uuid.UUID(token.to)
            if token.base is not None:
                uuid.UUID(token.base)
            if not 0 <= token.position < MAX_SIZE or len(bytes.fromhex(token.digest)) not in (0, DIGEST_SIZE):
                raise ValueError
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, binascii.Error):
            raise UsageError(
                "that is no token to go on with", hint="`nbdsnap receive VOLUME --resume` prints one where there is one"
            ) from None
        return token
