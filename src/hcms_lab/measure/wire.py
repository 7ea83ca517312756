"""What a link asks of a benchmark around its calls: nothing, unless peers are memory that must be laid down first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from hcms.links import links
from hcms_lab.measure.cases import Point

_BESIDE_BYTES = 64 << 20  # of other works than attention's: the output of a whole transformer, gathered


class Wire(Protocol):
    """Around one contestant's calls on one set of inputs."""

    def lay(self, eager_call: Callable[[], object]) -> None:
        """Before a block of calls: whatever the link must know of them, from an untimed eager one."""
        ...

    def rewind(self) -> None:
        """Before each call."""
        ...

    def ask(self, call: Callable[[], Tensor]) -> Tensor:
        """An untimed call of inputs that were not laid: peers answer what they are asked, at no pace of a link."""
        ...

    def answer(self) -> None:
        """After a laid call: peers answer other works, such as a model's gathering of its output."""
        ...

    def spoil(self) -> None:
        """Before a call whose traffic is to be checked."""
        ...

    def wrong_bytes(self) -> int:
        """Bytes of that call that left wrong, as far as the link can tell."""
        ...


class PlainWire:
    """Peers that are there."""

    def lay(self, eager_call: Callable[[], object]) -> None: ...
    def rewind(self) -> None: ...
    def ask(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def answer(self) -> None: ...
    def spoil(self) -> None: ...
    def wrong_bytes(self) -> int:
        return 0


class GhostWire:
    """Peers that are memory: an untimed pass lays down what they send and what they should get."""

    def __init__(self, point: Point) -> None:
        from hcms.links.ghost import WIRE

        self._wire, self._heads = WIRE, point.heads
        tensor_bytes = point.batch * (point.seq_len // point.ranks) * point.heads * point.head_dim * 4
        # A ring passes K and V on P - 1 times; an all-to-all of Q, K, V and O is at most four tensors.
        self._wire.reserve(max(4, 2 * (point.ranks - 1)) * tensor_bytes + _BESIDE_BYTES)

    def lay(self, eager_call: Callable[[], object]) -> None:
        self._wire.prepare(self._heads)
        eager_call()
        self._wire.replay()

    def rewind(self) -> None:
        self._wire.replay()

    def ask(self, call: Callable[[], Tensor]) -> Tensor:
        self._wire.prepare(self._heads)
        return call()

    def answer(self) -> None:
        self._wire.answer()

    def spoil(self) -> None:
        self._wire.spoil()

    def wrong_bytes(self) -> int:
        return self._wire.wrong_bytes()


def wire(link: str, point: Point) -> Wire:
    return GhostWire(point) if links()[link].one_for_all else PlainWire()
