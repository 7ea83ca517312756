"""A long run: the cases of a benchmark over and over in one process group, and what a process holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic

import psutil
import torch
from torch import Tensor

from hcms.links import links
from hcms_lab.ground.soak_samples import SoakSample, append
from hcms_lab.measure.contestant import contestant
from hcms_lab.measure.inputs import SETS, World, reference
from hcms_lab.measure.job import Job
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.timing import gathered, timed_call
from hcms_lab.measure.wire import wire

SAMPLES = "samples.csv"
CALLS = 2  # of each object on each input
WARM_UP = 0.2  # of the samples: allocators and libraries are still taking what they keep
ALLOWED_MIB = 16.0  # more than this from the first third of what follows to the last is a leak


def soak(rank: Rank, job: Job, minutes: float, tick: Callable[[str], None]) -> None:
    """Repeat the job's points for so long; the first rank writes every rank's samples.

    Every cycle makes its attention objects anew, as a long sweep does, and calls each on two inputs in turn. An output
    must be that of the first cycle, bit by bit, and right.
    """
    began_s, process = monotonic(), psutil.Process()
    ghost = links()[job.link].one_for_all
    worlds = [World(point, job.seed, rank.rank, rank.device, ghost) for point in job.points]
    inputs = [[{f"{t}_BLNH": x for t, x in w.shard(i).items()} for i in range(SETS)] for w in worlds]
    references = [[reference(w, i) for i in range(SETS)] for w in worlds]
    wires = [wire(job.link, point) for point in job.points]
    first: dict[tuple[int, int, int], Tensor] = {}
    wrong = cycle = 0
    while True:
        for at, point in enumerate(job.points):
            for number, case in enumerate(point.cases):
                entrant = contestant(case, point.kernel, None, None, graph=job.graph, transport=job.transport)
                for i in [*range(SETS)] * CALLS:
                    with torch.inference_mode():
                        wires[at].lay(partial(entrant.eager, **inputs[at][i]))
                        entrant.poison()
                        wires[at].rewind()
                        out, _ = timed_call(rank, partial(entrant, **inputs[at][i]))
                    was = first.setdefault((at, number, i), out)
                    wrong += not torch.equal(out, was) or references[at][i].error(out) > references[at][i].bound
        sample = SoakSample(
            minute=(monotonic() - began_s) / 60,
            cycle=cycle,
            rank=rank.rank,
            rss_mib=process.memory_info().rss / 2**20,
            gpu_mib=torch.cuda.memory_reserved() / 2**20 if rank.device.type == "cuda" else 0.0,
            open_files=process.num_fds(),
            threads=process.num_threads(),
            wrong=wrong,
        )
        samples: list[SoakSample] = gathered(rank, sample)[: rank.processes]  # a ghost's peers answer with our own
        if rank.first:
            append(Path(job.folder) / SAMPLES, samples)
            tick(f"minute {sample.minute:.0f} of {minutes:g}")
        cycle += 1
        if samples[0].minute >= minutes:  # the first rank's clock, so that all end together
            return


def growth(samples: Sequence[SoakSample]) -> list[str]:
    """What did not stay as it was, a line each; nothing where all is flat.

    Memory: the median of the last third of the samples after the warm-up against that of the first third. Files and
    threads: the most of each third.
    """
    found = []
    for rank in sorted({s.rank for s in samples}):
        own = [s for s in samples if s.rank == rank]
        warm = own[int(WARM_UP * len(own)) :]
        third = max(1, len(warm) // 3)
        early, late = warm[:third], warm[-third:]
        for name in ("rss_mib", "gpu_mib"):
            before, after = (median(getattr(s, name) for s in part) for part in (early, late))
            if after - before > ALLOWED_MIB:
                found.append(f"rank {rank}: {name} grew from {before:.0f} to {after:.0f}")
        for name in ("open_files", "threads"):
            before, after = (max(getattr(s, name) for s in part) for part in (early, late))
            if after > before:
                found.append(f"rank {rank}: {name} grew from {before} to {after}")
        if own[-1].wrong:
            found.append(f"rank {rank}: {own[-1].wrong} outputs were wrong, or other than the first cycle's")
    return found
