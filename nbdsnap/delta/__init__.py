"""The delta stream: its encoder and decoder, without I/O (docs/delta-format.md)."""
