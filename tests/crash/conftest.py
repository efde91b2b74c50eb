"""The crash tests verify pools in their own process, with the engine set up as in the traced one; others are to find it
as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdsnap.engine import preserver, reclaim, stamps


@pytest.fixture(autouse=True)
def engine_as_before() -> Iterator[None]:
    patched = [(preserver, "SLICE_CHUNKS"), (reclaim, "SLICE_CHUNKS"), (stamps, "stamp_of")]
    before = [(module, name, getattr(module, name)) for module, name in patched]
    yield
    for module, name, value in before:
        setattr(module, name, value)
