"""Deltas between pools, files and streams: sending, receiving, applying."""
