"""The reference of an op through `torch.compile`: a backend that every op gets for nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from dit_fused_ops.dispatch.backend import Backend, C, Call
from dit_fused_ops.platform import compiler_missing


class CompiledPerKind:
    """`torch.compile` of a function, with a copy of its code for each kind of call.

    dynamo gives up on code that it has compiled for eight kinds, and runs it as it stands from then on.

    Args:
        load: returns the function, a plain one; called when it is first needed.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._by_key: dict[str, Callable[..., Any]] = {}
        self._by_call: dict[Any, Callable[..., Any]] = {}

    def of(self, call: Call) -> Callable[..., Any]:
        """Return the compiled function for calls like this one; its first use takes seconds."""
        compiled = self._by_call.get(call)
        if compiled is None:
            if call.key not in self._by_key:
                self._by_key[call.key] = torch.compile(_copied(self._load(), len(self._by_key)))
            compiled = self._by_call[call] = self._by_key[call.key]
        return compiled


def _copied(function: Any, number: int) -> FunctionType:
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    copied = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


class CompiledRun:
    """The `run` of a backend, compiled anew for each kind of call.

    Args:
        run: a plain function, traceable, ``run(call, *tensors)``.
    """

    def __init__(self, run: Any) -> None:
        self._kinds = CompiledPerKind(lambda: run)

    def __call__(self, call: Any, *tensors: Any) -> Any:
        """Compute the call."""
        return self._kinds.of(call)(call, *tensors)


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
