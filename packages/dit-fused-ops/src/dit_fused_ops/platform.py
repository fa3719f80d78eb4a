"""What this machine has of the optional parts, and why not where it has not."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch


def package_missing(name: str) -> Callable[[], str | None]:
    """Return a `missing` of a backend: why the import package `name` cannot be used, or None."""

    def missing() -> str | None:
        return None if importlib.util.find_spec(name) is not None else f"the package {name} is not installed"

    return missing


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
