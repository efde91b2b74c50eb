"""The table's numbers: ``17``, ``0xff``, ``SIZE-512``, ``4*64K``, from left to right; and how two are compared."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Final

from tests.conformance import names
from tests.conformance.connection import Failure
from tests.conformance.table import TableError

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

UNSAID = ("MINIMUM", "PREFERRED", "MAXIMUM")
"""Variables that the server gives a value, or not."""

COMPARE: Final[dict[str, Callable[[int, int], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "has": lambda a, b: a & b == b,
    "lacks": lambda a, b: not a & b,
    "multiple-of": lambda a, b: a % b == 0,
}


class Numbers:
    """``values``: the variables, which steps set."""

    def __init__(self, size: int) -> None:
        self.values = {"SIZE": size, "ID": 0}

    def number(self, text: str) -> int:
        total = 0
        for sign, product in re.findall(r"([+-]?)([^+-]+)", text):
            value = math.prod(self._one(token) for token in product.split("*"))
            total += -value if sign == "-" else value
        return total

    def _one(self, token: str) -> int:
        if token in self.values:
            return self.values[token]
        for table in (names.TRANSMISSION_FLAGS, names.HANDSHAKE_FLAGS):
            if token in table:
                return table[token]
        if token in UNSAID:
            raise Failure(f"the server has not said its {token.lower()} block size")
        try:
            return int(token[:-1], 0) * UNITS[token[-1]] if token[-1] in UNITS else int(token, 0)
        except ValueError:
            raise TableError(f"{token!r} is no number") from None
