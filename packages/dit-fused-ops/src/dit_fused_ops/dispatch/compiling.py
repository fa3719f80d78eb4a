"""The reference of an op through `torch.compile`: a backend that every op gets for nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from dit_fused_ops.dispatch.backend import Backend, C
from dit_fused_ops.platform import compiler_missing


class CompiledRun:
    """The `run` of a backend, compiled anew for each kind of call.

    dynamo gives up on code that it has compiled for eight kinds, and runs it as it stands from then on; so each kind
    gets a copy of the code.

    Args:
        run: a plain function, traceable, ``run(call, *tensors)``.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._by_key: dict[str, Callable[..., Any]] = {}
        self._by_call: dict[Any, Callable[..., Any]] = {}

    def __call__(self, call: Any, *tensors: Any) -> Any:
        """Compute the call; the first of its kind takes seconds."""
        compiled = self._by_call.get(call)
        if compiled is None:
            compiled = self._by_call[call] = self._of_kind(call.key)
        return compiled(call, *tensors)

    def _of_kind(self, key: str) -> Callable[..., Any]:
        if key not in self._by_key:
            run = self._run
            code = run.__code__.replace(co_name=f"{run.__name__}_{len(self._by_key)}")
            copied = FunctionType(code, run.__globals__, run.__name__, run.__defaults__, run.__closure__)
            self._by_key[key] = torch.compile(copied)
        return self._by_key[key]


def compiled_backend(run: Any, *, honours: frozenset[str] = frozenset()) -> Backend[C]:
    """Return the backend "compiled" of an op whose reference is `run`."""
    return Backend(
        name="compiled",
        run=CompiledRun(run),
        devices=frozenset({"cpu", "cuda"}),
        honours=honours,
        missing=compiler_missing,
        costly=True,
    )
