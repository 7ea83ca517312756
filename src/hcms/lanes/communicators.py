"""Communicators of the lanes' own: NCCL's, one a group and lane, made once a process whoever asks.

A lane needs one where its works shall not queue behind those of another lane, or of whatever else uses the group.
`torch.distributed.new_group` would do, but names groups by a counter that ranks need not share, and with a bound device
splits the default group's communicator, which is collective over ranks that are no members. Here nothing is made that
others must take part in: the name is the group's own and the lane's, and members meet at the first exchange.
"""

# torch ships no stubs for what backends are made of.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from collections import Counter
from weakref import WeakKeyDictionary, finalize

import torch
import torch.distributed as dist

from hcms.lanes.graph import release_all

_CUDA = torch.device("cuda")
_ends: WeakKeyDictionary[dist.ProcessGroup, finalize] = WeakKeyDictionary()
_times: Counter[str] = Counter()
_made: WeakKeyDictionary[dist.ProcessGroup, dict[str, dist.ProcessGroup]] = WeakKeyDictionary()


def communicator(group: dist.ProcessGroup, lane: str, blocks: int | None = None) -> dist.ProcessGroup:
    """The NCCL communicator of a lane over the ranks of `group`, whose kernels go before attention's waiting blocks.

    It times out as `group` does, and ends with `group`, with the process, or by `close`. Local: no rank waits for
    another here.

    Args:
        blocks: how many its kernels have at most. On few SMs, two lanes' kernels must fit beside each other: where one
            rank runs the one and its peer the other, both wait for what cannot start.
    """
    if group not in _made:
        _made[group] = lanes = {}
        _ends[group] = finalize(group, _end, lanes)
    lanes, name = _made[group], f"{lane}/{blocks}" if blocks else lane
    if name not in lanes:
        lanes[name] = _make(group, name, blocks)
    return lanes[name]


def close(group: dist.ProcessGroup) -> None:
    """End what was made for a group, and every captured graph of the process; objects over it are not called again."""
    _made.pop(group, None)
    if group in _ends:
        _ends.pop(group)()


def _end(lanes: dict[str, dist.ProcessGroup]) -> None:
    release_all()
    for made in lanes.values():
        made.shutdown()
        _ranks_of_groups().pop(made, None)


def _ranks_of_groups() -> dict[dist.ProcessGroup, dict[int, int]]:
    """Where torch looks up which ranks a group's are, before it sends from one to another."""
    return dist.distributed_c10d._world.pg_group_ranks


def _make(group: dist.ProcessGroup, lane: str, blocks: int | None) -> dist.ProcessGroup:
    name = f"hcms/{group.group_name}/{lane}"
    _times[name] += 1  # the same on all members: one that is made again must not meet at the old one's place
    name = f"{name}/{_times[name]}"
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    ranks = dist.get_process_group_ranks(group)
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if blocks:
        options.config.max_ctas = blocks
    options._timeout = group._get_backend(_CUDA).options._timeout
    options.global_ranks_in_group = ranks
    options.group_name = name
    backend = dist.ProcessGroupNCCL(store, group.rank(), group.size(), options)
    backend._set_sequence_number_for_group()
    made = dist.ProcessGroup(store, group.rank(), group.size())
    made._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    made._register_backend(_CUDA, dist.ProcessGroup.BackendType.NCCL, backend)
    made._set_group_name(name)
    _ranks_of_groups()[made] = {rank: i for i, rank in enumerate(ranks)}
    return made
