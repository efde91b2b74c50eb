"""The protocol document's names for its numbers, as the table writes them."""

from __future__ import annotations

from tests.support import nbdwire

HANDSHAKE_FLAGS = {"FIXED_NEWSTYLE": 1, "NO_ZEROES": 2}

OPTIONS = {
    "EXPORT_NAME": nbdwire.EXPORT_NAME,
    "ABORT": nbdwire.ABORT,
    "LIST": nbdwire.LIST,
    "PEEK_EXPORT": 4,
    "STARTTLS": nbdwire.STARTTLS,
    "INFO": nbdwire.INFO,
    "GO": nbdwire.GO,
    "STRUCTURED_REPLY": nbdwire.STRUCTURED_REPLY,
    "LIST_META_CONTEXT": nbdwire.LIST_META_CONTEXT,
    "SET_META_CONTEXT": nbdwire.SET_META_CONTEXT,
    "EXTENDED_HEADERS": nbdwire.EXTENDED_HEADERS,
}

REPLIES = {
    "ACK": nbdwire.ACK,
    "SERVER": nbdwire.SERVER,
    "INFO": nbdwire.INFO_REPLY,
    "META_CONTEXT": nbdwire.META_CONTEXT,
    "ERR_UNSUP": nbdwire.UNSUP,
    "ERR_POLICY": nbdwire.POLICY,
    "ERR_INVALID": nbdwire.INVALID,
    "ERR_PLATFORM": nbdwire.PLATFORM,
    "ERR_TLS_REQD": nbdwire.TLS_REQD,
    "ERR_UNKNOWN": nbdwire.UNKNOWN,
    "ERR_SHUTDOWN": nbdwire.SHUTDOWN,
    "ERR_BLOCK_SIZE_REQD": nbdwire.BLOCK_SIZE_REQD,
    "ERR_TOO_BIG": nbdwire.TOO_BIG,
    "ERR_EXT_HEADER_REQD": nbdwire.EXT_HEADER_REQD,
}
REPLY_NAMES = {number: name for name, number in REPLIES.items()}

_TRANSMISSION = (
    "HAS_FLAGS", "READ_ONLY", "SEND_FLUSH", "SEND_FUA", "ROTATIONAL", "SEND_TRIM", "SEND_WRITE_ZEROES", "SEND_DF",
    "CAN_MULTI_CONN", "SEND_RESIZE", "SEND_CACHE", "SEND_FAST_ZERO", "BLOCK_STATUS_PAYLOAD",
)  # fmt: skip
_COMMANDS = ("READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS", "RESIZE")
_COMMAND_FLAGS = ("FUA", "NO_HOLE", "DF", "REQ_ONE", "FAST_ZERO", "PAYLOAD_LEN")

TRANSMISSION_FLAGS = {
    name: 1 << bit
    for bit, name in enumerate(
        [
            "HAS_FLAGS",
            "READ_ONLY",
            "SEND_FLUSH",
            "SEND_FUA",
            "ROTATIONAL",
            "SEND_TRIM",
            "SEND_WRITE_ZEROES",
            "SEND_DF",
            "CAN_MULTI_CONN",
            "SEND_RESIZE",
            "SEND_CACHE",
            "SEND_FAST_ZERO",
            "BLOCK_STATUS_PAYLOAD",
        ]
    )
}

COMMANDS = {name: number for number, name in enumerate(_COMMANDS)}

COMMAND_FLAGS = {name: 1 << bit for bit, name in enumerate(_COMMAND_FLAGS)}

ERRORS = {
    "EPERM": 1,
    "EIO": 5,
    "ENOMEM": 12,
    "EINVAL": 22,
    "ENOSPC": 28,
    "EOVERFLOW": 75,
    "ENOTSUP": 95,
    "ESHUTDOWN": 108,
}
ERROR_NAMES = {number: name for name, number in ERRORS.items()}

CHUNKS = {
    0: "NONE",
    1: "OFFSET_DATA",
    2: "OFFSET_HOLE",
    5: "BLOCK_STATUS",
    6: "BLOCK_STATUS_EXT",
    0x8001: "ERROR",
    0x8002: "ERROR_OFFSET",
}


def number(text: str, table: dict[str, int]) -> int:
    """A name of ``table``, names joined by ``|``, or a plain number."""
    value = 0
    for word in text.split("|"):
        value |= table[word] if word in table else int(word, 0)
    return value
