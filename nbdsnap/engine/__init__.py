"""Volumes, snapshots and copy-on-write: synchronous, and knowing neither asyncio nor NBD."""
