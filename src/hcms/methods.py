"""The one table of methods: what each is called, how it is drawn, what it cuts and needs, and what builds its schedule.

Imports no torch, so that checks of settings, figures and predictions read it as the attention object does. A new method
is one `register(Method(...))` and its builder; nothing else lists methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hcms.schedule.cut import Shape, parse_shape
from hcms.schedule.plan import Plan, Setting
from hcms.schedule.schedule import COMM, COMM_OUT, Schedule, ring, serial, three_lane, two_lane
from hcms.schedule.zero import zero

Build = Callable[[Plan, Setting], Schedule]


@dataclass(frozen=True)
class Method:
    """A way to spread attention over ranks.

    Args:
        name: as configurations and records name it.
        label: as figures and tables print it.
        summary: what it does, in half a sentence.
        colour, marker, dashed: how figures draw it; colours are those of Okabe and Ito (2008).
        build: `(plan, setting) -> Schedule`.
        cuts: whether it cuts a rank's heads into chunks, so that a plan's cut means something.
        thins: whether it can split the ends of a cut into parts, attend on two lanes, and keep SMs for communication:
            its copies are the compute lane's.
        lanes: the lanes besides the compute lane that its schedules may use.
        program: what carries out its operations, `ulysses` (heads are exchanged) or `ring` (K and V go round).
        needs_lse: whether the kernel must give its log-sum-exp.
        counts: what a benchmark counts of a call, the whole `latency` or its `attention` alone.
    """

    name: str
    label: str
    summary: str
    colour: str
    marker: str
    build: Build
    cuts: bool = False
    thins: bool = False
    dashed: bool = False
    lanes: tuple[str, ...] = ()
    program: Literal["ulysses", "ring"] = "ulysses"
    needs_lse: bool = False
    counts: Literal["latency", "attention"] = "latency"

    @property
    def overlaps(self) -> bool:
        """Whether communication may run beside computation."""
        return bool(self.lanes)


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the table.

    Raises:
        ValueError: the name is taken by another method.
    """
    if METHODS.get(method.name, method) != method:
        raise ValueError(f"a method named {method.name!r} is registered already")
    METHODS[method.name] = method
    return method


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: no such method; the message lists those that there are.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def shape_for(chosen: Method, cut: str | int, heads_a_rank: int) -> Shape:
    """A cut in text for M heads a rank, as this method takes it; one chunk where it cuts nothing.

    Raises:
        ValueError: a cut that does not fit M (see `parse_shape`), or thin ends that this method does not have.
    """
    if not chosen.cuts:
        return Shape((heads_a_rank,))
    shape = parse_shape(cut, heads_a_rank)
    if not chosen.thins and (max(shape.ends) > 1 or shape.fill or shape.comm_sms):
        able = ", ".join(m.name for m in METHODS.values() if m.thins)
        what = "splits no ends, fills no tails and keeps no SMs"
        raise ValueError(f"cut {str(cut)!r}: {chosen.name} {what}; {able} does")
    return shape


def build_schedule(
    name: str, cut: str | int, heads_a_rank: int, ranks: int, *, on_host: bool = False, **order: object
) -> Schedule:
    """The schedule of a method for M heads a rank; `order` holds further fields of `Plan`.

    Raises:
        ValueError: unknown method, or a cut that does not fit M or the method (see `shape_for`).
    """
    chosen = method(name)
    shape = shape_for(chosen, cut, heads_a_rank)
    plan = Plan(name, shape.cut, ends=shape.ends, fill=shape.fill, comm_sms=shape.comm_sms, **order)  # pyright: ignore[reportArgumentType]
    return chosen.build(plan, Setting(ranks, on_host))


register(
    Method(
        "ulysses",
        "Ulysses",
        "three exchanges, attention, a return, one after the other (DeepSpeed, Wan2.2)",
        "#D55E00",
        "o",
        lambda plan, setting: serial(plan.cut, split_qkv=True),
    )
)
register(
    Method(
        "ulysses-packed",
        "Ulysses, packed QKV",
        "the same with Q, K and V in one exchange",
        "#E69F00",
        "s",
        lambda plan, setting: serial(plan.cut),
    )
)
register(
    Method(
        "hcms-serial",
        "chunked, no overlap",
        "head chunks without overlap: what chunking alone costs",
        "#7F7F7F",
        "v",
        lambda plan, setting: serial(plan.cut),
        cuts=True,
        dashed=True,
    )
)
register(
    Method(
        "hcms",
        "HCMS",
        "head chunks on two lanes: the paper's method",
        "#0072B2",
        "D",
        lambda plan, setting: two_lane(plan.cut, prefetch=plan.prefetch, first=plan.first),
        cuts=True,
        lanes=(COMM,),
    )
)
register(
    Method(
        "hcms-3lane",
        "HCMS, 3 lanes",
        "hcms with the returns on a lane and communicator of their own",
        "#56B4E9",
        "^",
        lambda plan, setting: three_lane(plan.cut, prefetch=plan.prefetch, first=plan.first),
        cuts=True,
        lanes=(COMM, COMM_OUT),
    )
)
register(
    Method(
        "hcms-zero",
        "HCMS, zero SM",
        "head chunks whose communication lanes need no SM, with thin ends",
        "#882255",
        "*",
        lambda plan, setting: zero(
            plan.cut, ends=plan.ends, fill=plan.fill, comm_sms=plan.comm_sms, on_host=setting.on_host
        ),
        cuts=True,
        thins=True,
        lanes=(COMM, COMM_OUT),
    )
)
register(
    Method(
        "ring",
        "Ring",
        "Ring Attention: K and V go round under the attention",
        "#009E73",
        "P",
        lambda plan, setting: ring(setting.ranks),
        lanes=(COMM,),
        program="ring",
        needs_lse=True,
    )
)
register(
    Method(
        "ceiling",
        "attention alone",
        "ulysses-packed of which a benchmark counts the attention alone",
        "#000000",
        "_",
        lambda plan, setting: serial(plan.cut),
        dashed=True,
        counts="attention",
    )
)
