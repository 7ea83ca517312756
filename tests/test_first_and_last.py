"""What an attention object takes from an earlier process, and what it lets go of when its own ends."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from hcms.attention import SequenceParallelAttention
from hcms.schedule import catalogue
from hcms.schedule.plan import Chosen
from hcms.schedule.profile import load
from ranks import Place, on_ranks, own, whole_qkv

pytestmark = pytest.mark.t1


def remembering(place: Place) -> list[str]:
    """The cuts of objects that were given a profile: one that remembers this layer's trial, or another's."""
    inputs = [own(place, x) for x in whole_qkv((1, 8 * place.ranks, 3 * place.ranks, 16), torch.float32)]
    first = SequenceParallelAttention(place.emulated, "hcms-zero")
    first(*inputs)
    assert first.profile is not None
    cuts = []
    for heads, transport, graph in ((3, "collective", False), (5, "collective", False), (3, "collective", True)):
        won = Chosen("hcms-zero", 8 * place.ranks, heads * place.ranks, 1, transport, graph, "hcms-zero", "1x2-1-1x3")
        profile = replace(first.profile, chosen=(won,))
        attention = SequenceParallelAttention(place.emulated, "hcms-zero", profile=profile)
        assert torch.equal(attention(*inputs), first(*inputs))
        assert attention.schedule is not None
        cuts.append(f"{attention.schedule.name} {'remembers' in str(attention.plan_reason)}")
    return cuts


def test_what_a_profile_remembers_of_a_trial_is_taken() -> None:
    """Of the same layer, called the same way; anything else is planned anew."""
    for cuts in on_ranks(2, remembering):
        assert cuts[0] == "zero/ends=2,3 True"
        assert [cut.split()[-1] for cut in cuts[1:]] == ["False", "False"]


def test_what_is_remembered_is_kept_in_a_file(tmp_path: Path) -> None:
    chosen = (Chosen("hcms", 1024, 10, 1, "collective", True, "hcms-zero", "1x2-3-1+sms8"),)
    profile = replace(catalogue.gpu("h100").profile(), chosen=chosen)
    profile.save(str(tmp_path / "profile.yaml"))
    assert load(tmp_path / "profile.yaml").chosen == chosen
    for wrong, said in (([{"asked": "hcms"}], "attend, levels or chosen"), (3, "chosen is 3, wanted a list")):
        plain = yaml.safe_load((tmp_path / "profile.yaml").read_text()) | {"chosen": wrong}
        (tmp_path / "damaged.yaml").write_text(yaml.safe_dump(plain))
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "damaged.yaml")
    for wrong in (-5.0, 0.0, float("nan"), float("inf")):
        replace(profile, attend=(replace(profile.attend[0], ms=wrong),)).save(tmp_path / "impossible.yaml")
        with pytest.raises(ValueError, match="a time or a rate that cannot be"):
            load(tmp_path / "impossible.yaml")


_ENDS = """
import atexit, weakref
atexit.register(lambda: print("held" if group() is not None else "let go"))  # runs after what is registered later
import torch, torch.distributed as dist
from hcms import SequenceParallelAttention
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
attend = SequenceParallelAttention(method="ulysses")
attend(*torch.randn(3, 1, 8, 2, 4))
dist.destroy_process_group()
"""


def test_a_process_may_end_right_after_a_call() -> None:
    """A group that is held until the interpreter ends has threads that may ask for its lock: the process aborts."""
    done = subprocess.run([sys.executable, "-c", _ENDS], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "let go\n"), done.stderr
