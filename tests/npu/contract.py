"""What is asked of an NPU backend of an op: it holds on fake npu tensors, and its numbers are those of the reference.

A case is one call of a public function. `shapes_hold` runs the backend on fake `npu:0` tensors: the operators that it
names exist, take these arguments, and the vendor's shape functions lead to the right shape, backward too.
`numbers_hold` runs the same code on CPU tensors through `semantics` and compares with the op's own reference, the last
of its backends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from dit_fused_ops.dispatch import Backend, Dispatcher, Op
from npu.fake_npu import on_npu, shapes

Tensors = tuple[Tensor | None, ...]

# Both sides compute in float32 and round once to the dtype of the result: they differ by a few float32 roundings
# (sums of some hundred terms), or by two units in the last place of the half, of numbers of size 1.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, eq=False)
class Case:
    """What a public function asks the dispatcher for.

    Attributes:
        name: in the names of tests.
        op: from the table.
        tensors: of the op, on the CPU.
        options: the other arguments of the op.
        handed_to: a backend that gets the case although it would leave it to another one: a matter of speed alone.
    """

    name: str
    op: Op[Any]
    tensors: Tensors
    options: tuple[Any, ...]
    handed_to: str = ""

    def __str__(self) -> str:
        return self.name


class _Asked(Exception):
    pass


def case(name: str, call: Callable[[], object], handed_to: str = "") -> Case:
    """The case of a call of a public function with CPU tensors."""

    def asked(_: Dispatcher, op: Op[Any], tensors: Tensors, options: tuple[Any, ...], **how: Any) -> None:
        raise _Asked(op, tensors, options)

    with patch.object(Dispatcher, "__call__", asked):
        try:
            call()
        except _Asked as found:
            op, tensors, options = found.args
            return Case(f"{op.name}-{name}", op, tensors, options, handed_to)
    raise AssertionError(f"{name} asks the dispatcher for nothing")


def npu_backends(op: Op[Any]) -> list[Backend[Any]]:
    """Those that run on NPUs alone."""
    return [backend for backend in op.backends if backend.devices == frozenset({"npu"})]


def accepted(case: Case, backend: Backend[Any]) -> bool:
    """Whether the backend is to carry out the case."""
    if case.handed_to:
        return case.handed_to == backend.name
    with FakeTensorMode():
        return backend.refuses(case.op.describe(on_npu(case.tensors), case.options)) is None


def shapes_hold(case: Case, backend: Backend[Any]) -> None:
    """Assert that the backend runs on fake npu tensors and leads to the shapes of the reference, backward too."""
    wanted = [shapes(each) for each in reference_results(case)]
    with FakeTensorMode():
        tensors = on_npu(case.tensors)
        outputs = _run(case, backend, tensors)
        assert [shapes(each) for each in outputs] == wanted
        assert all(each.device.type == "npu" for each in outputs)
        leaves = _with_gradient(tensors)
        if leaves and backend.differentiable:
            roots = _with_gradient(tuple(outputs))
            grads = torch.autograd.grad(roots, leaves, [torch.empty_like(each) for each in roots])
            assert shapes(grads) == shapes(tuple(leaves))


def numbers_hold(case: Case, backend: Backend[Any]) -> None:
    """Assert that results and gradients through the vendor's formulas are those of the reference; in `installed()`."""
    ours = _results(case, backend, backend.differentiable)
    reference = reference_results(case, differentiable=backend.differentiable)
    assert len(ours) == len(reference)
    tolerance = max(TOLERANCE[each.dtype] for each in case.tensors if each is not None and each.dtype in TOLERANCE)
    for got, wanted in zip(ours, reference, strict=True):
        # A gradient of what was broadcast is a sum of rounded terms, whose errors add up like a random walk.
        terms = max(1, reference[0].numel() // wanted.numel())
        greatest = float(wanted.detach().float().abs().nan_to_num(posinf=0, neginf=0).max())
        allowed = max(1.0, greatest) * terms**0.5 * tolerance
        torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=allowed)
        assert got.dtype == wanted.dtype


@functools.cache
def reference_results(case: Case, *, differentiable: bool = False) -> list[Tensor]:
    """The outputs of the op's reference, with `differentiable` their gradients too."""
    return _results(case, case.op.backends[-1], differentiable)


def _run(case: Case, backend: Backend[Any], tensors: Tensors) -> list[Tensor]:
    output = backend.run(case.op.describe(tensors, case.options), *tensors)
    return [each for each in tree_leaves(output) if isinstance(each, Tensor)]


def _with_gradient(tensors: Tensors) -> list[Tensor]:
    return [each for each in tensors if each is not None and each.requires_grad]


def _results(case: Case, backend: Backend[Any], differentiable: bool) -> list[Tensor]:
    """All outputs, and their gradients together."""
    outputs, leaves = _run(case, backend, case.tensors), _with_gradient(case.tensors)
    if not leaves or not differentiable:
        return outputs
    weights = [torch.linspace(-1, 1, each.numel()).reshape(each.shape).to(each.dtype) for each in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]
