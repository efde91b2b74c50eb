"""Replication: volumes that follow others, in other pools, over HTTPS (docs/replication.md)."""
