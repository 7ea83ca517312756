"""flashinfer's head-chunk primitives under the pipeline that they are made for: in, attention and out on three streams.

flashinfer leaves scheduling to its callers, so the order here is ours and the bands are those of its published runs:
a quarter, a half, a quarter of a rank's heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hcms_lab.measure.peers import Entry, register

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention


class _Pipeline:
    """Communicators, streams and buffers for one size. Made collectively."""

    def __init__(self, group: dist.ProcessGroup, q_BLNH: Tensor) -> None:
        import torch
        import torch.distributed as dist
        from flashinfer.comm import UlyssesCommunicator  # pyright: ignore[reportMissingImports]

        B, L, N, H = q_BLNH.shape
        P = dist.get_world_size(group)
        self.heads_a_rank = N // P
        quarter = max(1, self.heads_a_rank // 4)
        self.bands = [b for b in (quarter, self.heads_a_rank - 2 * quarter, quarter) if b > 0]
        largest = 3 * B * L * P * max(self.bands) * H
        ranks = dist.get_process_group_ranks(group)
        # One communicator each way: a return must not queue behind an exchange.
        self.into, self.out_of = (
            UlyssesCommunicator(
                dist.new_group(ranks, backend="nccl"), max_elems=max(largest, q_BLNH.numel()), dtype=q_BLNH.dtype
            )
            for _ in range(2)
        )
        self.streams = [torch.cuda.Stream(q_BLNH.device, priority=-1) for _ in range(2)]
        self.into_space, self.out_space = self.into.create_workspace(), self.out_of.create_workspace()
        self.arrived = [
            torch.empty(B, L * P, band, 3 * H, dtype=q_BLNH.dtype, device=q_BLNH.device) for band in self.bands
        ]


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """Head bands pipelined over flashinfer's chunk exchange.

    Raises:
        ValueError: the installed flashinfer has no head-chunk primitives.
    """
    import torch
    from flashinfer.comm import UlyssesCommunicator  # pyright: ignore[reportMissingImports]

    if not hasattr(UlyssesCommunicator, "scatter_qkv_head_chunk"):
        raise ValueError("this flashinfer has no head-chunk primitives (scatter_qkv_head_chunk)")
    made: dict[Any, _Pipeline] = {}

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        key = (q_BLNH.shape, q_BLNH.dtype)
        if key not in made:
            made[key] = _Pipeline(group, q_BLNH)
        pipeline = made[key]
        current = torch.cuda.current_stream(q_BLNH.device)
        into, out_of = pipeline.streams
        into.wait_stream(current)
        out_BLNH = torch.empty_like(q_BLNH, memory_format=torch.contiguous_format)
        out_of.wait_stream(current)
        results: list[Tensor] = []  # held until the current stream has waited for their last reader
        start = 0
        for band, arrived in zip(pipeline.bands, pipeline.arrived, strict=True):
            with torch.cuda.stream(into):
                pipeline.into.scatter_qkv_head_chunk(
                    q_BLNH, k_BLNH, v_BLNH, head_offset=start, head_count=band, out=arrived,
                    workspace=pipeline.into_space,
                )  # fmt: skip
                ready = into.record_event()
            current.wait_event(ready)
            q_BSmH, k_BSmH, v_BSmH = arrived.chunk(3, dim=-1)
            results.append(kernel.attend(q_BSmH, k_BSmH, v_BSmH))
            attended = current.record_event()
            with torch.cuda.stream(out_of):
                out_of.wait_event(attended)
                pipeline.out_of.gather_output_head_chunk(
                    results[-1], local_heads=pipeline.heads_a_rank, head_offset=start, out=out_BLNH,
                    workspace=pipeline.out_space,
                )  # fmt: skip
            start += band
        current.wait_stream(out_of)
        return out_BLNH

    return attend


register(Entry("flashinfer-chunks", "other", attention, "flashinfer-python", "flashinfer", gpus_only=True))
