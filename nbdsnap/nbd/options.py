"""The data of options, taken apart (proto.md, "Option types").

Every function takes an option's whole data and raises :class:`InvalidOptionError`, with a text for a person, where it
does not have the exact form that the document gives: the option is then answered NBD_REP_ERR_INVALID, and the
stream stays in step, because the data has been consumed already.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from nbdsnap.nbd.constants import NBD_MAX_STRING


class InvalidOptionError(ValueError):
    """An option's data is malformed."""


@dataclass(frozen=True)
class InfoRequest:
    """NBD_OPT_INFO and NBD_OPT_GO: an export, and the information types that the client asks for."""

    name: str
    infos: frozenset[int]


@dataclass(frozen=True)
class ContextRequest:
    """NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: an export, and queries in the client's order."""

    name: str
    queries: tuple[str, ...]


class _Reader:
    """Takes fields off the front of an option's data, and refuses to read past its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def integer(self, code: str, what: str) -> int:
        value: int = struct.unpack(">" + code, self.take(struct.calcsize(">" + code), what))[0]
        return value

    def take(self, length: int, what: str) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise InvalidOptionError(f"{what} passes the end of the option's data")
        field = self._data[self._position : end]
        self._position = end
        return field

    def string(self, what: str) -> str:
        return decode_string(self.take(self.integer("I", f"the length of {what}"), what), what)

    def finish(self) -> None:
        left = len(self._data) - self._position
        if left:
            raise InvalidOptionError(f"{left} bytes too many in the option's data")


def decode_string(data: bytes, what: str) -> str:
    """A string of the wire: UTF-8 without NUL, at most NBD_MAX_STRING bytes."""
    if len(data) > NBD_MAX_STRING:
        raise InvalidOptionError(f"{what} is {len(data)} bytes long, more than the protocol's {NBD_MAX_STRING}")
    if b"\0" in data:
        raise InvalidOptionError(f"{what} contains a NUL byte")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidOptionError(f"{what} is not UTF-8") from None


def parse_nothing(data: bytes) -> None:
    """The options that carry no data."""
    _Reader(data).finish()


def parse_info(data: bytes) -> InfoRequest:
    """u32 length of name, name, u16 count, count x u16."""
    reader = _Reader(data)
    name = reader.string("the export name")
    count = reader.integer("H", "the number of information requests")
    infos = struct.unpack(f">{count}H", reader.take(2 * count, "the list of information requests"))
    reader.finish()
    return InfoRequest(name, frozenset(infos))


def parse_contexts(data: bytes) -> ContextRequest:
    """u32 length of name, name, u32 count, count x (u32 length of query, query)."""
    reader = _Reader(data)
    name = reader.string("the export name")
    count = reader.integer("I", "the number of queries")
    queries = tuple(reader.string("a query") for _ in range(count))
    reader.finish()
    return ContextRequest(name, queries)


def match_contexts(available: tuple[str, ...], queries: tuple[str, ...], *, wildcards: bool) -> list[str]:
    """The contexts of ``available`` (unique) that ``queries`` name, each once, in the order of ``available``.

    A query is a context's whole name.  With ``wildcards`` (listing), one that ends in a colon stands for every context
    below it (``base:``, ``qemu:dirty-bitmap:``); selecting, it matches nothing.  What matches nothing is ignored,
    an unknown namespace included (proto.md, "Metadata querying").
    """
    exact = set(queries)
    prefixes = tuple(q for q in exact if len(q) > 1 and q.endswith(":")) if wildcards else ()
    return [name for name in available if name in exact or (prefixes and name.startswith(prefixes))]
