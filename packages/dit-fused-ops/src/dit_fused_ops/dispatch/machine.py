"""What a measurement is only valid for: this device and these libraries."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_LIBRARIES = ("torch", "triton", "flash-attn", "torch-npu", "mindiesd")


@functools.cache
def device_name(device: torch.device) -> str:
    """Name the device: the accelerator's own name, or a processor with what torch uses of it."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{_processor()} {capability} x{torch.get_num_threads()}"
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


@functools.cache
def library_versions() -> str:
    """The versions of torch and of every optional library that is installed, in one line."""
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
