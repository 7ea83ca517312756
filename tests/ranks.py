"""Real ranks for tests: processes over Gloo, started once a session and given one function after another.

`on_ranks(2, fn, *args)` calls `fn(place, *args)` on two ranks and returns what each gave. Functions are module-level
and return plain facts; the test asserts on them, where pytest can show both sides. A rank that raises ends its ranks,
and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import Pipe, current_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forks import Fork
from hcms.kernels import attend_full, kernel
from hcms.links import emulated
from hcms_lab.measure.launch import Rank

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Place(Rank):
    """A rank of a test: the default group is Gloo; beside it one of backend "emulated", and `control` for barriers."""

    emulated: dist.ProcessGroup

    @property
    def gloo(self) -> dist.ProcessGroup:
        group = dist.group.WORLD
        assert group is not None
        return group


class Ranks:
    """P processes that wait for work."""

    def __init__(self, ranks: int) -> None:
        self._store = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
        self._ends: list[Connection] = []
        self._processes: list[Fork] = []
        for rank in range(ranks):
            ours, theirs = Pipe()
            order = {"rank": [rank, ranks, str(self._store)], "as": []}
            order |= {"path": sys.path, "key": current_process().authkey.hex()}
            self._processes.append(Fork(order, [theirs.fileno()], folder=Path.cwd(), environment=os.environ))
            self._ends.append(ours)
            theirs.close()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        for end in self._ends:
            end.send((fn, args))
        answers: dict[Any, Any] = {}
        while len(answers) < len(self._ends):
            ready = wait([end for end in self._ends if end not in answers], timeout=_TIMEOUT_S)
            if not ready:
                raise TimeoutError(f"{fn.__name__}: ranks gave no answer within {_TIMEOUT_S} s")
            for end in ready:
                assert isinstance(end, Connection)
                failed, answers[end] = end.recv()
                if failed:
                    raise AssertionError(f"rank {self._ends.index(end)} of {len(self._ends)} failed:\n{answers[end]}")
        return [answers[end] for end in self._ends]

    def close(self) -> None:
        for end in self._ends:
            end.close()  # a rank that reads the end of its pipe leaves
        for process in self._processes:
            try:
                process.wait(timeout=2)
            except TimeoutError:
                process.kill()
                process.wait()
        self._store.unlink(missing_ok=True)
        self._store.parent.rmdir()


@cache
def _ranks(ranks: int) -> list[Ranks]:
    """A slot for the running ranks of that number."""
    slot: list[Ranks] = []
    atexit.register(lambda: [r.close() for r in slot])
    return slot


def on_ranks(ranks: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(place, *args)` on every one of `ranks` ranks; what each returned, by rank."""
    slot = _ranks(ranks)
    if not slot:
        slot.append(Ranks(ranks))
    try:
        return slot[0].run(fn, *args)
    except BaseException:
        slot.pop().close()
        raise


def serve(end: Connection, rank: int, ranks: int, store: str) -> None:
    """Be a rank: what a fork of the warm Python does from its start to its end."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    place = Place(rank, ranks, torch.device("cpu"), new_group("gloo"), new_group(emulated.NAME))
    while True:
        try:
            fn, args = end.recv()
        except EOFError:
            break
        try:
            answer = (False, fn(place, *args))
        except BaseException:
            answer = (True, traceback.format_exc())
        with suppress(BrokenPipeError):  # a peer failed first, and nobody listens any more
            end.send(answer)
        if answer[0]:
            break
    os._exit(0)  # peers may be gone already, so no goodbye over the groups


class Collectives(TorchDispatchMode):
    """Records every c10d operation that this rank issues while it is entered: `(name, bytes given to it)`.

    The dispatcher sees all of them, whichever function of torch.distributed they were asked for by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").rstrip("_")
            given = args[1] if name == "alltoall_base" else args[0]
            self.calls.append((name, _nbytes(given)))
        return func(*args, **(kwargs or {}))


def _nbytes(given: Any) -> int:
    """Of a tensor, or of lists of them."""
    return given.nbytes if isinstance(given, Tensor) else sum(map(_nbytes, given))


def new_group(backend: str, ranks: list[int] | None = None) -> dist.ProcessGroup:
    """`dist.new_group` of all ranks or some; collective. What ranks outside it get must not be used."""
    return dist.new_group(ranks, backend=backend, timeout=timedelta(seconds=_TIMEOUT_S))  # pyright: ignore


def whole_qkv(shape_BSNH: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v `[B, S, N, H]` of the whole sequence: the same on every rank, which takes its share by `own`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape_BSNH, generator=generator).to(dtype) for _ in range(3)]


def own(place: Rank, x_BSNH: Tensor) -> Tensor:
    """This rank's L = S/P tokens of a whole tensor, contiguous and its own."""
    return x_BSNH.chunk(place.ranks, dim=1)[place.rank].clone(memory_format=torch.contiguous_format)


def largest(error: Tensor) -> float:
    """The largest absolute value; infinite where any is not finite."""
    value = error.abs().max().item()
    return value if math.isfinite(value) else math.inf


def error_bound(whole_BSNH: list[Tensor], kernel_name: str) -> tuple[Tensor, float]:
    """Full attention in float64, and what a method's error may be: twice that of the plain kernel in the same dtype,
    and two roundings of the result (which the partial results of a ring cost).
    """
    exact_BSNH = attend_full(*whole_BSNH)
    plain = largest(kernel(kernel_name).attend(*whole_BSNH).double() - exact_BSNH)
    return exact_BSNH, 2 * plain + torch.finfo(whole_BSNH[0].dtype).eps * largest(exact_BSNH)
