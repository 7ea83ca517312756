"""The laboratory: runs experiments on ranks, checks and records what they give, and draws it.

Rooms, each of which imports from those before it only: `ground` (configuration, errors, records), `measure` (launch,
time, check), `report` (figures, tables, pages, W&B).
"""
