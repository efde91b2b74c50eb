"""What a power cut, or a killed process, may do to a pool: explored, not imagined."""
