"""What several ranks on one card need around them: an NCCL that takes them, and an MPS daemon of the run's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from tempfile import mkdtemp

from hcms_lab.ground.errors import UsageError

NCCL = "HCMS_NCCL"  # the variable that names a libnccl.so.2 to be used in place of torch's
LEAST_NCCL = (2, 30, 0)
SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_DAEMON = "nvidia-cuda-mps-control"
_ENDS_IN_S = 20.0
# A shell keeps the daemon until its input ends, with this process or before; then the daemon and its folder go.
_KEEP = """mkdir "$1/pipe" "$1/log" && "$0" -d && echo up && cat
echo quit -t 5 | "$0"
rm -rf "$1"
"""
_VERSION = (
    "import ctypes, sys; v = ctypes.c_int(); ctypes.CDLL(sys.argv[1]).ncclGetVersion(ctypes.byref(v)); print(v.value)"
)


def is_one_card(link: str) -> bool:
    """Whether ranks over a link of that name share a card; False of a name that is none. Imports torch."""
    from hcms.links import links

    return link in links() and links()[link].one_card


@cache
def nccl_version(library: str | None) -> tuple[int, ...]:
    """The version of an NCCL library, asked in a process of its own; of torch's where none is named.

    Raises:
        UsageError: it cannot be loaded.
    """
    if library is None:
        import torch

        return tuple(torch.cuda.nccl.version())  # pyright: ignore[reportAttributeAccessIssue]
    done = subprocess.run([sys.executable, "-c", _VERSION, library], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"{NCCL}={library}: {why}")
    code = int(done.stdout)  # 23007 is 2.30.7
    return code // 10_000, code // 100 % 100, code % 100


def check_one_card() -> None:
    """Refuse several ranks on one card where this machine cannot have them.

    Raises:
        UsageError: no MPS daemon to start, or an NCCL that takes one rank a card.
    """
    if shutil.which(_DAEMON) is None:
        raise UsageError(f"link.kind=shared: no {_DAEMON} here, which comes with the driver; give link.kind=ghost")
    found = nccl_version(os.environ.get(NCCL))
    if found < LEAST_NCCL:
        raise UsageError(
            f"link.kind=shared: NCCL {'.'.join(map(str, found))} takes one rank a card, 2.30 and newer several; "
            f"pip install --no-deps --target FOLDER 'nvidia-nccl-cu13>=2.30' and set "
            f"{NCCL}=FOLDER/nvidia/nccl/lib/libnccl.so.2"
        )


@contextmanager
def one_card(ranks: int) -> Iterator[Mapping[str, str]]:
    """An MPS daemon as long as the block lasts; yields what the ranks' processes must find in their environment.

    Every rank may use `SHARE` per cent of the SMs: as set, or a little less than what there is for each. The daemon
    goes with this process, however that ends.

    Raises:
        UsageError: the daemon does not start; the line holds what it says.
    """
    folder = mkdtemp(prefix="hcms-mps-")
    own = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
    # The terminal's signals are for the run, which tells its ranks first.
    keeper = subprocess.Popen(
        ["sh", "-c", _KEEP, _DAEMON, folder],
        env={**os.environ, **own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert keeper.stdin is not None and keeper.stdout is not None
    said: list[str] = []
    try:
        for line in keeper.stdout:
            if line == "up\n":
                break
            said.append(line)
        else:
            why = " ".join("".join(said).split()) or "it says nothing"
            raise UsageError(f"link.kind=shared: {_DAEMON} does not start: {why:.200}")
        preload = {}
        if NCCL in os.environ:
            preload["LD_PRELOAD"] = " ".join(filter(None, [os.environ[NCCL], os.environ.get("LD_PRELOAD")]))
        yield {**own, SHARE: os.environ.get(SHARE, str(90 // ranks)), **preload}
    finally:
        keeper.stdin.close()
        try:
            keeper.wait(_ENDS_IN_S)
        except subprocess.TimeoutExpired:  # the daemon gives no answer: results are not to wait for it
            os.killpg(keeper.pid, signal.SIGKILL)
            keeper.wait()
        keeper.stdout.close()
