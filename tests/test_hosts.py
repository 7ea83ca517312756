"""Several hosts: two of torchrun's agents on one host, and two in network namespaces with a slow link between."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import tiny
from forks import Command, namespaces
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.launch import check_alike, check_one_clock
from ranks import Place, on_ranks

pytestmark = pytest.mark.t1

RUN = str(tiny.EXPERIMENTS / "run.py")
TINY = ["+exp=fig3", *tiny.SETTINGS, "latent_frames=[2,1]", "methods=[ulysses,hcms]", "cuts=[even:2]"]
AGENT = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]


def agents(
    folder: Path, port: int, settings: list[str], places: list[tuple[str, int | None]], interface: str
) -> list[tuple[int, str, str]]:
    """Two agents, each at an address, beside a process, in a folder of its own: hosts that share no disk."""
    started = []
    for node, (address, beside) in enumerate(places):
        where = [f"--rdzv-endpoint={places[0][0]}:{port}", f"--local-addr={address}"]
        own = folder / f"node{node}"
        own.mkdir()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": interface}
        started.append(Command([*AGENT, *where, RUN, *TINY, *settings], own, environment, beside=beside))
    try:
        told = [agent.communicate(timeout=100) for agent in started]
    finally:
        for agent in started:
            agent.kill()
    return [(agent.wait(), *words) for agent, words in zip(started, told, strict=True)]


def recorded_once(folder: Path) -> list[dict[str, Any]]:
    """The records, of one run in one folder on one of the nodes: that of the first rank."""
    (found,) = folder.glob("node*/outputs/fig3/2*/records.jsonl")
    assert len(list(folder.glob("node*/outputs"))) <= 2
    assert (found.parent.parent / "latest").resolve() == found.parent
    records = [json.loads(line) for line in found.read_text().splitlines()]
    assert [(r["frames"], r["method"]) for r in records] == [(f, m) for f in (2, 1) for m in ("ulysses", "hcms")]
    assert all(r["ok"] and r["bitwise_equal"] and r["world_size"] == 2 for r in records)
    return records


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_agents_on_one_host(tmp_path: Path) -> None:
    places: list[tuple[str, int | None]] = [("127.0.0.1", None), ("127.0.0.1", None)]
    ended = agents(tmp_path, free_port(), ["link.kind=native", "link.gbps=null"], places, "lo")
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert sum(out.count("records.jsonl") for _, out, _ in ended) == 1, "one of them says what it wrote"
    assert all(r["link"] == "native" for r in recorded_once(tmp_path))


@dataclass(frozen=True)
class Work:
    points: tuple[int, ...]
    seed: int
    folder: str


def told(place: Place, seeds: list[int]) -> str:
    rank = dist.get_rank(place.gloo)
    try:
        check_alike(place.gloo, (Work((1, 2), seeds[rank], f"node{rank}"), "no job"))
    except UsageError as error:
        return str(error)
    return ""


def test_agents_with_other_settings_are_refused_on_all_ranks() -> None:
    assert on_ranks(2, told, [5, 5]) == ["", ""], "a folder is a host's own"
    assert (
        on_ranks(2, told, [5, 6])
        == ["rank 1 has other settings than rank 0 (seed): give every agent of torchrun the same"] * 2
    )


# ---- two network namespaces ------------------------------------------------------------------------------------------

MBIT = 100


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def cards() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a pair of virtual Ethernet cards, each sending `MBIT` at most."""
    if not (shutil.which("ip") and shutil.which("tc") and os.geteuid() == 0):
        pytest.skip("network namespaces need root, ip and tc")
    tag = f"h{os.getpid() % 100_000}"
    names = (f"{tag}a", f"{tag}b")
    try:
        steps = [["netns", "add", name] for name in names]
        steps.append(["link", "add", "card", "netns", names[0], "type", "veth", "peer", "card", "netns", names[1]])
        for number, name in enumerate(names):
            steps.append(["-n", name, "addr", "add", f"10.213.7.{number + 1}/24", "dev", "card"])
            steps += [["-n", name, "link", "set", card, "up"] for card in ("lo", "card")]
            shape = ["tc", "qdisc", "add", "dev", "card", "root", "tbf", "rate", f"{MBIT}mbit", "burst", "32k"]
            steps.append(["netns", "exec", name, *shape, "latency", "400ms"])
        for step in steps:
            done = ip(*step)
            if done.returncode != 0:
                pytest.skip(f"this machine gives no network namespaces: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_network_namespaces_with_a_slow_link(tmp_path: Path, cards: tuple[str, str]) -> None:
    """A run whole over a link that is not this host's own, and as slow as that link: the exchange really took it."""
    (tmp_path / "resolv.conf").touch()  # no name server: one that nobody can reach costs seconds a question
    places: list[tuple[str, int | None]] = []
    with ExitStack() as hosts:
        for node, card in enumerate(cards):
            address, known = f"10.213.7.{node + 1}", tmp_path / f"hosts{node}"
            known.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            # `ip netns exec` has made a mount namespace of its own.
            script = f"mount --bind {known} /etc/hosts && mount --bind {tmp_path}/resolv.conf /etc/resolv.conf"
            places.append((address, hosts.enter_context(namespaces(["ip", "netns", "exec", card], script))))
        settings = ["link.kind=native", "link.gbps=null", "workload.tokens_per_frame=512"]
        ended = agents(tmp_path, 29555, settings, places, "card")
    assert [status for status, _, _ in ended] == [0, 0], ended
    records = recorded_once(tmp_path)
    for record in records:
        element, ranks = 4, 2
        sent = 4 * record["seq_len"] // ranks * record["heads"] * record["head_dim"] * element * (ranks - 1) // ranks
        wire_ms = sent * 8 / (MBIT * 1e6) * 1e3
        assert record["latency_ms"] > 0.6 * wire_ms, "a bucket's burst goes at once, no more"


# ---- what only one host can do ---------------------------------------------------------------------------------------


def what_clocks_say(place: Place, hosts: list[str]) -> str | None:
    try:
        check_one_clock(place.control, hosts[place.rank])
    except UsageError as error:
        return str(error)
    return None


def test_an_emulated_link_between_hosts_is_refused() -> None:
    assert on_ranks(2, what_clocks_say, ["one", "one"]) == [None, None]
    said = on_ranks(2, what_clocks_say, ["one", "other"])
    assert said == ["link.kind=emulated: 2 hosts share no clock; give link.kind=native"] * 2


def test_many_stores_at_once_have_ports_of_their_own() -> None:
    """What ranks meet at is bound before anybody is told its port, and stays bound."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(50)]
    assert len({store.port for store in stores}) == len(stores)
    for store in stores:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", store.port))


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def test_the_script_that_slurm_gets(tmp_path: Path) -> None:
    """By docs/cluster.md's own command. The `sbatch` at hand takes nothing: there is no cluster."""
    for name in ("sbatch", "srun"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho no cluster here >&2\nexit 1\n")
        program.chmod(0o755)
    text = (tiny.EXPERIMENTS.parent / "docs" / "cluster.md").read_text()
    command = text.split("python experiments/run.py --multirun", 1)[1].split("```", 1)[0].replace("\\\n", " ").split()
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = tiny.command(tmp_path, RUN, "--multirun", *command, PATH=path)
    assert done.returncode != 0
    assert "no cluster here" in done.stderr
    scripts = [script.read_text() for script in tmp_path.rglob("*.sh")]
    assert scripts, done.stderr
    for line in ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=4", "--partition=gpu", "--time=120"):
        assert f"#SBATCH {line}\n" in scripts[0]
    assert "submitit.core._submit" in scripts[0]


def test_the_launcher_runs_a_whole_experiment(tmp_path: Path) -> None:
    """The same launcher without Slurm: a job of its own on this host, with ranks of its own."""
    done = tiny.command(tmp_path, RUN, "--multirun", *TINY, "hydra/launcher=submitit_local")
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("outputs/fig3/multirun_*/0/records.jsonl")
    assert len(found.read_text().splitlines()) == 4
