"""What every test shares: a tier, no network, no display, one thread a process, and reproducible examples in CI."""

from __future__ import annotations

import atexit
import os
import shutil

import pytest

import forks

# Before any test module imports torch, wandb or matplotlib; ranks that a test starts inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a GPU machine with torch and pytest alone runs tests/test_cuda.py
    pass
else:
    # No deadline: on a machine that also runs ranks, a slow example says nothing about the code.
    settings.register_profile("local", deadline=None, max_examples=60)
    settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Name where tests find the session's warm Python (forks.py); nothing is started before a test asks for it."""
    if hasattr(config, "workerinput"):  # the session that started this worker has
        return
    place, held = forks.open_place()

    def end() -> None:
        os.close(held)
        shutil.rmtree(place, ignore_errors=True)

    atexit.register(end)  # after whatever tests have registered, ranks that must be ended first


TIERS = {"t0", "t1", "t2", "t3"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test file says its tier, so that `-m t0` is what it says; what shares a card goes to one worker.

    What one worker runs as a whole comes first, so that the other does not wait for it at the end.
    """
    for item in items:
        if item.get_closest_marker("t2"):
            item.add_marker(pytest.mark.xdist_group("card"))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    untold = sorted({item.path.name for item in items if TIERS.isdisjoint(m.name for m in item.iter_markers())})
    if untold := [name for name in untold if name.startswith("test_")]:
        raise pytest.UsageError(f"{', '.join(untold)}: no tier; give it pytestmark = pytest.mark.t0 (or t1, t2, t3)")
