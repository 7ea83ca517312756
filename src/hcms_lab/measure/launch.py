"""Start ranks, or be one: spawned here, or already started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hcms.hardware import this_host
from hcms.lanes import communicators
from hcms.links import links
from hcms.objects import everyones
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.one_card import one_card
from hcms_lab.measure.stop import die_with
from hcms_lab.measure.torchrun import started_ranks
from hcms_lab.measure.watch import RankFailed, watch

__all__ = ["TIMEOUT_S", "Rank", "RankFailed", "launch", "together"]

TIMEOUT_S = 600.0
LEFT_ALONE_S = 10.0
LAYERS = ("hcms_lab.measure.measure", "hcms_lab.ground.compose")


@dataclass(frozen=True)
class Rank:
    """A rank's place. `control` carries barriers and gathered results, never what is measured.

    Over a link on which one process stands for all ranks, `processes` is 1.
    """

    rank: int
    ranks: int
    device: torch.device
    control: dist.ProcessGroup
    processes: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.processes:
            object.__setattr__(self, "processes", self.ranks)

    @property
    def first(self) -> bool:
        return self.rank == 0


def processes_of(link: str, ranks: int) -> int:
    """How many processes stand for so many ranks."""
    return 1 if links()[link].one_for_all else ranks


def launch(
    fn: Callable[..., None],
    ranks: int,
    *args: Any,
    device: str,
    link: str,
    folder: Path,
    poll: Callable[[], None] = lambda: None,
    timeout_s: float = TIMEOUT_S,
    forked_with: Sequence[str] = LAYERS,
) -> None:
    """Run `fn(rank: Rank, *args)` on every rank, with the default process group made for `device` and `link`.

    Under torchrun this process is one rank already and runs `fn` itself. Otherwise `ranks` processes are spawned on
    this host; their output goes to `folder/rank<r>.log`, and `poll` is called about once a second meanwhile.

    Args:
        fn: importable by name.
        device: cpu (one thread a rank) or cuda.
        link: a name of `hcms.links`.
        timeout_s: how long a rank waits for the others in an exchange before it gives up.
        forked_with: modules that ranks need, imported once for all of them (on CPU; a rank on a GPU starts anew).

    Raises:
        RankFailed: a rank raised, died, was stopped or gave no answer. The others have been ended.
        UsageError: torchrun started another number of ranks, or what only ranks could tell.
        OSError: a rank could not write its files.
    """
    started = started_ranks()
    if started is not None:
        if started != ranks:
            raise UsageError(f"ranks={ranks}: torchrun started {started} ranks; give ranks={started} or start {ranks}")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with(os.getppid())
        _be_a_rank(fn, int(os.environ["RANK"]), ranks, device, link, timeout_s, args)
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Bound here, to a port that nobody else can take meanwhile, and open as long as the ranks live.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with _surroundings(link, ranks):
        watch(
            _spawned, processes_of(link, ranks), fn, store.port, ranks, device, link, timeout_s, args,
            folder=folder, poll=poll, timeout_s=timeout_s, forked_with=forked_with if device == "cpu" else (),
        )  # fmt: skip


@contextmanager
def _surroundings(link: str, ranks: int) -> Iterator[None]:
    """What ranks must find when their processes start: a link's variables, and on one card for all its daemon.

    Variables stand in this process while ranks start from it: a library to be loaded first is read by the loader.
    """
    with ExitStack() as stack:
        wanted = {name: value for name, value in links()[link].environment.items() if name not in os.environ}
        if links()[link].one_card:
            wanted |= stack.enter_context(one_card(ranks))
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _spawned(
    rank: int,
    fn: Callable[..., None],
    port: int,
    ranks: int,
    device: str,
    link: str,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    # Streams share the queues that the driver opens to the card, 8 unless told otherwise: two lanes on one queue wait
    # for each other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))
    _be_a_rank(fn, rank, ranks, device, link, timeout_s, args, store)


def _be_a_rank(
    fn: Callable[..., None],
    rank: int,
    ranks: int,
    device: str,
    link: str,
    timeout_s: float,
    args: tuple[Any, ...],
    store: dist.Store | None = None,
) -> None:
    """Join the others, by the store or by what torchrun's environment says, and run `fn`."""
    if device == "cuda":
        card = 0 if links()[link].one_card else int(os.environ.get("LOCAL_RANK", rank))
        place = torch.device("cuda", card)
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
        torch.set_num_threads(1)  # ranks share the host's cores: each stands for one device
    control = links()[link].start(rank, ranks, place, timedelta(seconds=timeout_s), store)
    if store is None:  # each of torchrun's agents was given settings of its own
        check_alike(control, args)
    if link == "emulated":
        check_one_clock(control, this_host())
    fn(Rank(rank, ranks, place, control, processes=processes_of(link, ranks)), *args)
    if device == "cuda":
        for group in (dist.group.WORLD, control):
            assert group is not None
            communicators.close(group)
    # Not in a `finally`: a rank that fails should be seen to die first, before its peers notice closed connections.
    dist.barrier(control)
    dist.destroy_process_group()


_OWN = ("folder", "hardware", "ranks_per_core", "gbps_of_ratio", "profile")  # a host's, or the first rank's


def check_alike(control: dist.ProcessGroup, jobs: tuple[Any, ...]) -> None:
    """Refuse jobs that are not the same on every rank, but for what is a host's own. Collective."""

    def told(job: Any) -> dict[str, str]:
        of = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in _OWN}
        parts = [told(value) for value in of.values() if is_dataclass(value)]
        return {n: repr(v) for n, v in of.items() if not is_dataclass(v)} | {n: t for p in parts for n, t in p.items()}

    mine = {name: text for job in jobs if is_dataclass(job) for name, text in told(job).items()}
    first, *others = everyones(mine, control)
    for rank, theirs in enumerate(others, start=1):
        if names := [name for name in first if theirs.get(name) != first[name]]:
            differ = ", ".join(names)
            raise UsageError(
                f"rank {rank} has other settings than rank 0 ({differ}): give every agent of torchrun the same"
            )


def check_one_clock(control: dist.ProcessGroup, host: str) -> None:
    """Refuse an emulated link between hosts: its works carry times of arrival, which need one clock. Collective."""
    hosts: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(hosts, host, group=control)
    if len(set(hosts)) > 1:
        raise UsageError(f"link.kind=emulated: {len(set(hosts))} hosts share no clock; give link.kind=native")


def together(rank: Rank, error: BaseException | None, *, left_alone_s: float = LEFT_ALONE_S) -> list[str | None]:
    """What every rank says of a step that may fail: None, or its error in one line. Every rank calls it after the step.

    A rank that failed waits only so long for the others: if one does not come, it hangs in an exchange that this rank
    has left, and nothing but this error would ever end it.

    Raises:
        the error: it is this rank's alone.
    """
    others = [r for r in range(rank.processes) if r != rank.rank]
    here, there = torch.zeros(1), [torch.zeros(1) for _ in others]
    works = [dist.isend(here, group=rank.control, group_dst=r) for r in others]
    works += [dist.irecv(x, group=rank.control, group_src=r) for r, x in zip(others, there, strict=True)]
    for work in works:
        assert work is not None
        if error is None:
            work.wait()
            continue
        try:
            work.wait(timedelta(seconds=left_alone_s))
        except RuntimeError:
            raise error from None
    first_line = next(iter(str(error).strip().splitlines()), "")
    said: list[Any] = [None] * rank.ranks
    dist.all_gather_object(said, error and f"{type(error).__name__}: {first_line}", group=rank.control)
    return said
