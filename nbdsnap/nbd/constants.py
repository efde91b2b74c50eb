"""NBD's numbers and byte layouts, by the names of the protocol document (proto.md, "Values").

Plain integers, because the data path compares them millions of times a second; ``OPTION_NAMES`` and its like turn
them back into names for logs.  Each byte layout of the protocol stands here once, as a :class:`struct.Struct`.
All integers on the wire are big-endian.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

# Magic numbers
NBD_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
NBD_OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
NBD_REP_MAGIC: Final = 0x3E889045565A9
NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
NBD_EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
NBD_EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# Handshake flags, and the client's answer
NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

# Transmission flags
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_RESIZE: Final = 1 << 9
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11
NBD_FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12

# Options
NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

# Option reply types
NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = (1 << 31) + 1
NBD_REP_ERR_POLICY: Final = (1 << 31) + 2
NBD_REP_ERR_INVALID: Final = (1 << 31) + 3
NBD_REP_ERR_PLATFORM: Final = (1 << 31) + 4
NBD_REP_ERR_TLS_REQD: Final = (1 << 31) + 5
NBD_REP_ERR_UNKNOWN: Final = (1 << 31) + 6
NBD_REP_ERR_SHUTDOWN: Final = (1 << 31) + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = (1 << 31) + 8
NBD_REP_ERR_TOO_BIG: Final = (1 << 31) + 9
NBD_REP_ERR_EXT_HEADER_REQD: Final = (1 << 31) + 10

# Information types (NBD_OPT_INFO, NBD_OPT_GO)
NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

# Commands
NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

# Command flags
NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4
NBD_CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

# Chunks of structured and extended replies
NBD_REPLY_FLAG_DONE: Final = 1 << 0
NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
NBD_REPLY_TYPE_ERROR: Final = (1 << 15) + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = (1 << 15) + 2

# The context "base:allocation"
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1

# Error values
NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

# Limits
NBD_MAX_STRING: Final = 4096
"""Bytes of any string on the wire (proto.md, "String")."""

MAX_PAYLOAD: Final = 64 << 20
"""Bytes of one request's or one chunk's data: what libnbd and nbdkit allow; above the 49.9 MiB of nbd's own tests."""

MAX_STATUS_EXTENTS: Final = 1 << 20
"""Descriptors in one block status chunk: the protocol's own recommendation."""

MINIMUM_BLOCK: Final = 1
PREFERRED_BLOCK: Final = 4096

EXPORT_NAME_PADDING: Final = bytes(124)

# Layouts of the handshake
HELLO: Final = Struct(">QQH")  # NBD_MAGIC, NBD_OPTION_MAGIC, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # magic, option, length of data
OPTION_REPLY: Final = Struct(">QIII")  # magic, option, reply type, length of data
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags; then the padding
INFO_EXPORT: Final = Struct(">HQH")  # type, size, transmission flags
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # type, minimum, preferred, maximum payload

# Layouts of transmission: requests
REQUEST: Final = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length

# Layouts of transmission: replies.  CHUNK's fields: magic, flags, type, cookie, [request's offset,] length of payload
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = Struct(">IHHQI")
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")
OFFSET_DATA_CHUNK: Final = Struct(">IHHQIQ")  # CHUNK, offset; then the data
EXTENDED_OFFSET_DATA_CHUNK: Final = Struct(">IHHQQQQ")
OFFSET_HOLE: Final = Struct(">QI")  # offset, length of the hole
OFFSET_DATA_OVERHEAD: Final = 8  # bytes of the payload length of OFFSET_DATA that are no data
ERROR: Final = Struct(">IH")  # error, length of message; then the message, then ERROR_OFFSET
ERROR_OFFSET: Final = Struct(">Q")
BLOCK_STATUS: Final = Struct(">I")  # context id; then descriptors of two u32: length, flags
BLOCK_STATUS_EXT: Final = Struct(">II")  # context id, number of descriptors of two u64: length, flags


def _names(prefix: str, *exclude: str) -> dict[int, str]:
    return {
        value: name
        for name, value in globals().items()
        if name.startswith(prefix) and isinstance(value, int) and not name.startswith(exclude)
    }


OPTION_NAMES: Final = _names("NBD_OPT_")
REPLY_NAMES: Final = _names("NBD_REP_", "NBD_REP_MAGIC", "NBD_REP_FLAG_")
COMMAND_NAMES: Final = _names("NBD_CMD_", "NBD_CMD_FLAG_")
ERROR_NAMES: Final = _names("NBD_E", "NBD_EXTENDED_")
