"""A :class:`~nbdsnap.engine.device.Device` for tests that would rather wait: submit, then the result."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from nbdsnap.engine.device import Device, Op, OpKind

OPERATION_TIMEOUT_S = 30.0


class Completion:
    """A ``done`` to give to an operation, and to wait for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._failure: BaseException | None = None

    def __call__(self, failure: BaseException | None) -> None:
        assert not self._event.is_set(), "done was called twice"
        self._failure = failure
        self._event.set()

    def wait(self) -> None:
        """Raises what the operation failed with."""
        assert self._event.wait(OPERATION_TIMEOUT_S), f"not done after {OPERATION_TIMEOUT_S:g} s"
        if self._failure is not None:
            raise self._failure


def submit(
    device: Device, kind: OpKind, offset: int = 0, length: int = 0, data: bytes | None = None, **flags: bool
) -> Completion:
    done = Completion()
    device.submit(Op(kind, offset, length if data is None else len(data), done, data, **flags))
    return done


def write(device: Device, offset: int, data: bytes, *, now: bool = True, fua: bool = False) -> None:
    """Write the way a server does: at once where that is possible (and ``now``), else through the queue."""
    if now and not fua and device.write_now(offset, memoryview(data)):
        return
    submit(device, OpKind.WRITE, offset, data=data, fua=fua).wait()


def flush(device: Device) -> None:
    if not device.flush_now():
        submit(device, OpKind.FLUSH).wait()


def read(device: Device, offset: int, length: int, *, now: bool = True) -> bytes:
    buffer = bytearray(length)
    if not (now and device.read_now(memoryview(buffer), offset)):
        device.read(memoryview(buffer), offset)
    return bytes(buffer)


def wait_all(operations: Sequence[Completion]) -> None:
    for operation in operations:
        operation.wait()
