"""The micro-benchmark with one fault in it: FAULT="where:what:rank" python tests/faulty.py +exp=fig3 ...

The fault comes at the second point, of one frame: at `start` (before the first point), in an `exchange` or in
`attention` of a timed call, in a `round` before such a call, or where `records` are written. The rank notes the time in
the run's folder, and every rank its process id.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

NAMES = {"exchange": "alltoall", "attention": "scaled_dot_product"}


def happen(what: str, folder: Path) -> None:
    (folder / "fault").write_text(str(time.time()))
    match what:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raises":
            raise RuntimeError("a made-up fault")
        case "spins":
            while True:
                time.sleep(0.1)
        case "memory":
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, held + 2**26))
            torch.ones(2**28)
        case "limited":  # as a quota would: nothing grows beyond what the records hold now, and a little
            size = (folder / "records.jsonl").stat().st_size + 100
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        case "filled":
            with (folder / "filler").open("wb", buffering=0) as filler:
                try:
                    while True:
                        filler.write(bytes(4096))
                except OSError:
                    pass


class Fault(TorchDispatchMode):
    """Lets the fault happen at the first operation of that name: once a timed call is under way, not before it."""

    def __init__(self, name: str, what: str, folder: Path) -> None:
        super().__init__()
        self._name, self._what, self._folder = name, what, folder

    def exchange(self, *args: Any, **kwargs: Any) -> None:
        """In place of `all_to_all_single`: the dispatcher sees none of those of a backend written in Python."""
        happen(self._what, self._folder)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._name in func._schema.name:
            happen(self._what, self._folder)
        return func(*args, **(kwargs or {}))


def on_rank(rank: Any, job: Any, ticks: Any) -> None:
    from hcms_lab.ground.records import RecordFile
    from hcms_lab.measure import measure

    folder = Path(job.folder)
    where, what, which = os.environ["FAULT"].split(":")
    (folder / f"pid{rank.rank}").write_text(str(os.getpid()))
    if os.environ.get("STUBBORN") == str(rank.rank):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank.rank == int(which):
        if where == "start":
            happen(what, folder)
        whole_point, whole_call, whole_append = measure.measure_point, measure.timed_call, RecordFile.append
        calls = 0

        def measure_point(rank, job, point, *rest):
            nonlocal calls
            calls = 0 if point.frames == 1 else -1000
            return whole_point(rank, job, point, *rest)

        def timed_call(rank, call):
            nonlocal calls
            calls += 1
            if calls == 3 and where == "round":
                happen(what, folder)
            if calls == 3 and where in NAMES:
                with Fault(NAMES[where], what, folder) as fault:
                    if where == "exchange":
                        dist.all_to_all_single = fault.exchange
                    return whole_call(rank, call)
            return whole_call(rank, call)

        def append(self, records):
            if calls > 0 and what == "killed":
                with self.path.open("a") as file:
                    file.write('{"schema": 1, "exp": "fi')
            if calls > 0:
                happen(what, folder)
            whole_append(self, records)

        measure.measure_point, measure.timed_call = measure_point, timed_call
        if where == "records":
            RecordFile.append = append
    measure.measure(rank, job, ticks.put)


if __name__ == "__main__":
    import faulty  # by this name, so that ranks can import it
    import microbench
    import run

    microbench._on_rank = faulty.on_rank
    run.main(sys.argv[1:])
