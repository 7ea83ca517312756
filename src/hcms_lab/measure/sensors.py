"""Clock and power of a GPU while something runs on it, by NVML, where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from statistics import median
from threading import Event, Thread
from typing import Any

import torch

_EVERY_S = 0.02


class Sensors:
    """Reads one GPU; yields nothing on a CPU or without the package nvidia-ml-py."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        if device.type == "cuda":
            try:
                nvml = import_module("pynvml")
                nvml.nvmlInit()
                self._handle = nvml.nvmlDeviceGetHandleByIndex(_physical_index(device))
                self._nvml = nvml
            except Exception:  # no package, no library, or no permission: records say null
                self._nvml = None

    @contextmanager
    def watch(self) -> Iterator[dict[str, float]]:
        """While the block runs, read; afterwards the mapping holds medians of the second half, in MHz and W."""
        seen: dict[str, float] = {}
        if self._nvml is None:
            yield seen
            return
        readings: list[tuple[float, float]] = []
        stop = Event()

        def read() -> None:
            nvml = self._nvml
            while not stop.is_set():
                clock_mhz = nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)
                readings.append((clock_mhz, nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3))
                stop.wait(_EVERY_S)

        reader = Thread(target=read, daemon=True)
        reader.start()
        try:
            yield seen
        finally:
            stop.set()
            reader.join()
        if readings:
            late = readings[len(readings) // 2 :]
            seen["sm_clock_mhz"] = float(median(clock for clock, _ in late))
            seen["power_w"] = round(float(median(power for _, power in late)), 1)


def _physical_index(device: torch.device) -> int:
    """NVML counts all GPUs of the machine, CUDA those that are visible."""
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = device.index or 0
    if visible is None:
        return index
    chosen = [part.strip() for part in visible.split(",") if part.strip()]
    return int(chosen[index]) if chosen[index].isdigit() else index
