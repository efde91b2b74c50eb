"""Every error that nbdsnap reports, in one tree.

A class carries what each outer surface needs, so that no layer translates errors by hand:

* ``message``: one line, formatted with the constructor's arguments: what failed;
* ``hint``: one line: what to do about it ("" where nothing helps);
* ``exit_code``: of the command line (INTERFACE: exit codes);
* ``nbd_errno``: what an NBD client is told (the log keeps the true one);
* ``http_status``: of the management API.

Operating errors raise one of these.  Broken invariants of our own ``assert``; a peer's or a
disk's bytes are never asserted on.  ``kind`` (the class's name) travels over the management API, so
that a client re-raises the same class: see :func:`from_wire`.

::

    NbdsnapError                1  the operation failed
    ├── UsageError              2  the command line is wrong
    ├── ConfigError             3  the configuration is wrong
    ├── NotFoundError           4  the named thing does not exist
    ├── ConflictError           5  it is in use, held or already exists
    │   ├── AlreadyExistsError
    │   ├── InUseError
    │   ├── PoolLockedError
    │   └── WrongBaseError
    ├── NoSpaceError            6  no space
    ├── CorruptionError         7  corruption found
    ├── FormatError             1  a pool or stream of a future version, or of something else
    ├── DeltaCutError           1  a delta stream ended before its end
    ├── OriginError             1  an origin file or device can't be used
    │   └── OriginChangedError
    ├── DeviceError             1  a disk returned an error
    ├── ProtocolError           1  a peer broke the NBD protocol; its connection is dropped
    └── ServerError             1  the running server can't be reached, or refused
"""

from __future__ import annotations

import errno
from typing import ClassVar


class NbdsnapError(Exception):
    """The operation failed."""

    message: ClassVar[str] = "{}"
    hint: ClassVar[str] = ""
    exit_code: ClassVar[int] = 1
    nbd_errno: ClassVar[int] = errno.EIO
    http_status: ClassVar[int] = 500

    def __init__(self, *args: object, hint: str | None = None) -> None:
        super().__init__(*args)
        self._hint = self.hint if hint is None else hint

    def __str__(self) -> str:
        return self.message.format(*self.args)

    @property
    def advice(self) -> str:
        """What to do, in one line; "" where there is nothing to say."""
        return self._hint

    def to_wire(self) -> dict[str, str]:
        """The error as the management API's JSON carries it."""
        return {"kind": type(self).__name__, "message": str(self), "hint": self._hint}


class UsageError(NbdsnapError):
    """The command line is wrong."""

    exit_code = 2
    nbd_errno = errno.EINVAL
    http_status = 400


class ConfigError(NbdsnapError):
    """The configuration is wrong."""

    exit_code = 3
    nbd_errno = errno.EINVAL
    http_status = 400


class NotFoundError(NbdsnapError):
    """The named thing does not exist."""

    exit_code = 4
    nbd_errno = errno.EINVAL
    http_status = 404


class ConflictError(NbdsnapError):
    """It is in use, held or already exists."""

    exit_code = 5
    nbd_errno = errno.EPERM
    http_status = 409


class AlreadyExistsError(ConflictError):
    """Something of that name exists already."""


class InUseError(ConflictError):
    """It is open, held, or something depends on it."""


class PoolLockedError(ConflictError):
    """Another process owns the pool."""


class WrongBaseError(ConflictError):
    """A delta was made from something else than what it is to be applied to."""


class NoSpaceError(NbdsnapError):
    """There is no space left."""

    exit_code = 6
    nbd_errno = errno.ENOSPC
    http_status = 507


class CorruptionError(NbdsnapError):
    """Stored data does not read back as it was written."""

    exit_code = 7

    def __init__(self, *args: object, hint: str | None = None, offset: int | None = None) -> None:
        """``offset``: where in the volume the damage begins, if that is known."""
        super().__init__(*args, hint=hint)
        self.offset = offset


class FormatError(NbdsnapError):
    """A pool or stream of a future version, or of something else altogether."""


class DeltaCutError(NbdsnapError):
    """A delta stream ended before its end."""

    http_status = 400


class OriginError(NbdsnapError):
    """An origin file or device can't be used."""

    http_status = 400


class OriginChangedError(OriginError):
    """An origin file was changed while no server ran, which may have changed its snapshots."""

    http_status = 409


class DeviceError(NbdsnapError):
    """A disk returned an error."""


class ProtocolError(NbdsnapError):
    """A peer broke the NBD protocol in a way that has no answer: its connection is dropped."""

    nbd_errno = errno.EINVAL
    http_status = 400


class ServerError(NbdsnapError):
    """The running server can't be reached, or refused."""


def _tree(cls: type[NbdsnapError]) -> dict[str, type[NbdsnapError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found.update(_tree(sub))
    return found


def from_wire(kind: str, message: str, hint: str) -> NbdsnapError:
    """The error that :meth:`NbdsnapError.to_wire` described; an unknown kind becomes the base class."""
    return _tree(NbdsnapError).get(kind, NbdsnapError)(message, hint=hint)


def from_exception(error: BaseException) -> NbdsnapError | None:
    """The error to report for an exception of an operation: an OSError has a class here; None where we have a bug."""
    if isinstance(error, NbdsnapError):
        return error
    if not isinstance(error, OSError):
        return None
    text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return NoSpaceError(text) if error.errno in (errno.ENOSPC, errno.EDQUOT) else DeviceError(text)


def nbd_errno(error: BaseException) -> int:
    """The NBD error (proto.md, "Error values") for any exception that an operation raised."""
    if isinstance(error, NbdsnapError):
        return error.nbd_errno
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return errno.ENOSPC
        if error.errno in (errno.EPERM, errno.EROFS, errno.EACCES):
            return errno.EPERM
        if error.errno in (errno.EINVAL, errno.ENOMEM, errno.ENOTSUP, errno.EOVERFLOW):
            return error.errno
    return errno.EIO
