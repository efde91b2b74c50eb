"""What the server's doors are guarded by: TLS and the rules of access, replaced as a whole when they are reloaded.

Connections ask for the present state whenever they need it; those in transmission are looked at after a reload, and
end where the rules no longer give them what they have.
"""

from __future__ import annotations

from nbdsnap.config import Config
from nbdsnap.server.access import Access
from nbdsnap.server.throttle import COMPLAIN_S, Throttle
from nbdsnap.server.tls import TlsKeeper


class Security:
    """``access`` is the loop's to read.  ``tls`` is None where no listener wants it.  ``complaints``: about clients
    that are not let in, which may be many."""

    def __init__(self, access: Access | None = None, tls: TlsKeeper | None = None) -> None:
        self.access = access or Access()
        self.complaints = Throttle(COMPLAIN_S)
        self.tls = tls

    @classmethod
    def of(cls, config: Config) -> Security:
        """Reads the certificates.  ConfigError."""
        return cls(Access(config.allow), TlsKeeper(config.tls) if _wants_tls(config) else None)

    def reload(self, config: Config) -> None:
        """ConfigError, with nothing changed, where it can't be used.  Waits for a disk."""
        access = Access(config.allow)
        if _wants_tls(config):
            if self.tls is None:
                self.tls = TlsKeeper(config.tls)
            else:
                self.tls.reload(config.tls)
        self.access = access


def _wants_tls(config: Config) -> bool:
    return (
        any((address.tls or config.tls.mode) != "off" for address in config.server.listen) or config.tls.mode != "off"
    )
