"""The protocol's numbers, written down a second time from its document: a slip of the pen shows as a difference."""

from __future__ import annotations

import pytest

from nbdsnap.nbd import constants

NUMBERED = {
    "NBD_OPT_": {
        "EXPORT_NAME": 1, "ABORT": 2, "LIST": 3, "STARTTLS": 5, "INFO": 6, "GO": 7, "STRUCTURED_REPLY": 8,
        "LIST_META_CONTEXT": 9, "SET_META_CONTEXT": 10, "EXTENDED_HEADERS": 11,
    },
    "NBD_REP_": {"ACK": 1, "SERVER": 2, "INFO": 3, "META_CONTEXT": 4},
    "NBD_REP_ERR_": {
        name: 2**31 + number
        for number, name in enumerate(
            ("UNSUP", "POLICY", "INVALID", "PLATFORM", "TLS_REQD", "UNKNOWN", "SHUTDOWN", "BLOCK_SIZE_REQD", "TOO_BIG",
             "EXT_HEADER_REQD"), 1)
    },
    "NBD_INFO_": {"EXPORT": 0, "NAME": 1, "DESCRIPTION": 2, "BLOCK_SIZE": 3},
    "NBD_CMD_": {
        "READ": 0, "WRITE": 1, "DISC": 2, "FLUSH": 3, "TRIM": 4, "CACHE": 5, "WRITE_ZEROES": 6, "BLOCK_STATUS": 7,
    },
    "NBD_CMD_FLAG_": {"FUA": 1, "NO_HOLE": 2, "DF": 4, "REQ_ONE": 8, "FAST_ZERO": 16, "PAYLOAD_LEN": 32},
    "NBD_FLAG_": {
        "HAS_FLAGS": 0x1, "READ_ONLY": 0x2, "SEND_FLUSH": 0x4, "SEND_FUA": 0x8, "ROTATIONAL": 0x10, "SEND_TRIM": 0x20,
        "SEND_WRITE_ZEROES": 0x40, "SEND_DF": 0x80, "CAN_MULTI_CONN": 0x100, "SEND_RESIZE": 0x200,
        "SEND_CACHE": 0x400, "SEND_FAST_ZERO": 0x800, "BLOCK_STATUS_PAYLOAD": 0x1000, "FIXED_NEWSTYLE": 1,
        "NO_ZEROES": 2, "C_FIXED_NEWSTYLE": 1, "C_NO_ZEROES": 2,
    },
    "NBD_REPLY_TYPE_": {
        "NONE": 0, "OFFSET_DATA": 1, "OFFSET_HOLE": 2, "BLOCK_STATUS": 5, "BLOCK_STATUS_EXT": 6, "ERROR": 0x8001,
        "ERROR_OFFSET": 0x8002,
    },
    "NBD_STATE_": {"HOLE": 1, "ZERO": 2},
    "NBD_E": {
        "PERM": 1, "IO": 5, "NOMEM": 12, "INVAL": 22, "NOSPC": 28, "OVERFLOW": 75, "NOTSUP": 95, "SHUTDOWN": 108,
    },
}  # fmt: skip

SIZES = {
    "HELLO": 18, "CLIENT_FLAGS": 4, "OPTION": 16, "OPTION_REPLY": 20, "EXPORT_NAME_REPLY": 10, "INFO_EXPORT": 12,
    "INFO_BLOCK_SIZE": 14, "REQUEST": 28, "EXTENDED_REQUEST": 32, "SIMPLE_REPLY": 16, "CHUNK": 20,
    "EXTENDED_CHUNK": 32, "OFFSET_DATA_CHUNK": 28, "EXTENDED_OFFSET_DATA_CHUNK": 40, "OFFSET_HOLE": 12, "ERROR": 6,
    "ERROR_OFFSET": 8, "BLOCK_STATUS": 4, "BLOCK_STATUS_EXT": 8,
}  # fmt: skip


@pytest.mark.parametrize("prefix", NUMBERED)
def test_numbers(prefix: str) -> None:
    for name, value in NUMBERED[prefix].items():
        assert getattr(constants, prefix + name) == value, prefix + name


@pytest.mark.parametrize("name", SIZES)
def test_layouts_are_packed_and_of_the_documented_size(name: str) -> None:
    layout = getattr(constants, name)
    assert layout.format.startswith(">") and layout.size == SIZES[name]


def test_numbers_have_names_for_logs() -> None:
    assert constants.OPTION_NAMES[7] == "NBD_OPT_GO"
    assert {number: f"NBD_CMD_{name}" for name, number in NUMBERED["NBD_CMD_"].items()} == constants.COMMAND_NAMES
    assert constants.REPLY_NAMES[2**31 + 3] == "NBD_REP_ERR_INVALID"
    assert {number: f"NBD_E{name}" for name, number in NUMBERED["NBD_E"].items()} == constants.ERROR_NAMES
