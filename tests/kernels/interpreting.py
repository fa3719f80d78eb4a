"""Run the Triton backend of an op on CPU tensors, and compare it with the reference of the op, gradients included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.dispatch import Op
from dit_fused_ops.dispatch.search import relative_error

# A result differs from the float32 reference by its own rounding, half a unit in the last place, and by the order of
# float32 sums. A new residual that is rounded the other way on a tie moves its norm by one unit more. Relative to the
# largest number.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# A gradient is a sum over rows of numbers that were rounded once on the way in.
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def outputs(op: Op[Any], name: str, tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What the named backend returns, as a tuple."""
    given = tuple(tensors)
    backend = op.backend(name)
    assert backend is not None
    result = backend.run(op.describe(given, options), *given)
    return result if isinstance(result, tuple) else (result,)


def check(op: Op[Any], tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> None:
    """Hold the kernel against the reference in float32: values, shapes, dtypes."""
    got = outputs(op, "triton", tensors, options)
    wanted = outputs(op, "naive", tensors, options)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert relative_error(one, other.float()) <= TOLERANCE[one.dtype]


def check_gradients(op: Op[Any], tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> None:
    """Hold every gradient of the kernel against that of the reference, for one random gradient of the outputs."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(each.shape, generator=generator) for each in outputs(op, "naive", tensors, options)]
    found = [_gradients(op, name, tensors, options, weights) for name in ("triton", "naive")]
    for got, wanted in zip(*found, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert relative_error(got, wanted.float()) <= GRADIENT_TOLERANCE[got.dtype]


def _gradients(
    op: Op[Any], name: str, tensors: Sequence[Tensor | None], options: tuple[Any, ...], weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    results = outputs(op, name, leaves, options)
    total = torch.stack([(one.float() * weight).sum() for one, weight in zip(results, weights, strict=True)]).sum()
    return torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad])
