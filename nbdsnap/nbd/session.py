"""What a server offers, and what a handshake agreed on.

The driver implements :class:`ExportSource`; the handshake asks it, and ends with a :class:`Session`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from nbdsnap.errors import NbdsnapError
from nbdsnap.nbd.constants import (
    MAX_PAYLOAD,
    MINIMUM_BLOCK,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_FLAG_BLOCK_STATUS_PAYLOAD,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_ROTATIONAL,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REP_ERR_POLICY,
    PREFERRED_BLOCK,
)

Handle = TypeVar("Handle")
HandleT = TypeVar("HandleT", covariant=True)


class OptionRefusedError(NbdsnapError):
    """An export source refuses an option; ``reply`` is the NBD_REP_ERR_* that the client gets, with the text."""

    def __init__(self, text: str, reply: int = NBD_REP_ERR_POLICY) -> None:
        super().__init__(text)
        self.reply = reply


@dataclass(frozen=True)
class ExportInfo:
    """One export as clients are told about it.  Sizes in bytes.  ``name`` is the canonical one."""

    name: str
    size: int
    description: str = ""
    read_only: bool = False
    rotational: bool = False
    minimum_block: int = MINIMUM_BLOCK
    preferred_block: int = PREFERRED_BLOCK
    maximum_payload: int = MAX_PAYLOAD

    def transmission_flags(self, *, structured: bool = False, status_payload: bool = False) -> int:
        """The flags of a session with this export.

        ``structured``: structured replies or extended headers are on.  ``status_payload``: extended headers are on
        and metadata contexts are selected.  FLUSH and FUA cover every connection, hence CAN_MULTI_CONN.
        """
        flags = (
            NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE
        )
        if self.read_only:
            flags |= NBD_FLAG_READ_ONLY
        else:
            flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO
        if self.rotational:
            flags |= NBD_FLAG_ROTATIONAL
        if structured:
            flags |= NBD_FLAG_SEND_DF
        if status_payload:
            flags |= NBD_FLAG_BLOCK_STATUS_PAYLOAD
        return flags


class ExportSource(Protocol[HandleT]):
    """What the handshake asks its driver.  Synchronous and in memory: no method waits.

    Any method may raise :class:`OptionRefusedError`, or another NbdsnapError, which becomes an error reply.
    """

    def list(self) -> Iterable[ExportInfo]:
        """The exports that this client may see."""

    def find(self, name: str) -> ExportInfo | None:
        """The export of that name ("" is the default one); None where there is none."""

    def open(self, name: str, contexts: Sequence[str]) -> HandleT | None:
        """Open it for transmission, where it is to be asked about these of its metadata contexts: called once in a
        handshake that succeeds.  None where there is none (any more)."""

    def meta_contexts(self, name: str) -> Sequence[str]:
        """The metadata contexts of an export that :meth:`find` knows."""


def _allowed_flags(transmission_flags: int, extended: bool) -> tuple[int, ...]:
    """The command flags that each command 0..7 may carry (proto.md, "Command flags")."""
    fua = NBD_CMD_FLAG_FUA if transmission_flags & NBD_FLAG_SEND_FUA else 0
    df = NBD_CMD_FLAG_DF if transmission_flags & NBD_FLAG_SEND_DF else 0
    fast = NBD_CMD_FLAG_FAST_ZERO if transmission_flags & NBD_FLAG_SEND_FAST_ZERO else 0
    payload = NBD_CMD_FLAG_PAYLOAD_LEN if extended else 0
    status_payload = NBD_CMD_FLAG_PAYLOAD_LEN if transmission_flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD else 0
    return (
        fua | df,  # READ
        fua | payload,  # WRITE
        fua,  # DISC
        fua,  # FLUSH
        fua,  # TRIM
        fua,  # CACHE
        fua | NBD_CMD_FLAG_NO_HOLE | fast,  # WRITE_ZEROES
        fua | NBD_CMD_FLAG_REQ_ONE | status_payload,  # BLOCK_STATUS
    )


@dataclass(frozen=True)
class Session(Generic[Handle]):
    """What the handshake agreed on.  ``structured`` is also true with extended headers, which imply it.

    ``contexts``: ``(id, name)`` of the selected metadata contexts, unique in both.
    """

    handle: Handle
    export: ExportInfo
    transmission_flags: int
    structured: bool = False
    extended: bool = False
    contexts: tuple[tuple[int, str], ...] = ()
    no_zeroes: bool = False
    tls: bool = False
    allowed_flags: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_flags", _allowed_flags(self.transmission_flags, self.extended))


AnySession = Session[Any]
