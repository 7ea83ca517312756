"""What all peers share: a contestant around a callable, and the record of what really ran."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import profile

from hcms.links import emulated
from hcms.schedule.schedule import Schedule
from hcms.schedule.timeline import Timeline

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peer:
    """A peer's attention as a contestant of the benchmark (`hcms_lab.measure.contestant.Contestant`).

    The first call, which is a warm-up, runs under the profiler: which operations it saw is the actual path. On an
    emulated link the path also says what the port was charged, so that a peer that went round it would show.

    Args:
        name, kernel: as the configuration names them.
        group: the ranks.
        attention: `(q_BLNH, k_BLNH, v_BLNH) -> out_BLNH`.
        version: of the peer's distribution.
    """

    # Peers keep no timeline and no schedule; what they own is theirs to hold, so nothing of it is counted or poisoned.
    timeline: Timeline | None = None
    cut: str | None = None
    schedule: Schedule | None = None
    plan_reason: str | None = None
    buffer_bytes = 0

    def __init__(self, name: str, kernel: str, group: dist.ProcessGroup, attention: Attention, version: str) -> None:
        self._group = group
        self._attention = attention
        self.version: str | None = version
        self.requested_path = f"{name}/{kernel}"
        self.actual_path = "nothing ran"

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        if self.actual_path != "nothing ran":
            return self._attention(q_BLNH, k_BLNH, v_BLNH)
        works, sent_bytes = emulated.PORT.works, emulated.PORT.sent_bytes
        profiler = profile()
        with profiler:
            out_BLNH = self._attention(q_BLNH, k_BLNH, v_BLNH)
        ran = {event.key: event.count for event in profiler.key_averages()}
        backend = str(dist.get_backend(self._group))
        parts = [*_names(_CLASS, ran), *_names(_KERNEL, ran), backend]
        if backend == emulated.NAME:
            charged_mb = (emulated.PORT.sent_bytes - sent_bytes) / 1e6
            parts.append(f"{emulated.PORT.works - works} works charged {charged_mb:.3f} MB")
        else:
            parts.append("+".join(f"{count}x{name.split('::')[1]}" for name, count in ran.items() if _C10D.match(name)))
        self.actual_path = "/".join(parts)
        return out_BLNH

    def eager(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return self(q_BLNH, k_BLNH, v_BLNH)

    def poison(self) -> None:
        """Nothing: a peer's buffers are its own. The benchmark's alternating inputs show a stale result."""


# Autograd functions such as TemplatedUlyssesAttention and _SeqAllToAll, attention operations, collectives.
_CLASS = re.compile(r"(_?[A-Z]\w*(?:All\w*|Attention\w*))$")
_KERNEL = re.compile(r"(?:aten::_|\w+::)(\w*(?:dot_product|attn|sage)\w*)$")
_C10D = re.compile(r"c10d::(?!barrier|monitored)")


def _names(pattern: re.Pattern[str], ran: Mapping[str, int]) -> list[str]:
    """What the pattern takes of the operations that ran, without composites that only call another of them."""
    found = [match[1] for name in ran if (match := pattern.match(name))]
    return sorted(name for name in set(found) if name != "scaled_dot_product_attention")
