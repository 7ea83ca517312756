"""SMs of their own for communication: a card divided into two green contexts, for exchanges that are kernels.

A persistent attention kernel takes every SM that it may use, and an exchange that NCCL runs waits for its end. Where
attention may not use all, the exchange runs beside it: attention loses its share of the SMs, and no kernel changes.
"""

# cuda-bindings come without stubs.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from hcms.schedule.schedule import COMM, COMM_OUT, COMPUTE_LANES

_MPS_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
NEEDS = "a plan with +sms needs cuda-bindings: pip install 'hcms[copy-engine]'"


@cache
def own_sms(device: torch.device, comm_sms: int, place: tuple[int, int] = (0, 1)) -> dict[str, torch.cuda.Stream]:
    """The lanes' streams on a divided card, made once a process: attention's in one context, communication's in the
    other.

    A kernel launched on one of these streams runs on its context's SMs alone. What is launched on other streams, the
    caller's included, may use every SM.

    Args:
        comm_sms: SMs that communication keeps; the driver rounds up to what the card divides by (8 on Hopper).
        place: `(i, n)`: this process is the i-th of n that share the card, and divides the i-th part of it.

    Raises:
        RuntimeError: cuda-bindings is not installed, or the card cannot be divided so.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        raise RuntimeError(NEEDS) from None
    torch.cuda.synchronize(device)  # its primary context exists from here on
    card = _checked(driver.cuDeviceGet(device.index or 0), comm_sms)
    sms = _checked(driver.cuDeviceGetDevResource(card, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM), comm_sms)
    i, n = place
    groups, count, rest = _checked(
        driver.cuDevSmResourceSplitByCount(1 if n == 1 else sms.sm.smCount // comm_sms, sms, 0, comm_sms), comm_sms
    )
    mine = list(groups[:count]) if n == 1 else list(groups[i * (count // n) : (i + 1) * (count // n)])
    communication, attention = mine[:1], [rest] if n == 1 else mine[1:]
    if not communication or not attention or not attention[0].sm.smCount:
        raise RuntimeError(f"+sms{comm_sms}: of {sms.sm.smCount} SMs none would be left for attention; give fewer")
    streams = _streams(driver, card, communication, device, {COMM: -1, COMM_OUT: -1}, comm_sms)
    return streams | _streams(driver, card, attention, device, dict.fromkeys(COMPUTE_LANES, 0), comm_sms)


def divides(device: torch.device, comm_sms: int, place: tuple[int, int] = (0, 1)) -> bool:
    """Whether `own_sms` can be had here."""
    try:
        own_sms(device, comm_sms, place)
    except (RuntimeError, AttributeError):  # cuda-bindings may be too old to know green contexts
        return False
    return True


def _streams(
    driver: Any, card: Any, resources: Sequence[Any], device: torch.device, priorities: dict[str, int], comm_sms: int
) -> dict[str, torch.cuda.Stream]:
    """Streams of a new green context that has `resources`, one a lane. Neither is ever destroyed."""
    description = _checked(driver.cuDevResourceGenerateDesc(list(resources), len(resources)), comm_sms)
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = _checked(driver.cuGreenCtxCreate(description, card, flags), comm_sms)
    _contexts.append(context)
    apart = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    return {
        lane: torch.cuda.ExternalStream(
            int(_checked(driver.cuGreenCtxStreamCreate(context, apart, priority), comm_sms)), device=device
        )
        for lane, priority in priorities.items()
    }


_contexts: list[Any] = []


def _checked(answer: tuple[Any, ...], comm_sms: int) -> Any:
    """What a driver call returned, without its status."""
    if int(answer[0]) != 0:
        hint = f"; give {_MPS_SHARE}=100" if _MPS_SHARE in os.environ else ""
        raise RuntimeError(f"+sms{comm_sms}: this card cannot be divided so ({answer[0].name}){hint}")
    return answer[1] if len(answer) == 2 else answer[1:]
