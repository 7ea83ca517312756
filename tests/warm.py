"""A Python that has imported what commands and ranks import, and becomes one of them for each order that it is given.

An interpreter takes four seconds of a core to import torch, pandas and Matplotlib, nine with diffusers: as often as a
test starts a command, and again for the server that the command's ranks are forked from. This one imports them once a
session, for all workers, and forks. A fork has the order's folder, environment, arguments and open files; what it runs
is a script, a module or a statement (`-m`, `-c`) as `__main__`, or one rank of `ranks.py`.

It listens at the socket that it is named: an order a connection, with the files that go with it. Its answers there: the
fork's process id, then its exit status. It ends with its own standard input, so with whoever started it.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import current_process, util
from multiprocessing.connection import Connection
from selectors import EVENT_READ, DefaultSelector
from typing import Any

PRELOADED = (
    *("hcms.attention", "hcms.diffusers", "hcms_lab.measure.measure", "hcms_lab.measure.wan.build"),
    *("hcms_lab.ground.compose", "hcms_lab.run", "hcms_lab.cli", "hcms_lab.report.registry", "hydra", "rich.table"),
    *("seaborn", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf", "fontTools.subset"),
    *("PIL.PngImagePlugin", "torch._dynamo", "pytest", "hypothesis", "ranks"),
)
LAZY = ("WanPipeline", "WanImageToVideoPipeline", "WanTransformer3DModel")  # of diffusers, where it is there
SERVER = "from multiprocessing.forkserver import main; "
TERMINALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
_LONGEST = 2**20  # bytes of an order: an environment, mostly


def send(word: socket.socket, order: dict[str, Any], files: list[int]) -> None:
    """An order is a line of JSON, and open files beside it."""
    text = json.dumps(order).encode() + b"\n"
    if rest := text[socket.send_fds(word, [text], files) :]:  # to send nothing fails where the other end has closed
        word.sendall(rest)


def receive(word: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """An order and its files; None where the other end was closed without any."""
    text, files, *_ = socket.recv_fds(word, _LONGEST, 8)
    while text and not text.endswith(b"\n"):
        if not (more := word.recv(_LONGEST)):  # who asked died in the middle of it
            return None, files
        text += more
    return (json.loads(text) if text else None), files


def preload() -> None:
    """Import everything, and be sure that no thread was started: a fork would have only its own."""
    for name in PRELOADED:
        import_module(name)
    if find_spec("diffusers") is not None:
        diffusers = import_module("diffusers")
        for name in LAZY:
            getattr(diffusers, name)
    assert len(os.listdir("/proc/self/task")) == 1, "a module that is imported here starts a thread"
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it looks at


def join_namespaces(pid: int) -> None:
    """Have the mounts and the network of that process, as all that is started from here will."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("net", "mnt"):
        with open(f"/proc/{pid}/ns/{name}") as namespace:
            if libc.setns(namespace.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"the {name} namespace of process {pid} cannot be joined")


def be_told(order: dict[str, Any], files: list[int]) -> None:
    """Take on the order's place: its namespaces, folder, environment, session, and its files by their numbers."""
    if "beside" in order:
        join_namespaces(order["beside"])
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if order.get("own_session"):
        os.setsid()
        for each, handler in TERMINALS.items():
            signal.signal(each, signal.SIG_IGN if each in order["ignores"] else handler)
    for target, file in zip(order["as"], files, strict=False):
        os.dup2(file, target)


def be_a_rank(order: dict[str, Any], word: int) -> None:
    """Be one of the ranks of `ranks.Ranks`, which sends functions over that file; does not return."""
    sys.path[:0] = order["path"]
    current_process().authkey = bytes.fromhex(order["key"])  # what tensors are handed on by
    import ranks

    ranks.serve(Connection(word), *order["rank"])


def become(order: dict[str, Any]) -> None:
    """Be the command: from here on this process is its own."""
    ready_a_server()
    what, *arguments = order["arguments"]
    beside = "" if what in ("-c", "-m") else os.path.dirname(what)
    sys.path[:0] = [beside, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [what, *arguments]
    try:
        match what:
            case "-c":
                sys.argv = ["-c", *arguments[1:]]
                exec(arguments[0], {"__name__": "__main__"})
            case "-m":
                sys.argv = arguments
                runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            case script:
                runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # As an interpreter ends, but for taking hundreds of modules apart.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ready_a_server() -> None:
    """Where multiprocessing starts the server that ranks are forked from, be it a child forked now, not a new Python.

    Now, while nothing else runs in this process. The child waits for what an interpreter would be given: the
    statement, the files that it inherits, environment, folder and blocked signals.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        be_a_server(theirs)
    theirs.close()
    start = util.spawnv_passfds

    def started(path: Any, arguments: list[Any], files: list[int]) -> int:
        if not str(arguments[-1]).startswith(SERVER) or ours.fileno() < 0:
            return start(path, arguments, files)
        blocked = [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
        told = {"do": arguments[-1], "as": files, "blocked": blocked, "folder": os.getcwd()}
        send(ours, {**told, "environment": dict(os.environ)}, files)
        ours.close()
        return pid

    util.spawnv_passfds = started


def be_a_server(word: socket.socket) -> None:
    """Wait for the word, then serve; does not return."""
    order, files = receive(word)
    word.close()
    if order is not None:
        apart = [fcntl.fcntl(file, fcntl.F_DUPFD, 512) for file in files]  # out of the way of the numbers wanted
        for file in files:
            os.close(file)
        be_told(order, apart)
        for file in apart:
            os.close(file)
        signal.pthread_sigmask(signal.SIG_SETMASK, order["blocked"])
        with suppress(SystemExit):
            exec(order["do"], {})
    os._exit(0)


def serve(place: str) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for every order; in the fork, what it is to become with which files, and None here at the end."""
    ears, (ended, end) = socket.socket(socket.AF_UNIX), os.pipe()
    ears.bind(place)
    ears.listen(64)
    os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(end)
    running: dict[int, socket.socket] = {}
    with DefaultSelector() as ready:
        for file in (0, ended, ears):
            ready.register(file, EVENT_READ)
        while True:
            found = {key.fileobj for key, _ in ready.select()}
            if ended in found:
                os.read(ended, 2**16)
                while running and (status := os.waitpid(-1, os.WNOHANG))[0]:
                    answer(gone := running.pop(status[0]), os.waitstatus_to_exitcode(status[1]))
                    gone.close()
            if 0 in found:
                return None
            if ears not in found:
                continue
            asker, _ = ears.accept()
            order, files = receive(asker)
            if order is None:  # it only asked whether anyone is here
                asker.close()
                continue
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for file in (ears, asker, *running.values()):
                    file.close()
                os.close(ended)
                os.close(end)
                return order, files
            running[pid] = asker
            answer(asker, pid)
            for file in files:
                os.close(file)


def answer(asker: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # it has gone
        asker.sendall(f"{number}\n".encode())


def main(place: str) -> None:
    preload()
    if (told := serve(place)) is None:
        return
    order, files = told
    be_told(order, files)
    if "rank" in order:
        be_a_rank(order, *files)
    for file in files:
        os.close(file)
    become(order)


if __name__ == "__main__":
    main(sys.argv[1])
