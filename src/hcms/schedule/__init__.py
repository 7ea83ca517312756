"""Schedules, plans and their prices. Pure Python: nothing here imports torch."""
