"""Everything that one GPU can tell, in one call of under ten minutes: `make gpu-one`.

Tests of the CUDA lanes (races, sanitizer, memory checker), the cost of attention by heads and tokens, of packing and of
the machinery, and one denoising step of Wan2.2-A14B with random weights. Records are appended as they are made; a short
table is printed last. Needs torch and pytest on a machine with a GPU; diffusers and hydra-core for the last part.

    hcms-lab gpu-one [--output outputs/gpu-one] [--only tests,attend,copies,machinery,layers,wan]
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

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import ROOT

PARTS = ("tests", "attend", "copies", "machinery", "layers", "wan")


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
    runs = [
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
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu-one"))
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS)}")


def run(arguments: Namespace) -> int:
    wanted = arguments.only.split(",")
    if unknown := [p for p in wanted if p not in PARTS]:
        raise UsageError(f"--only {unknown[0]}: choose of {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        raise UsageError("no GPU is visible here; this command needs one")
    import torch.distributed as dist

    from hcms.hardware import hardware
    from hcms_lab.ground.records import Record, RecordFile
    from hcms_lab.measure import one_gpu
    from hcms_lab.measure.environment import environment

    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    here = hardware("cuda")
    env = environment(here, "none", "cuda")
    before = folder / "env.json"
    if before.is_file() and (theirs := json.loads(before.read_text())["commit"]) != env["commit"]:
        raise UsageError(f"{folder} holds records of commit {theirs}: give another folder by --output")
    before.write_text(json.dumps(env, indent=2) + "\n")
    file = RecordFile(folder / "records.jsonl")
    if "tests" in wanted:
        for name, ok, text in run_tests(folder):
            print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", flush=True)
            file.append(
                [
                    Record(exp="gpu-one", hardware=here.slug, workload="tests", world_size=1, method=name, ok=ok,
                           status="done" if ok else "failed", error=None if ok else text, actual_path=text)
                ]
            )  # fmt: skip
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29555")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))

    def wan(slug: str) -> Iterator[Record]:
        from hcms_lab.measure.wan.one_gpu import one_gpu_steps

        yield from one_gpu_steps(slug)

    parts = {
        "attend": [one_gpu.attention_costs],
        "copies": [one_gpu.copy_costs, one_gpu.interference],
        "machinery": [partial(one_gpu.machinery, traces=folder / "traces")],
        "layers": [one_gpu.full_size_layers],
        "wan": [wan],
    }
    failed = False
    for part in (p for p in PARTS if p in wanted and p in parts):
        for measure in parts[part]:
            began_s = perf_counter()
            try:
                for made in measure(here.slug):
                    file.append([made])
                    show(made)
            except Exception:
                traceback.print_exc()
                failed = True
            print(f"-- {part}: {perf_counter() - began_s:.0f} s", flush=True)
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    records = file.read()
    if {"attend", "copies", "machinery"} <= set(wanted):
        one_gpu.profile(records, here.slug).save(folder / "profile.yaml")
    print(f"{len(records)} records, {sum(not r['ok'] for r in records)} not ok: {folder / 'records.jsonl'}")
    return 1 if failed or any(not r["ok"] for r in records) else 0


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
