"""A plan: everything that is chosen for one layer on some ranks, from which a method builds its schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hcms.schedule.cut import Cut, Shape
from hcms.schedule.schedule import First


@dataclass(frozen=True, slots=True)
class Plan:
    """What is chosen for a layer.

    Args:
        method: a name of the table of methods.
        cut: heads of each chunk, of a rank's M heads.
        prefetch: chunks exchanged ahead of the one attended to; None is all of them.
        first: once a chunk is attended to, what goes onto the communication lane first: the next chunk's `exchange`,
            or this chunk's `return`.
        ends: into how many parts the first chunk's queries and the last chunk's rows are split.
        fill: whether attention of neighbouring chunks runs on two lanes, so that one fills the other's last wave.
        comm_sms: SMs of a GPU that are kept for the communication lanes, away from attention; 0 shares all.
    """

    method: str
    cut: Cut
    prefetch: int | None = None
    first: First = "exchange"
    ends: tuple[int, int] = (1, 1)
    fill: bool = False
    comm_sms: int = 0

    @property
    def shape(self) -> Shape:
        """The cut with what is done at its ends, as text writes it."""
        return Shape(self.cut, self.ends, self.fill, self.comm_sms)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a trial on some ranks found fastest for one layer, as a profile remembers it.

    Args:
        asked: the method that was to be planned.
        seq_len, heads, batch: the layer, over all ranks.
        transport, graph: how it was called.
        method, cut: what won, the cut as text.
    """

    asked: str
    seq_len: int
    heads: int
    batch: int
    transport: str
    graph: bool
    method: str = ""
    cut: str = ""

    @property
    def question(self) -> Chosen:
        """What was asked, without the answer."""
        return replace(self, method="", cut="")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a schedule is built for.

    Args:
        ranks: P.
        on_host: the issuing thread itself computes and copies (CPU); it must put work onto the link before it computes.
        comm_sms: how many SMs plans may keep for communication, besides none.
    """

    ranks: int
    on_host: bool = False
    comm_sms: tuple[int, ...] = ()
