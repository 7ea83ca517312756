"""`SequenceParallelAttention`: the one front door to every method."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.agree import agree, given_by_first, together
from hcms.calibrate import calibrate
from hcms.ending import let_go_at_exit
from hcms.hardware import hardware
from hcms.kernels import Kernel, kernel
from hcms.lanes import Lanes
from hcms.lanes.communicators import communicator
from hcms.lanes.cpu import CpuLanes
from hcms.lanes.cuda import CudaLanes
from hcms.lanes.graph import CallGraphs
from hcms.lanes.own_sms import divides
from hcms.links import emulated, ghost, shared
from hcms.methods import METHODS, build_schedule, method
from hcms.objects import everyones, firsts
from hcms.programs.ring import RingProgram
from hcms.programs.ulysses import UlyssesProgram
from hcms.race import MARGIN, race
from hcms.schedule.advice import KEPT_SMS
from hcms.schedule.choose import choose
from hcms.schedule.cost import Workload, WorkloadCosts, predict
from hcms.schedule.plan import Chosen, Plan, Setting
from hcms.schedule.profile import Profile, load
from hcms.schedule.schedule import COMM, COMM_OUT, COMPUTE, First, Schedule
from hcms.schedule.timeline import Timeline
from hcms.shortlist import BASELINES, shortlist
from hcms.thin_ends import refuse_uneven_bits
from hcms.transport import COLLECTIVE, transport
from hcms.transport.layout import LayerShape

SHAPES_KEPT = 8


@dataclass
class _Layer:
    """What one shape of inputs needs, made at its first call."""

    schedule: Schedule
    program: UlyssesProgram | RingProgram
    graphs: CallGraphs | None = None

    def replay(self, call: Callable[..., object], *tensors: Tensor) -> bool:
        """Make `call(self, q, k, v, out)` by a graph; False where it is to be made eagerly."""
        if self.graphs is None:
            self.graphs = CallGraphs()
        return self.graphs(partial(call, self), *tensors)


class SequenceParallelAttention:
    """Attention over a sequence that is spread over the ranks of a process group.

    `attention(q_BLNH, k_BLNH, v_BLNH) -> out_BLNH`: every rank holds L = S/P consecutive tokens, in rank order, of all
    N heads, in and out. No mask, softmax scale 1/sqrt(H), forward only. Collective: all ranks call it with the same
    shapes, in the same order.

    Streams (CUDA): inputs may be pending on the caller's current stream, and so is the output on return. Communication
    of overlapping methods runs on side streams, which all objects of a device share; the current stream waits for them
    before the call returns to it, without host synchronisation. Buffers belong to this object, one set a shape for the
    `SHAPES_KEPT` shapes that were used last, and are reused by every call; the output is a new tensor of the caller's.
    A shape beyond those waits for the device once, since it frees buffers. One object must not be used from two threads
    or streams at once.

    Args:
        group: the ranks (Gloo, NCCL or "emulated"); the default group if None. On NCCL the lanes of overlapping methods
            have communicators of their own, which all objects over a group share.
        method: a name of the table `hcms.methods.METHODS`.
        plan: how a rank's M = N/P heads are cut: `"1-3-1"`, `"even:2"`, `"1x2-3-1x2"` (ends in parts), `"1-3-1+sms8"`
            (8 SMs of a GPU kept for communication), or `"auto"`, which chooses cut and order, or Ulysses where they
            do not pay, by the profile (rank 0's word). Ignored by methods that cut nothing.
        kernel: a name from `hcms.kernels.KERNELS`.
        prefetch, first: see `two_lane`.
        profile: for `plan="auto"`, a profile or its path; measured on the first call of a shape if None. What it
            remembers of a trial is taken at its word: after a first call, `attention.profile.save(path)` keeps both.
        transport: a name of `hcms.transport.transports()`: `collective`, or `copy-engine` between GPUs of one host,
            for which any backend will do.
        graph: `auto` captures a repeated shape's whole call on CUDA once and replays it (`hcms.lanes.graph`); `off`
            issues every call anew. A call inside a caller's own capture, or one whose timeline is recorded, is issued.
        record_timeline: keep the last call's measured Timeline in `timeline` (on CUDA this synchronises).

    Raises:
        ValueError: unknown method, kernel or transport; at the first call of a shape: heads that the ranks do not
            divide, a plan that does not fit, shapes or dtypes that differ, inputs that need gradients, a kernel that
            cannot take them.
        RuntimeError: overlap was asked for and this group's backend cannot give it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        method: str = "hcms",
        plan: str | int = "auto",
        kernel: str = "sdpa",
        *,
        prefetch: int | None = None,
        first: First = "exchange",
        profile: str | Path | Profile | None = None,
        transport: str = COLLECTIVE,
        graph: Literal["auto", "off"] = "off",
        record_timeline: bool = False,
    ) -> None:
        self.group = group if group is not None else _default_group()
        let_go_at_exit(self)
        self.ranks = dist.get_world_size(self.group)
        self._method = _method(method)
        self.method, self.plan, self.transport = method, plan, transport
        self.kernel: Kernel = _kernel(kernel)
        if self._method.needs_lse and not self.kernel.gives_lse:
            raise ValueError(f"{method} needs a kernel that gives its log-sum-exp; {kernel!r} does not")
        self._transport = _transport(transport)
        if self._method.program == "ring" and not self._transport.collectives:
            raise ValueError(f"{method} goes by sends and receives, not by transport={transport!r}")
        self._order: dict[str, Any] = {"prefetch": prefetch, "first": first}
        self._profile = profile
        if graph not in ("auto", "off"):
            raise ValueError(f"graph={graph!r}: choose auto or off")
        self.graph = graph
        self.record_timeline = record_timeline
        self.timeline: Timeline | None = None
        self.schedule: Schedule | None = None  # of the last call
        self.plan_reason: str | None = None
        self.predicted_ms: float | None = None
        self.profile: Profile | None = None  # what the shape that was planned last stands on, its trial included
        self.replayed = False  # whether the last call was a graph's replay
        self._lanes: Lanes | None = None
        self._layers: OrderedDict[Any, _Layer] = OrderedDict()  # the shape that was used last comes last

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        layer = self.layer(q_BLNH, k_BLNH, v_BLNH)
        self.schedule, self.replayed, self.timeline = layer.schedule, False, None
        out_BLNH = torch.empty(q_BLNH.shape, dtype=q_BLNH.dtype, device=q_BLNH.device)
        if self.graph == "auto" and q_BLNH.is_cuda and not (self.record_timeline or self._captured_by_caller()):
            self.replayed = layer.replay(self._call, q_BLNH, k_BLNH, v_BLNH, out_BLNH)
        if not self.replayed:
            self.timeline = self._call(layer, q_BLNH, k_BLNH, v_BLNH, out_BLNH, record=self.record_timeline)
        return out_BLNH

    def _call(
        self, layer: _Layer, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, out_BLNH: Tensor, *, record: bool = False
    ) -> Timeline | None:
        assert self._lanes is not None
        layer.program.bind(q_BLNH, k_BLNH, v_BLNH, out_BLNH)
        try:
            return self._lanes.run(layer.schedule, layer.program, record=record)
        finally:
            layer.program.release()

    @staticmethod
    def _captured_by_caller() -> bool:
        return torch.cuda.is_current_stream_capturing()

    @property
    def path(self) -> str:
        """How the last call ran: `graph`, or `eager` with the reason where a graph was asked for."""
        if self.replayed:
            return "graph"
        refusals = {layer.graphs.refusal for layer in self._layers.values() if layer.graphs and layer.graphs.refusal}
        return f"eager ({min(refusals)})" if refusals else "eager"

    def layer(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> _Layer:
        """The schedule and buffers for inputs of this shape, made at the first call (collective) and kept a while."""
        self._check(q_BLNH, k_BLNH, v_BLNH)
        key = (q_BLNH.shape, q_BLNH.dtype, q_BLNH.device)
        if key not in self._layers:
            mine = (*q_BLNH.shape, str(q_BLNH.dtype), self.method, str(self.plan), self._transport.name)
            agree(self.group, mine, "shape, dtype, method or transport")
            if refusal := self.kernel.refusal(q_BLNH.dtype, q_BLNH.shape[3], q_BLNH.device.type):
                raise ValueError(refusal)
            # Buffers made in inference mode could not be written outside it by a later call.
            with torch.inference_mode(False):
                self._layers[key] = self._make_layer(q_BLNH)
            while len(self._layers) > SHAPES_KEPT:  # the same on all ranks, which are given shapes in the same order
                if q_BLNH.is_cuda:  # lanes and graphs may be at work in what is freed
                    torch.cuda.synchronize(q_BLNH.device)
                _, dropped = self._layers.popitem(last=False)
                dropped.graphs = None  # they hold the layer, and what nothing else holds should go now
        self._layers.move_to_end(key)
        return self._layers[key]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all owned exchange buffers on this rank."""
        return sum(layer.program.nbytes for layer in self._layers.values())

    def poison(self) -> None:
        """Fill all owned buffers with NaN: a benchmark's guard against results left over from an earlier call."""
        for layer in self._layers.values():
            layer.program.poison()

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
            shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
            raise ValueError(f"q, k and v must share one shape [B, L, N, H], got {shapes}")
        if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
            given = ", ".join(f"{t.dtype} on {t.device}" for t in (q, k, v))
            raise ValueError(f"q, k and v must share dtype and device, got {given}")
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError("this attention is forward only: call it under torch.no_grad() or torch.inference_mode()")
        if self._method.program != "ring" and q.shape[2] % self.ranks:
            raise ValueError(f"{q.shape[2]} heads cannot be divided among {self.ranks} ranks")

    def _make_layer(self, q_BLNH: Tensor) -> _Layer:
        B, L, N, H = q_BLNH.shape
        shape = LayerShape(B, L, N, H)
        dtype, device = q_BLNH.dtype, q_BLNH.device
        if self._lanes is None:
            self._lanes = self._make_lanes(device)
        if self.plan == "auto" and self._method.cuts:
            return self._choose(shape, dtype, device)
        schedule = build_schedule(
            self.method, self.plan, max(1, N // self.ranks), self.ranks, on_host=device.type == "cpu", **self._order
        )
        return self._build(schedule, shape, dtype, device)

    def _build(self, schedule: Schedule, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> _Layer:
        if schedule.comm_sms:
            assert self._lanes is not None
            together(self.group, partial(self._lanes.prepare, schedule))
        if schedule.name == "ring":
            rank = dist.get_rank(self.group)
            return _Layer(schedule, RingProgram(self.ranks, rank, shape, dtype, device, self.kernel))
        refuse_uneven_bits(self.kernel, schedule, self.ranks, shape, dtype, device)
        exchange = self._transport.make(
            self.group,
            schedule,
            shape,
            dtype,
            device,
            heads_first=device.type == "cpu",
            # Gloo has no all-to-all that leaves a share out; there the copy takes no core from anyone.
            own_apart=schedule.copies_apart and device.type != "cpu",
        )
        return _Layer(schedule, UlyssesProgram(exchange, self.kernel))

    def _choose(self, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> _Layer:
        """What suits this shape, on the given profile or on one measured now; rank 0's word. Collective.

        On a CPU the simulator's choice, on GPUs the fastest of its shortlist by trial.
        """
        slug = hardware(device.type).slug
        profile = self._profile
        if profile is None:
            profile = calibrate(self.group, shape, dtype, device, self.kernel, hardware=slug, transport=self._transport)
        elif not isinstance(profile, Profile):
            path = profile
            profile = given_by_first(
                self.group,
                lambda: load(
                    path,
                    hardware=slug,
                    device=device.type,
                    world_size=self.ranks,
                    backend=dist.get_backend(self.group),
                    kernel=self.kernel.name,
                    dtype=str(dtype).removeprefix("torch."),
                    head_dim=shape.head_dim,
                ),
            )
        workload = Workload(
            shape.local_tokens * self.ranks, shape.heads, self.ranks, shape.head_dim, shape.batch, profile.dtype
        )
        asked = Chosen(
            self.method, workload.seq_len, shape.heads, shape.batch, self._transport.name, self.graph == "auto"
        )
        profile = self.profile = firsts(profile, self.group)
        for chosen in profile.chosen:
            if chosen.question == asked:
                self.plan_reason = f"{chosen.method} {chosen.cut}: fastest in a trial that the profile remembers"
                schedule = build_schedule(
                    chosen.method, chosen.cut, workload.heads_a_rank, self.ranks, on_host=device.type == "cpu"
                )
                return self._build(schedule, shape, dtype, device)
        costs = WorkloadCosts(profile, workload, graph=self.graph == "auto", sustained=True)
        if device.type == "cuda" and self.ranks > 1 and workload.heads_a_rank > 1:
            layer, winner = self._raced(costs, shape, dtype, device)
            chosen = replace(asked, method=winner.method, cut=str(winner.shape))
            self.profile = replace(profile, chosen=(*profile.chosen, chosen))
            return layer
        if self.method != "hcms":
            return self._predicted(costs, shape, dtype, device)
        choice = firsts(choose(costs, shape.heads, self.ranks), self.group)
        self.plan_reason, self.predicted_ms = choice.reason, choice.predicted_ms
        return self._build(choice.schedule(), shape, dtype, device)

    def _predicted(self, costs: WorkloadCosts, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> _Layer:
        """The plan of this method that is predicted to be fastest, or Ulysses where none gains more than a margin."""
        setting = Setting(self.ranks, on_host=device.type == "cpu")
        plans = shortlist(costs, shape.heads // self.ranks, setting, [self.method])
        schedules = {plan: METHODS[plan.method].build(plan, setting) for plan in plans}
        times_ms: dict[Plan, float] = firsts(
            {plan: predict(schedule, costs).duration_ms for plan, schedule in schedules.items()}, self.group
        )
        base = min((plan for plan in plans if plan.method in BASELINES), key=lambda plan: times_ms[plan])
        for plan in sorted(times_ms, key=lambda plan: times_ms[plan]):
            gain = times_ms[base] / times_ms[plan] - 1
            if plan.method not in BASELINES and gain <= MARGIN:
                continue
            with suppress(ValueError):  # thin ends that this kernel would round otherwise; the same on all ranks
                layer = self._build(schedules[plan], shape, dtype, device)
                self.predicted_ms = times_ms[plan]
                self.plan_reason = f"{plan.method} {plan.shape}: predicted {times_ms[plan]:.4g} ms, {base.method} " + (
                    f"{times_ms[base]:.4g} ms" if plan != base else f"is not beaten by more than {MARGIN:.0%}"
                )
                return layer
        raise AssertionError("Ulysses fits every shape")

    def _raced(
        self, costs: WorkloadCosts, shape: LayerShape, dtype: torch.dtype, device: torch.device
    ) -> tuple[_Layer, Plan]:
        """The fastest of the shortlist, timed on these ranks as it will be called; the others' buffers are freed."""
        setting = Setting(self.ranks)
        if costs.holds_sms and costs.wire_needs_sms:  # exchanges would wait for attention's end
            place = shared.place_on_card()
            able = everyones([divides(device, sms, place) for sms in KEPT_SMS], self.group)
            kept = tuple(sms for sms, each in zip(KEPT_SMS, zip(*able, strict=True), strict=True) if all(each))
            setting = Setting(self.ranks, comm_sms=kept)
        plans = firsts(shortlist(costs, shape.heads // self.ranks, setting, [self.method]), self.group)
        size = (shape.batch, shape.local_tokens, shape.heads, shape.head_dim)
        q, k, v = (torch.randn(size, device=device, dtype=torch.float32).to(dtype) for _ in "qkv")
        out_BLNH = torch.empty_like(q)
        layers: dict[Plan, _Layer] = {}
        for plan in plans:
            with suppress(ValueError):  # thin ends that this kernel would round otherwise; the same on all ranks
                layers[plan] = self._build(METHODS[plan.method].build(plan, setting), shape, dtype, device)

        def prepare(plan: Plan) -> None:
            ghost.lay(self.group, shape.heads, lambda: self._call(layers[plan], q, k, v, out_BLNH))

        def call(plan: Plan) -> None:
            ghost.rewind(self.group)
            if self.graph == "off" or not layers[plan].replay(self._call, q, k, v, out_BLNH):
                self._call(layers[plan], q, k, v, out_BLNH)

        for plan in layers:
            prepare(plan)
            for _ in range(_WARM_CALLS):
                call(plan)
        raced = race(self.group, [(plan, partial(call, plan)) for plan in layers], prepare)
        self.plan_reason, self.predicted_ms = raced.reason, None
        for layer in layers.values():
            layer.graphs = None  # those of the trial's own tensors; they hold the layers that lost, too
        return layers[raced.winner], raced.winner

    def _make_lanes(self, device: torch.device) -> Lanes:
        backend = _backend(self.group, device.type)
        if device.type not in self._transport.devices:
            raise ValueError(f"transport={self._transport.name!r} carries no tensors on {device}")
        if backend == ghost.NAME and not self._transport.collectives:
            raise ValueError(f"transport={self._transport.name!r}: a ghost's peers have no memory to write to")
        if device.type == "cuda":
            lanes, place = self._method.lanes, shared.place_on_card()
            if self.plan == "auto" and self._method.cuts:
                lanes = (COMM, COMM_OUT)  # whatever is chosen, for this shape or the next
            # Without communicators each lane's works go on the lane's own stream.
            if backend == ghost.NAME or not self._transport.collectives:
                return CudaLanes(device, self.group, dict.fromkeys(lanes, self.group), place)
            if backend != "nccl":
                raise RuntimeError(f"tensors on {device} need an NCCL group, this one is {backend!r}")
            # The compute lane has its own, too: graphs that replay exchanges must go before the communicator does.
            own = {lane: communicator(self.group, lane) for lane in (COMPUTE, *lanes)}
            few = partial(communicator, self.group)
            return CudaLanes(device, own.pop(COMPUTE), own, place, few)
        if self._method.overlaps and backend not in ("gloo", emulated.NAME):
            raise RuntimeError(f"{self.method} overlaps on gloo, {emulated.NAME} and nccl groups, not on {backend!r}")
        if backend == emulated.NAME:
            return CpuLanes(self.group, {}, lambda: emulated.PORT.completed_s)
        return CpuLanes(self.group, {})


_WARM_CALLS = 2  # of a plan before it is timed: an eager one, its capture with a first replay
_kernel, _method, _transport = kernel, method, transport  # the class's arguments of these names hide the functions


def _default_group() -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ValueError("no process group: start this under torchrun and call torch.distributed.init_process_group()")
    group = dist.group.WORLD
    assert group is not None
    return group


def _backend(group: dist.ProcessGroup, device: str) -> str:
    """The backend that serves tensors of that device: a group may have one for each, as a default group has."""
    served = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return served.get(device, "none")
