"""Let megatron-core, which names ``cuda`` in many places, run on another device. Nobody else here names one.

Inside ``with mcore_on(device)`` two things hold, and both are undone at its end:

* a torch-function mode reads ``device="cuda"`` (also ``0`` and ``cuda:0``) in factories, ``Tensor.to``,
  ``Tensor.cuda`` and ``Tensor.type`` as the device;
* the functions of ``torch.cuda`` that megatron-core calls, and that no mode can see, are the device's own.

On CUDA it does nothing. It runs on CPU in our tests; on NPU the same code path applies with
``torch.npu``'s functions, not run on a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from torch.overrides import TorchFunctionMode

# Megatron compares the name of a gradient's type with these.
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
_FACTORIES = frozenset({
    torch.arange, torch.as_tensor, torch.empty, torch.empty_like, torch.empty_strided, torch.eye, torch.full,
    torch.full_like, torch.linspace, torch.ones, torch.ones_like, torch.rand, torch.randint, torch.randn,
    torch.tensor, torch.zeros, torch.zeros_like, torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.to,
})  # fmt: skip
_BACKWARD = frozenset({torch.Tensor.backward, torch.autograd.backward})


@contextlib.contextmanager
def mcore_on(device: torch.device) -> Iterator[None]:
    """Run megatron-core on `device` inside the ``with``. Building, stepping and saving belong inside."""
    if device.type == "cuda":
        yield
        return
    names = _cpu_names() if device.type == "cpu" else _device_names(torch.get_device_module(device))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(torch.cuda, names))
        stack.enter_context(_replaced(torch.cuda.random, {"get_rng_state": names["get_rng_state"]}))
        # It imported this one by name.
        stack.enter_context(_replaced(megatron_random, {"_lazy_call": names["_lazy_call"]}))
        stack.enter_context(_CudaMeans(device))
        yield


class _CudaMeans(TorchFunctionMode):
    """Reads ``cuda`` as another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _BACKWARD:
            # A mode is off inside its own handler; without this it would be off for the whole backward pass.
            with self:
                return _run_backward(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func in _FACTORIES:
            args, kwargs = self._redirected(func, args, kwargs)
        return func(*args, **kwargs)

    def _redirected(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = self.device
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], self.device, *args[2:])
        return args, kwargs


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _run_backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False, **_: Any
) -> None:
    """What ``torch.autograd.backward`` does, without its torch-function hook."""
    roots = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    given = grad_tensors if isinstance(grad_tensors, (tuple, list)) else (grad_tensors,) * len(roots)
    gradients = tuple(torch.ones_like(r) if g is None else g for r, g in zip(roots, given, strict=True))
    torch.autograd.Variable._execution_engine.run_backward(
        roots, gradients, bool(retain_graph), create_graph, (), allow_unreachable=True, accumulate_grad=True
    )


@contextlib.contextmanager
def _replaced(module: ModuleType, names: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


class _NoStream:
    """A stream on a device that has none."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _nothing(self, *_: Any) -> None: ...

    wait_stream = wait_event = record_event = synchronize = _nothing


def _cpu_names() -> dict[str, Any]:
    """``torch.cuda`` for a CPU: one device, one generator, no streams."""

    def nothing(*_: Any, **__: Any) -> None: ...

    return {
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": nothing,
        "synchronize": nothing,
        "Stream": _NoStream,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "stream": lambda _: contextlib.nullcontext(),
        "get_rng_state": lambda *_, **__: torch.default_generator.get_state(),
        "set_rng_state": lambda state, *_, **__: torch.default_generator.set_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "default_generators": (torch.default_generator,),
        "_lazy_init": nothing,
        "_lazy_call": lambda call, **_: call(),
    }


def _device_names(module: ModuleType) -> dict[str, Any]:
    """The same names, as another accelerator's own module has them."""
    module.init()  # before it, there are no generators
    return {name: getattr(module, name) for name in _cpu_names() if hasattr(module, name)} | {
        "_lazy_call": lambda call, **_: call()
    }
