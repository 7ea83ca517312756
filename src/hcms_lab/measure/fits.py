"""Whether a layer can fit in this machine's memory and time at all, told before a rank starts."""

from __future__ import annotations

from math import inf

import psutil

from hcms.schedule.cost import Workload
from hcms_lab.ground.errors import UsageError

GIB = 2**30
PROCESS_BYTES = 0.1 * GIB  # of a rank on CPU that has done nothing but import torch; part of it is shared
INPUT_SETS = 2
MOST_SECONDS_A_CALL = 60


def available_bytes(device: str, ranks: int) -> float:
    """Memory a rank: a GPU's own, or this host's free memory shared by the ranks that it would carry."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return inf  # a torch without CUDA cannot tell; the ranks will say so
        return float(torch.cuda.get_device_properties(0).total_memory)
    return psutil.virtual_memory().available / ranks


def least_bytes(layer: Workload) -> float:
    """What a rank holds at the least: its inputs, what they should come to, and the whole K and V that check it."""
    share = layer.tensor_bytes(layer.heads_a_rank)
    return INPUT_SETS * (3 + 1) * share + 2 * share * layer.ranks


def check_memory(layer: Workload, setting: str, device: str, ranks_a_card: int = 1) -> None:
    """Refuse a layer that needs more memory than there is, whatever is measured of it.

    Args:
        setting: what made it so large, as one would type it.
        ranks_a_card: how many ranks share a GPU's memory.
    """
    needs = least_bytes(layer) + (PROCESS_BYTES if device == "cpu" else 0)
    there = available_bytes(device, layer.ranks) / ranks_a_card
    if needs > there:
        raise UsageError(
            f"{setting}: {layer.seq_len} tokens need {needs / GIB:.3g} GiB a rank at the least on {layer.ranks} ranks, "
            f"but {there / GIB:.3g} GiB are there; give fewer"
        )


def check_pace(layer: Workload, gbps: float | None, latency_us: float) -> None:
    """Refuse an emulated link on which a single call of Ulysses would outlast all patience."""
    if layer.ranks == 1:
        return
    seconds = 4 * latency_us * 1e-6
    if gbps is not None:
        seconds += layer.off_rank(4 * layer.tensor_bytes(layer.heads_a_rank)) / (gbps * 1e9)
    if seconds > MOST_SECONDS_A_CALL:
        raise UsageError(
            f"link.gbps={gbps}: with link.latency_us={latency_us:g}, one call of Ulysses would take {seconds:.3g} s at "
            f"{layer.seq_len} tokens on {layer.ranks} ranks; {MOST_SECONDS_A_CALL} s is the limit"
        )
