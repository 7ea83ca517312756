"""What one GPU can tell: the cost of attention by heads and tokens, of copies, of the machinery, of interference.

Every function yields `Record`s as it measures. Times are CUDA events around single calls, inputs rotate so that no
call finds its own in cache, and results are checked against float64 on sampled rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.kernels import KERNELS, Kernel, attend_full, kernel
from hcms.methods import build_schedule
from hcms.schedule.fit import fit
from hcms.schedule.profile import Profile
from hcms.transport.layout import HeadExchange, LayerShape
from hcms_lab.ground.records import Record

HEADS = (1, 2, 3, 5, 10, 20)
TOKENS = (32_400, 46_800, 57_600)
HEAD_DIM = 128
DTYPE = torch.bfloat16
_SAMPLED_ROWS = 64


def event_times_ms(calls: list[Callable[[], Any]], iterations: int, warmup: int = 3) -> list[float]:
    """Device time of `iterations` calls, going round the given ones."""
    for call in itertools.islice(itertools.cycle(calls), warmup):
        call()
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(iterations)] for _ in range(2))
    for begin, end, call in zip(begins, ends, itertools.cycle(calls), strict=False):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]


def record(hardware: str, method: str, times_ms: list[float], **fields: Any) -> Record:
    """A record of one measured thing, with its raw times."""
    q25, q50, q75, q95 = (float(x) for x in np.percentile(times_ms, [25, 50, 75, 95]))
    return Record(
        exp="gpu-one",
        hardware=hardware,
        workload="wan720p",
        world_size=1,
        method=method,
        latency_ms=q50,
        latency_iqr_ms=q75 - q25,
        latency_p95_ms=q95,
        times_ms=times_ms,
        n=len(times_ms),
        head_dim=HEAD_DIM,
        batch=1,
        **fields,
    )


def attention_costs(hardware: str, iterations: int = 9) -> Iterator[Record]:
    """Attention forward by kernel, heads and tokens, on the packed views that an exchange hands over, and checked."""
    for name, candidate in KERNELS.items():
        if name == "math":  # a whole score matrix of 57,600 tokens does not fit
            continue
        if refusal := candidate.refusal(DTYPE, HEAD_DIM, "cuda"):
            yield Record(exp="gpu-one", status="refused", hardware=hardware, workload="wan720p", world_size=1,
                         method="attend", kernel=name, error=refusal)  # fmt: skip
            continue
        for tokens in TOKENS:
            yield from _costs_by_heads(hardware, candidate, tokens, iterations)


def _costs_by_heads(hardware: str, candidate: Kernel, tokens: int, iterations: int) -> Iterator[Record]:
    """One kernel at one length: head counts take turns, so that clocks that fall under load fall for all alike."""
    device = torch.device("cuda")
    arrived = [torch.randn(tokens, 1, 3, m, HEAD_DIM, device=device).to(DTYPE) for m in HEADS]
    views = [[x[:, :, t].transpose(0, 1) for t in range(3)] for x in arrived]
    try:
        errors = [_check(candidate.attend, qkv) for qkv in views]
        times_ms: list[list[float]] = [[] for _ in HEADS]
        for _ in range(iterations):
            for i, qkv in enumerate(views):
                times_ms[i] += event_times_ms([partial(candidate.attend, *qkv)], 1, warmup=0)
    except RuntimeError as failure:
        yield Record(exp="gpu-one", status="failed", hardware=hardware, workload="wan720p", world_size=1,
                     method="attend", kernel=candidate.name, seq_len=tokens, ok=False,
                     error=str(failure).splitlines()[0])  # fmt: skip
        return
    rates = [4 * tokens**2 * m * HEAD_DIM / median(t) / 1e9 for m, t in zip(HEADS, times_ms, strict=True)]
    for m, t, (error, bound), tflops in zip(HEADS, times_ms, errors, rates, strict=True):
        yield record(
            hardware, "attend", t, kernel=candidate.name, dtype="bfloat16", seq_len=tokens, heads=m, tflops=tflops,
            share_of_best=tflops / rates[-1], max_abs_err=error, ok=error <= bound,
        )  # fmt: skip


def _check(attend: Callable[..., Tensor], qkv: list[Tensor]) -> tuple[float, float]:
    """Largest error of sampled rows of one head against float64, and what it may be (four roundings of the largest)."""
    rows = torch.linspace(0, qkv[0].shape[1] - 1, _SAMPLED_ROWS, device=qkv[0].device).long()
    wanted = attend_full(qkv[0][:, rows, :1], qkv[1][:, :, :1], qkv[2][:, :, :1])
    got = attend(*qkv)[:, rows, :1].double()
    return (got - wanted).abs().max().item(), 4 * torch.finfo(DTYPE).eps * wanted.abs().max().item()


def copy_costs(hardware: str, iterations: int = 15) -> Iterator[Record]:
    """Pack and unpack of whole layers and chunks, in bytes read and written a second, beside a plain copy's ceiling."""
    device = torch.device("cuda")
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times_ms = event_times_ms([partial(target.copy_, source)], iterations)
    ceiling_gbps = 2 * source.nbytes / median(times_ms) / 1e6
    yield record(hardware, "copy", times_ms, gbps=ceiling_gbps, share_of_best=1.0)
    del source, target
    for ranks, tokens, cut in itertools.product((2, 4, 8), (32_400, 57_600), ("whole", "even")):
        heads_a_rank = 40 // ranks
        plan = str(heads_a_rank) if cut == "whole" else f"even:{heads_a_rank if heads_a_rank < 10 else 5}"
        schedule = build_schedule("hcms", plan, heads_a_rank, ranks)
        shape = LayerShape(1, tokens // ranks, 40, HEAD_DIM)
        exchange = HeadExchange(schedule, ranks, shape, DTYPE, device, heads_first=False)
        inputs = {t: torch.randn(1, tokens // ranks, 40, HEAD_DIM, device=device).to(DTYPE) for t in "qkv"}
        out_BLNH = torch.empty_like(inputs["q"])
        fields: dict[str, Any] = {"dtype": "bfloat16", "seq_len": tokens, "heads": 40, "cut": plan}

        exchange.bind(inputs, out_BLNH)

        def pack(exchange: HeadExchange, chunks: int) -> None:
            for chunk in range(chunks):
                exchange.pack(chunk, "qkv")

        def unpack(exchange: HeadExchange, chunks: int) -> None:
            for chunk in range(chunks):
                exchange.receive_back(chunk)

        packs = partial(pack, exchange, len(schedule.cut))
        unpacks = partial(unpack, exchange, len(schedule.cut))
        for method, call, tensors in (("pack", packs, 3), ("unpack", unpacks, 1)):
            times_ms = event_times_ms([call], iterations)
            gbps = 2 * tensors * out_BLNH.nbytes / median(times_ms) / 1e6
            made = record(hardware, method, times_ms, gbps=gbps, share_of_best=gbps / ceiling_gbps, **fields)
            made.schedule = f"{ranks} slots"
            yield made


def interference(hardware: str, tokens: int = 32_400, heads: int = 10) -> Iterator[Record]:
    """Attention alone and with copies on a high-priority stream beside it, and the copies alone and so.

    Copies between two buffers of this GPU take SMs and memory bandwidth, as NCCL's do; they are the worst case of what
    an exchange does to the attention beside it, not an exchange.
    """
    device = torch.device("cuda")
    arrived = torch.randn(tokens, 1, 3, heads, HEAD_DIM, device=device).to(DTYPE)
    qkv = [arrived[:, :, t].transpose(0, 1) for t in range(3)]
    attend = kernel("sdpa").attend
    source = torch.empty(1 << 28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    side = torch.cuda.Stream(priority=-1)

    def copies(count: int) -> None:
        for _ in range(count):
            target.copy_(source)

    one_copy_ms = median(event_times_ms([lambda: copies(1)], 9))
    count = max(1, int(event_times_ms([lambda: attend(*qkv)], 1)[0] * 2 / one_copy_ms))
    alone_ms, beside_ms, copies_beside_ms = [], [], []
    for _ in range(15):
        alone_ms += event_times_ms([lambda: attend(*qkv)], 1, warmup=0)
        side.wait_stream(torch.cuda.current_stream())
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        with torch.cuda.stream(side):
            marks[0].record()
            copies(count)
            marks[1].record()
        marks[2].record()
        attend(*qkv)
        marks[3].record()
        torch.cuda.synchronize()
        beside_ms.append(marks[2].elapsed_time(marks[3]))
        copies_beside_ms.append(marks[0].elapsed_time(marks[1]) / count)
    fields: dict[str, Any] = {"kernel": "sdpa", "dtype": "bfloat16", "seq_len": tokens, "heads": heads}
    yield record(hardware, "attend-alone", alone_ms, **fields)
    yield record(hardware, "attend-beside-copies", beside_ms, **fields)
    yield record(hardware, "copy-alone", [one_copy_ms], gbps=2 * source.nbytes / one_copy_ms / 1e6)
    yield record(
        hardware, "copy-beside-attend", copies_beside_ms, gbps=2 * source.nbytes / median(copies_beside_ms) / 1e6
    )


def machinery(hardware: str, traces: Path) -> Iterator[Record]:
    """Host time of a warm call by chunks on one rank over NCCL, at a size where the host is the limit; graphs too.

    A profiled warm call counts what the host asked of the driver, and leaves its trace in the folder `traces`.
    """
    device = torch.device("cuda")
    x = [torch.randn(1, 256, 40, HEAD_DIM, device=device).to(DTYPE) for _ in range(3)]
    with torch.inference_mode():
        for method, plan in (("ulysses", ""), ("ulysses-packed", ""), *(("hcms", f"even:{k}") for k in (1, 2, 5, 10))):
            attention = SequenceParallelAttention(None, method, plan or "40")
            for _ in range(5):
                attention(*x)
            torch.cuda.synchronize()
            host_ms = []
            for _ in range(50):
                began_s = perf_counter()
                attention(*x)
                host_ms.append((perf_counter() - began_s) * 1e3)
                torch.cuda.synchronize()
            assert attention.schedule is not None
            chunks = len(attention.schedule.cut)
            fields: dict[str, Any] = {"cut": plan or "whole", "seq_len": 256, "heads": 40, "dtype": "bfloat16"}
            made = record(hardware, f"host:{method}", host_ms, **fields)
            made.schedule = f"{len(attention.schedule.ops)} operations, {chunks} chunks"
            asked = _driver_calls(attention, x, traces / f"warm-{method}-{plan.replace(':', '') or 'whole'}.json")
            made.ok = asked["synchronisations"] == asked["allocations"] == 0
            made.actual_path = ", ".join(f"{count} {what}" for what, count in asked.items())
            yield made
            yield from _graph(hardware, method, attention, x, fields)


_ASKED = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync"),
    "synchronisations": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy "),
    "allocations": ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cuMemCreate", "cuMemAlloc"),
}


def _driver_calls(attention: SequenceParallelAttention, x: list[Tensor], trace: Path) -> dict[str, int]:
    """What one warm call asks of the CUDA driver, by the profiler, which itself ends in one device synchronisation."""
    torch.cuda.synchronize()
    activities = list(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function("warm call"):
        attention(*x)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    events = profiler.events() or []
    call = next(e for e in events if e.name == "warm call")
    inside = [e.name for e in events if call.time_range.start <= e.time_range.start <= call.time_range.end]
    return {what: sum(f"{name} ".startswith(calls) for name in inside) for what, calls in _ASKED.items()}


def _graph(
    hardware: str, method: str, attention: SequenceParallelAttention, x: list[Tensor], fields: dict[str, Any]
) -> Iterator[Record]:
    """Whether a call captures into a CUDA graph, whether a replay gives the same, and what a replay costs."""
    expected = attention(*x)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = attention(*x)
    except RuntimeError as failure:
        yield Record(exp="gpu-one", status="failed", hardware=hardware, workload="wan720p", world_size=1,
                     method=f"graph:{method}", ok=False, error=str(failure).splitlines()[0], **fields)  # fmt: skip
        return
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    same = torch.equal(out, expected)
    replays_ms = event_times_ms([graph.replay], 30)
    eager_ms = event_times_ms([lambda: attention(*x)], 30)
    yield record(hardware, f"graph:{method}", replays_ms, bitwise_equal=same, ok=same, **fields)
    yield record(hardware, f"eager:{method}", eager_ms, **fields)


def full_size_layers(hardware: str, rounds: int = 7) -> Iterator[Record]:
    """One rank's call of each method over NCCL to itself, at full size: the lanes at work, bitwise against Ulysses.

    A rank that exchanges with itself only copies: this shows that lanes overlap and are right, not what a link gives.
    """
    device = torch.device("cuda")
    cases = [("ulysses", "10"), ("ulysses-packed", "10"), ("hcms-serial", "even:5"), ("hcms", "even:5"),
             ("hcms", "tapered:4"), ("hcms-3lane", "even:5"), ("ceiling", "10")]  # fmt: skip
    with torch.inference_mode():
        x = [torch.randn(1, 32_400, 10, HEAD_DIM, device=device).to(DTYPE) for _ in range(3)]
        attentions = [
            SequenceParallelAttention(None, method, plan, record_timeline=True) for method, plan in cases
        ]  # fmt: skip
        expected = attentions[0](*x)
        times: list[list[float]] = [[] for _ in cases]
        same = [True] * len(cases)
        for _ in range(rounds):
            for i, attention in enumerate(attentions):
                attention(*x) if not times[i] else None
                attention.poison()
                torch.cuda.synchronize()
                began_s = perf_counter()
                out = attention(*x)
                torch.cuda.synchronize()
                wall_ms = (perf_counter() - began_s) * 1e3
                assert attention.timeline is not None
                times[i].append(attention.timeline.attention_ms if cases[i][0] == "ceiling" else wall_ms)
                same[i] &= torch.equal(out, expected)
        for (method, plan), attention, times_ms, equal in zip(cases, attentions, times, same, strict=True):
            made = record(
                hardware, method, times_ms, kernel="sdpa", dtype="bfloat16", seq_len=32_400, heads=10, cut=plan,
                bitwise_equal=equal, ok=equal, link="none: one rank exchanges with itself",
            )  # fmt: skip
            assert attention.timeline is not None and attention.schedule is not None
            made.attention_ms, made.comm_ms = attention.timeline.attention_ms, attention.timeline.communication_ms
            made.schedule = attention.schedule.name
            yield made
    dist.barrier()


def profile(records: list[dict[str, Any]], hardware: str, kernel_name: str = "sdpa") -> Profile:
    """The profile of one GPU from its records: attention, copies, launches and interference, and no link."""
    samples: list[dict[str, Any]] = []
    for r in records:
        if r["status"] != "done" or not r["ok"]:
            continue
        if r["method"] == "attend" and r["kernel"] == kernel_name:
            samples += [
                {"op": "attend", "seq_len": r["seq_len"], "heads": r["heads"], "ms": ms} for ms in r["times_ms"]
            ]
        elif r["method"] in ("pack", "unpack"):
            nbytes = r["gbps"] * r["latency_ms"] * 1e6 / 2  # gbps counts bytes read and written
            samples += [{"op": r["method"], "bytes": nbytes, "ms": ms} for ms in r["times_ms"]]
        elif r["method"] == "host:hcms" and r["schedule"]:
            operations = int(r["schedule"].split()[0])
            samples += [{"op": "host", "ms": ms / operations} for ms in r["times_ms"]]
    latency_ms = {r["method"]: r["latency_ms"] for r in records}
    if "attend-alone" in latency_ms and "attend-beside-copies" in latency_ms:
        samples.append(
            {
                "op": "interference",
                "attention_slowdown": latency_ms["attend-beside-copies"] / latency_ms["attend-alone"],
                "communication_slowdown": latency_ms["copy-beside-attend"] / latency_ms["copy-alone"],
            }
        )
    return fit(
        samples,
        hardware=hardware,
        device="cuda",
        world_size=1,
        backend="nccl",
        link="none: one rank",
        kernel=kernel_name,
        dtype="bfloat16",
        head_dim=HEAD_DIM,
        sms=torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else None,
    )
