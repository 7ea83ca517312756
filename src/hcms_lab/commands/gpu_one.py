"""Everything that one GPU can tell, in calls of under ten minutes: `make gpu-one` until it says that all is done.

First every experiment that one card can stand for as one rank of P (`link.kind=ghost`), Figure 3 again with its bytes
moved by SMs (`ghost-sm`), then those that two NCCL ranks on it can show (`link.kind=shared`; left out, with the reason,
where there is no NCCL for that), then tests of the CUDA lanes (races, sanitizer, memory checker), the cost of attention
by heads and tokens, of packing and of the machinery, and one denoising step of Wan2.2-A14B with random weights. What
has ended is not run again, an experiment that was cut off goes on. Records are appended as they are made. Place what
came out with

    hcms-lab contribute outputs/gpu-one/ghost/fig3/latest        # each of the experiments
    hcms-lab contribute outputs/gpu-one/shared/fig3/latest --variant shared
    hcms-lab contribute outputs/gpu-one

Without a GPU it says what it would run on one, and runs the CPU's experiments (`hcms-lab reproduce`).

    hcms-lab gpu-one [--minutes 9] [--list] [--only PART,PART] [key=value ...]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

from hcms.hardware import visible_gpus
from hcms_lab.commands import reproduce
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import ROOT
from hcms_lab.measure.one_card import check_one_card
from hcms_lab.stepwise import Step, listed, run_steps

EXPERIMENTS = ("fig3", "fig4", "fig5", "fig1", "fig2", "fig8", "table2", "table3", "table5")
SHARED = ("fig3", "fig1", "table2", "table5")
STEPS = [Step(name, "ghost") for name in EXPERIMENTS] + [Step("fig3", "ghost-sm", settings=("link.kind=ghost-sm",))]
SHARED_STEPS = [Step(name, "shared", settings=("link.kind=shared",)) for name in SHARED]
PARTS = ("experiments", "tests", "attend", "copies", "machinery", "layers", "wan")
DONE = "parts.txt"  # in the output folder: the parts that have ended, a line each


def run_tests(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """The CUDA tests plain, then a small race test under the stream sanitizer, then one test under memcheck."""
    test = str(ROOT / "tests" / "test_cuda.py")
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(ROOT),
    ]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    own_sms = str(ROOT / "tests" / "test_own_sms.py")
    runs = [
        ("SMs of communication's own", [*pytest, own_sms], {"HCMS_RACE_ROUNDS": "20"}, 60),
        ("cuda tests, 1,000 race rounds", [*pytest, test], {"HCMS_RACE_ROUNDS": "1000"}, 240),
        ("stream sanitizer", [*pytest, test, "-k", "serial and not race"], {"TORCH_CUDA_SANITIZER": "1"}, 90),
    ]
    if memcheck := shutil.which("compute-sanitizer"):
        one = [
            memcheck,
            "--report-api-errors",
            "no",
            "--error-exitcode",
            "9",
            "--target-processes",
            "all",
            *pytest,
            test,
            "-k",
            "serial and 3lane",
        ]
        runs.append(("compute-sanitizer memcheck", one, {}, 150))
    for name, command, extra, limit_s in runs:
        began_s = perf_counter()
        with (folder / "tests.log").open("a") as log:
            log.write(f"== {name}: {' '.join(command)}\n")
            log.flush()
            try:
                done = subprocess.run(
                    command, env={**env, **extra}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s
                )
                text, ok = done.stdout.decode(errors="replace"), done.returncode == 0
            except subprocess.TimeoutExpired as late:
                text, ok = (late.stdout or b"").decode(errors="replace") + f"\nstopped after {limit_s} s", False
            log.write(text + "\n")
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
        yield name, ok, f"{last.strip('= ')} ({perf_counter() - began_s:.0f} s)"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for every experiment")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing later, cut off an experiment then")
    parser.add_argument("--output", type=lambda given: Path(given).resolve(), default="outputs/gpu-one")
    parser.add_argument("--only", default="", help=f"parts to run, done or not, of {','.join(PARTS)}")
    parser.add_argument("--list", action="store_true", help="show what there is to do, run nothing")


def done_parts(folder: Path) -> list[str]:
    noted = folder / DONE
    return noted.read_text().split() if noted.is_file() else []


def shown(folder: Path) -> str:
    """What there is to do, a line each."""
    done = done_parts(folder)
    rest = [f"{'done' if part in done else 'to do':6} card   {part}" for part in PARTS if part != "experiments"]
    return "\n".join([listed(STEPS + SHARED_STEPS, folder), *rest])


def run(arguments: Namespace) -> int:
    named = arguments.only.split(",") if arguments.only else []
    if unknown := [p for p in named if p not in PARTS]:
        raise UsageError(f"--only {unknown[0]}: choose of {', '.join(PARTS)}")
    folder: Path = arguments.output
    if arguments.list:
        print(shown(folder))
        return 0
    if not visible_gpus():
        print(f"no GPU is visible here. On one, this would run:\n{shown(folder)}\nHere, the CPU's experiments:")
        return reproduce.run(Namespace(settings=arguments.settings, only="", draw=False))
    ends_s = perf_counter() + 60 * arguments.minutes
    wanted = named or [part for part in PARTS if part not in done_parts(folder)]
    failed = 0
    if "experiments" in wanted:
        steps = STEPS + SHARED_STEPS
        try:
            check_one_card()
        except UsageError as missing:
            steps = STEPS
            print(f"left out: {', '.join(SHARED)} over the shared link: {missing}")
        failed = run_steps(steps, folder, ends_s, arguments.settings)
        if all(step.done(folder) for step in steps):
            note_done(folder, "experiments")
    if parts := [part for part in wanted if part != "experiments"]:
        failed += card(folder, parts, ends_s)
    if set(PARTS) <= set(done_parts(folder)):
        print("all is done")
    return 1 if failed else 0


def note_done(folder: Path, part: str) -> None:
    if part not in done_parts(folder):
        with (folder / DONE).open("a") as noted:
            noted.write(part + "\n")


def card(folder: Path, wanted: list[str], ends_s: float) -> int:
    """The parts that measure the card itself, none begun after `ends_s`; how many failed."""
    import torch
    import torch.distributed as dist

    from hcms.hardware import hardware
    from hcms_lab.ground.records import Record, RecordFile
    from hcms_lab.measure import one_gpu
    from hcms_lab.measure.environment import environment

    folder.mkdir(parents=True, exist_ok=True)
    here = hardware("cuda")
    env = environment(here, "none", "cuda")
    before = folder / "env.json"
    if before.is_file() and (theirs := json.loads(before.read_text())["commit"]) != env["commit"]:
        raise UsageError(f"{folder} holds records of commit {theirs}: give another folder by --output")
    before.write_text(json.dumps(env, indent=2) + "\n")
    (folder / "config.resolved.yaml").write_text("name: gpu-one\nkind: gpu_one\n")
    file = RecordFile(folder / "records.jsonl")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29555")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))

    def tests(slug: str) -> Iterator[Record]:
        for name, ok, text in run_tests(folder):
            yield Record(exp="gpu-one", hardware=slug, workload="tests", world_size=1, method=name, ok=ok,
                         status="done" if ok else "failed", error=None if ok else text, actual_path=text)  # fmt: skip

    def wan(slug: str) -> Iterator[Record]:
        from hcms_lab.measure.wan.one_gpu import one_gpu_steps

        yield from one_gpu_steps(slug)

    parts = {
        "tests": [tests],
        "attend": [one_gpu.attention_costs],
        "copies": [one_gpu.copy_costs, one_gpu.interference],
        "machinery": [partial(one_gpu.machinery, traces=folder / "traces")],
        "layers": [one_gpu.full_size_layers],
        "wan": [wan],
    }
    failed = 0
    for part in (p for p in PARTS if p in wanted):
        if perf_counter() > ends_s:
            print("out of time: call again for the rest")
            break
        began_s, whole = perf_counter(), True
        for measure in parts[part]:
            try:
                for made in measure(here.slug):
                    file.append([made])
                    show(made)
                    failed += not made.ok
            except Exception:
                traceback.print_exc()
                failed, whole = failed + 1, False
            torch.cuda.empty_cache()
        if whole:
            note_done(folder, part)
        print(f"-- {part}: {perf_counter() - began_s:.0f} s", flush=True)
    dist.destroy_process_group()
    records = file.read()
    if {"attend", "copies", "machinery"} <= set(done_parts(folder)):
        one_gpu.profile(records, here.slug).save(folder / "profile.yaml")
    print(f"{len(records)} records, {sum(not r['ok'] for r in records)} not ok: {folder / 'records.jsonl'}")
    return failed


def show(r) -> None:
    """One record as one short line."""
    size = " ".join(str(x) for x in (r.kernel, r.seq_len, r.heads, r.cut) if x is not None)
    rate = f" {r.tflops:.0f} TFLOP/s" if r.tflops else f" {r.gbps:.0f} GB/s" if r.gbps else ""
    share = f" {r.share_of_best:.2f} of best" if r.share_of_best else ""
    time = f" {r.latency_ms:.3f} ms" if r.latency_ms is not None else ""
    print(
        f"{'ok  ' if r.ok else 'FAIL'} {r.method} {size}{time}{rate}{share}{' ' + r.error if r.error else ''}",
        flush=True,
    )
