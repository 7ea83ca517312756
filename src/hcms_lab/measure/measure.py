"""Measure points on ranks: cases interleaved in shuffled rounds, every output checked, records appended."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.calibrate import calibrate
from hcms.kernels import kernel
from hcms.links import links
from hcms.schedule.profile import Profile, load
from hcms.transport import transport
from hcms.transport.layout import LayerShape
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.records import Record, RecordFile
from hcms_lab.measure.cases import Case, Point
from hcms_lab.measure.contestant import AttentionAlone, contestant
from hcms_lab.measure.inputs import SETS, Reference, World, reference
from hcms_lab.measure.job import SUSTAINED, Job
from hcms_lab.measure.launch import Rank, together
from hcms_lab.measure.link import settle
from hcms_lab.measure.memory import peak_bytes
from hcms_lab.measure.recording import Timed, recorded, refused
from hcms_lab.measure.sensors import Sensors
from hcms_lab.measure.timing import Sample, block, calls_a_block, single, timed_call
from hcms_lab.measure.wire import Wire, wire

ULYSSES = Case("ulysses", None)


def measure(rank: Rank, job: Job, tick: Callable[[str], None]) -> None:
    """Measure all points of a job on this rank; the first rank appends the records of each point when it is done.

    `tick` is called on the first rank after every round, with the point's title.
    """
    file = RecordFile(Path(job.folder) / "records.jsonl")
    gbps_of_ratio = dict(job.gbps_of_ratio)
    for point in job.points:
        try:
            gbps = settle(rank, job, point, gbps_of_ratio)
        except UsageError as error:  # the same on every rank: the ratio is below what this machine can reach
            if not job.sweeps:
                raise
            rows = [refused(job, point, case, str(error)) for case in point.cases]
        else:
            rows = measure_point(rank, job, point, gbps, tick)
        if rank.first:
            file.append(rows)


def measure_point(rank: Rank, job: Job, point: Point, gbps: float | None, tick: Callable[[str], None]) -> list[Record]:
    """Interleave the point's cases in shuffled rounds; every rank returns the same records."""
    world = World(point, job.seed, rank.rank, rank.device, links()[job.link].one_for_all)
    inputs = [_named(world.shard(i)) for i in range(SETS)]
    carries = wire(job.link, point)
    references = [reference(world, i) for i in range(SETS)]
    with torch.inference_mode():
        profile = point_profile(rank, job, point, ring=any(case.method == "ring" for case in point.cases))
        if profile is not None and rank.first and job.profile is None:
            name = f"{point.ranks}x{point.seq_len}-{point.kernel}-{point.dtype}"
            ratio = "" if point.link_ratio is None else f"-rho{point.link_ratio:g}"
            profile.save(Path(job.folder) / "profiles" / f"{name}{ratio}.yaml")
        bench = _Bench(rank, job, world, carries, inputs, references)
        timed = [Timed(case) for case in point.cases]
        for t in timed:
            bench.warm_up(t, profile)
        running = [t for t in timed if t.entrant is not None]
        for iteration in range(job.iterations):
            order = running.copy()
            random.Random(job.seed * 100_003 + iteration).shuffle(order)
            for t in order:
                bench.round(t, iteration % SETS)
            if rank.first:
                tick(point.title)
    return recorded(rank, job, point, gbps, timed, references, profile)


