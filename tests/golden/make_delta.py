"""Makes the golden delta stream of the present format: ``python -m tests.golden.make_delta tests/golden/delta-v1.bin``.

Run it when there is a new format version, with a new name, and never again for an old one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.deltas import contents, encode

SEED = 7

if __name__ == "__main__":
    old, new = contents(SEED)
    Path(sys.argv[1]).write_bytes(b"".join(encode(new, old)))
