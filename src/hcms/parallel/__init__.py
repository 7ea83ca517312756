"""What runs on ranks: exchange, lanes, the methods and their one front door.

Shape legend, used in every name here: `B` batch, `S` the whole sequence, `L` = S/P a rank's share of it, `N` all heads,
`M` = N/P a rank's share of them, `m` the heads of a chunk, `H` head size, `P` ranks.
"""
