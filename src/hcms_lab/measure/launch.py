"""Start ranks, or be one: spawned here, or already started by torchrun."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hcms.links import emulated
from hcms_lab.ground.errors import UsageError

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Rank:
    """A rank's place. `control` carries barriers and gathered results, never what is measured."""

    rank: int
    ranks: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def first(self) -> bool:
        return self.rank == 0


class RankFailed(RuntimeError):
    """A rank died; the message is its own traceback."""


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(
    fn: Callable[..., None],
    ranks: int,
    *args: Any,
    device: str,
    link: str,
    folder: Path,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `fn(rank: Rank, *args)` on every rank, with the default process group made for `device` and `link`.

    Under torchrun this process is one rank already and runs `fn` itself. Otherwise `ranks` processes are spawned on
    this host; their output goes to `folder/rank<r>.log`, and `poll` is called about once a second meanwhile.

    Args:
        fn: importable by name.
        device: cpu (Gloo, one thread a rank) or cuda (NCCL, one GPU a rank).
        link: emulated or native.

    Raises:
        RankFailed: a rank raised or died. The others have been ended.
        UsageError: torchrun started another number of ranks.
    """
    if under_torchrun():
        started = int(os.environ["WORLD_SIZE"])
        if started != ranks:
            raise UsageError(f"ranks={ranks}: torchrun started {started} ranks; give ranks={started} or start {ranks}")
        _be_a_rank(fn, int(os.environ["RANK"]), ranks, device, link, args)
        return
    folder.mkdir(parents=True, exist_ok=True)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    context = mp.start_processes(
        _spawned, (fn, where, ranks, device, link, str(folder), args), nprocs=ranks, join=False, start_method="spawn"
    )
    assert context is not None
    try:
        while not context.join(timeout=1.0, grace_period=5.0):
            poll()
        poll()
    except mp.ProcessRaisedException as failure:
        # torch's text wraps the rank's own traceback; the traceback alone says it.
        text = failure.msg.split("error:\n", 1)[-1].strip()
        name, _, message = text.splitlines()[-1].partition(": ")
        if name.endswith(UsageError.__name__):
            raise UsageError(message) from None
        raise RankFailed(f"rank {failure.error_index} failed:\n{text}") from None
    except mp.ProcessExitedException as failure:
        raise RankFailed(
            f"rank {failure.error_index} died ({failure.signal_name or f'exit status {failure.exit_code}'}); "
            f"its log is {folder / f'rank{failure.error_index}.log'}"
        ) from None
    finally:
        for process in filter(None, context.processes):
            if process.is_alive():
                process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _spawned(
    rank: int,
    fn: Callable[..., None],
    where: dict[str, str],
    ranks: int,
    device: str,
    link: str,
    folder: str,
    args: Any,
) -> None:
    with open(Path(folder) / f"rank{rank}.log", "a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
        try:
            _be_a_rank(fn, rank, ranks, device, link, args)
        except BaseException:
            traceback.print_exc()
            raise


def _be_a_rank(fn: Callable[..., None], rank: int, ranks: int, device: str, link: str, args: Any) -> None:
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=place)
    else:
        place = torch.device("cpu")
        torch.set_num_threads(1)  # ranks share the host's cores: each stands for one device
        dist.init_process_group(emulated.NAME if link == "emulated" else "gloo", timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(control, dist.ProcessGroup)
    fn(Rank(rank, ranks, place, control), *args)
    # Not in a `finally`: a rank that fails should be seen to die first, before its peers notice closed connections.
    dist.barrier(control)
    dist.destroy_process_group()
