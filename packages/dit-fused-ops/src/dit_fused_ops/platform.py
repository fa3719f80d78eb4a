"""What this machine has of the optional parts, and why not where it has not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch

# What torch.npu.get_soc_version() says: 200-205 Atlas 300I Duo, 220-225 A2, 250-255 A3, 260 A5.
DUO, A5 = range(200, 206), range(260, 261)


def soc_version() -> int | None:
    """The number of the NPU's make, or None where there is none."""
    asks = getattr(getattr(torch, "npu", None), "get_soc_version", None)
    return None if asks is None else int(asks())


def package_missing(name: str) -> Callable[[], str | None]:
    """Return a `missing` of a backend: why the import package `name` cannot be used, or None."""

    def missing() -> str | None:
        return None if importlib.util.find_spec(name) is not None else f"the package {name} is not installed"

    return missing


@functools.cache
def flash_attn_missing() -> str | None:
    """Why flash-attn cannot be used, or None; it is built for one torch, so that only importing it tells."""
    if (reason := package_missing("flash_attn")()) is not None:
        return reason
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        return f"flash_attn does not fit this torch: {error}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "flash_attn wants a device of compute capability 8.0 or more"
    return None


@functools.cache
def triton_missing() -> str | None:
    """Why our Triton kernels cannot be used, or None: Triton has a C compiler build what launches them."""
    if (reason := package_missing("triton")()) is not None:
        return reason
    named = os.environ.get("CC")
    found = any(shutil.which(name) for name in ([named] if named else ["gcc", "clang", "cc"]))
    return None if found else "triton needs a C compiler: none of gcc, clang, cc is on the path"


def op_missing(namespace: str, name: str) -> Callable[[], str | None]:
    """Return a `missing` of a backend: why the operator ``torch.ops.<namespace>.<name>`` cannot be used, or None.

    torch_npu and mindiesd register their operators when they are imported; that import is the user's.
    """

    def missing() -> str | None:
        if hasattr(getattr(torch.ops, namespace), name):
            return None
        home = {"npu": "torch_npu"}.get(namespace, namespace)
        if importlib.util.find_spec(home) is None:
            return f"{home} is not installed"
        return f"{home} is not imported, or has no {name} in this version"

    return missing


@functools.cache
def compiler_missing() -> str | None:
    """Why `torch.compile` cannot generate code here, or None: it needs a C++ compiler, on an accelerator triton."""
    if torch.accelerator.is_available():
        return package_missing("triton")()
    named = os.environ.get("CXX")
    found = any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++"]))
    return None if found else "torch.compile needs a C++ compiler: none of g++, clang++, c++ is on the path"
