"""What the device holds, and what it could compute at most."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense bfloat16 on tensor cores, 1e12 operations a second, as NVIDIA's data sheets say (A100, H100, H200, L40S:
# "bfloat16 tensor core", half of the figure with sparsity). The first name that the device's name contains counts.
PEAKS = (
    ("H200", 989.4), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.4), ("A100", 312.0), ("L40S", 362.05)
)  # fmt: skip


def device_peak_tflops(device: torch.device) -> float | None:
    """The peak of a device in bfloat16, in 1e12 operations a second; None where its maker's figure is not known."""
    import torch

    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    if device.type == "cpu" or name_of is None:
        return None
    name = str(name_of(device))
    return next((peak for part, peak in PEAKS if part in name), None)


def memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on an accelerator, or resident of this process on a CPU."""
    import torch

    held = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    if held is not None:
        return int(held(device))
    # Linux counts in KiB, macOS in bytes (getrusage(2) of each).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
