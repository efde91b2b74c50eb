"""nbdsnap: an NBD server whose block devices have snapshots."""

__version__ = "0.1.0"