def _named(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_BLNH": x for name, x in inputs.items()}


class _Bench:
    """The rounds of one point on this rank."""

    def __init__(
        self,
        rank: Rank,
        job: Job,
        world: World,
        wire: Wire,
        inputs: list[dict[str, Tensor]],
        references: list[Reference],
    ) -> None:
        self.rank, self.job, self.world, self.wire = rank, job, world, wire
        self.inputs, self.references = inputs, references
        self.on_gpu = rank.device.type == "cuda"
        self.sensors = Sensors(rank.device)
        ulysses = contestant(ULYSSES, world.point.kernel, None, None)  # by collectives, whatever is measured
        self.expected: list[Tensor] = []
        for x in inputs:
            self.wire.lay(partial(ulysses.eager, **x))
            self.wire.rewind()
            self.expected.append(ulysses(**x))
        self.alone: list[dict[str, Tensor]] = []  # what the ceiling attends to, on GPUs
        self._calls: dict[int, int] = {}

    def _inputs(self, t: Timed, which: int) -> dict[str, Tensor]:
        if not isinstance(t.entrant, AttentionAlone):
            return self.inputs[which]
        if not self.alone:
            self.alone = [
                dict(zip(self.inputs[0], self.world.own_heads(i), strict=True)) for i in range(len(self.inputs))
            ]
        return self.alone[which]

    def warm_up(self, t: Timed, profile: Profile | None) -> None:
        """Construct and warm up a contestant; if it fails on any rank, all ranks leave it out."""
        job, point = self.job, self.world.point
        failure: BaseException | None = None
        try:
            if t.case.method == "ceiling" and self.on_gpu:
                t.entrant = AttentionAlone(kernel(point.kernel))
            else:
                t.entrant = contestant(t.case, point.kernel, None, profile, graph=job.graph, transport=job.transport)
            # A graph is captured at the second call on the same tensors.
            for i in range(max(job.warmup, 2 * SETS if self.on_gpu else 0)):
                x = self._inputs(t, i % SETS)
                self.wire.lay(partial(t.entrant.eager, **x))
                self.wire.rewind()
                t.entrant(**x)
            x = self._inputs(t, 0)
            eager = partial(t.entrant.eager, **x)
            self.wire.lay(eager)
            self.wire.rewind()
            t.peak_bytes = t.entrant.buffer_bytes + peak_bytes(eager, self.rank.device)
            if self.on_gpu and job.load == SUSTAINED:
                self.wire.rewind()
                t.calls = calls_a_block(self.rank, partial(t.entrant, **x), job.block_ms)
        except Exception as error:
            # A peer fails as it likes, and is a row that says so; of ours, only what a call may raise is.
            if t.case.peer_kind is None and not isinstance(error, ValueError | RuntimeError | ImportError):
                raise
            traceback.print_exc()
            failure = error
        said = [line for line in together(self.rank, failure) if line is not None]
        if said:
            t.status = "out-of-memory" if said[0].startswith(torch.OutOfMemoryError.__name__) else "failed"
            t.error, t.entrant = said[0], None

    def round(self, t: Timed, which: int) -> None:
        """One round of a contestant, whose output is checked."""
        entrant = t.entrant
        assert entrant is not None
        x = self._inputs(t, which)
        if not self.on_gpu:
            entrant.poison()
            out, wall_ms = timed_call(self.rank, lambda: entrant(**x))
            self._keep_timeline(t)
            at_ceiling = t.case.method == "ceiling" and entrant.timeline is not None
            t.samples.append(Sample(t.attention_ms[-1] if at_ceiling else wall_ms))
            self._check(t, out, which, 0)
            return
        self.wire.lay(partial(entrant.eager, **x))
        call = partial(entrant, **x)
        if self.job.load == SUSTAINED:
            t.samples.append(block(self.rank, call, t.calls, self.sensors, self.wire.rewind))
        else:
            t.samples.append(single(self.rank, call, self.job.rest_ms, self.sensors, self.wire.rewind))
        # Right after the block, on a card as warm as it was: what is serial of it tells attention from communication.
        self.wire.rewind()
        entrant.eager(**x)
        self._keep_timeline(t)
        # The same call once more, whose output and traffic are looked at: buffers are spoilt before it.
        entrant.poison()
        self.wire.spoil()
        self.wire.rewind()
        out = call()
        self._check(t, out, which, self.wire.wrong_bytes())

    def _keep_timeline(self, t: Timed) -> None:
        assert t.entrant is not None
        timeline = t.entrant.timeline
        if timeline is not None:
            t.attention_ms.append(timeline.attention_ms)
            t.communication_ms.append(timeline.communication_ms)
            t.timelines.append(timeline)

    def _check(self, t: Timed, out: Tensor, which: int, wrong_bytes: int) -> None:
        if isinstance(t.entrant, AttentionAlone):
            if not self.world.ghost:  # its output is another rank's too; the contestants that move it are checked
                return
            P = self.world.point.ranks
            out = out.unflatten(1, (P, -1)).movedim(1, 2).flatten(2, 3)
        t.max_abs_err = max(t.max_abs_err, self.references[which].error(out))
        t.bitwise_equal &= torch.equal(out, self.expected[which])
        t.wrong_bytes += wrong_bytes


def point_profile(rank: Rank, job: Job, point: Point, *, ring: bool = True) -> Profile | None:
    """The profile that this point's predictions and automatic cuts stand on, if any do; of a ring, too, or not."""
    group = dist.group.WORLD
    assert group is not None
    if not job.predict and not any(case.cut == "auto" for case in point.cases):
        return None
    attention = kernel(point.kernel)
    if job.profile is not None:
        return load(
            job.profile,
            hardware=job.hardware,
            device=rank.device.type,
            world_size=point.ranks,
            backend=dist.get_backend(group),
            kernel=point.kernel,
            dtype=point.dtype,
            head_dim=point.head_dim,
        )
    shape = LayerShape(point.batch, point.seq_len // point.ranks, point.heads, point.head_dim)
    return calibrate(
        group,
        shape,
        getattr(torch, point.dtype),
        rank.device,
        attention,
        hardware=job.hardware,
        transport=transport(job.transport),
        ring=ring,
    )
