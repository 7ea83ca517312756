"""Launch ranks, time them, verify every timed output, record."""
