"""How long each stage took, and the most memory that was in use."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Times stages by their names, waiting for the device at the end of each.

    Attributes:
        seconds: of each stage so far, in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        if device.type != "cpu":
            torch.get_device_module(device).reset_peak_memory_stats(device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to the stage `name`."""
        started = time.perf_counter()
        try:
            yield
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def peak_memory(self) -> int:
        """Bytes: of the device since this was made or, on the CPU, of the process since it started."""
        if self.device.type != "cpu":  # torch.accelerator has these only since 2.9
            return int(torch.get_device_module(self.device).max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
