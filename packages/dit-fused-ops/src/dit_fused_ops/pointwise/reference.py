"""What the pointwise ops are, in plain float32 torch (float64 stays): the truth that every backend is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def multiply_add_naive(base: Tensor, update: Tensor, factor: Tensor, plus_one: bool = False) -> Tensor:
    """Return ``base + update · factor``, or ``base + update · (1 + factor)`` with `plus_one`; shapes broadcast."""
    dtype = torch.float64 if torch.float64 in (base.dtype, update.dtype, factor.dtype) else torch.float32
    base, update, factor = (tensor.to(dtype) for tensor in (base, update, factor))
    return base + update * (1 + factor if plus_one else factor)


def residual_gate_add_naive(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return ``x + y · gate`` in float32: of x and y [..., H] and a gate that broadcasts to them."""
    return multiply_add_naive(x, y, gate)


def scale_shift_naive(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``x · (1 + scale) + shift`` in float32: of x [..., H] and scale and shift that broadcast to it."""
    return multiply_add_naive(shift, x, scale, plus_one=True)


def swiglu_naive(x: Tensor) -> Tensor:
    """Return ``hidden · silu(gate)`` in float32, [..., H], of x = [hidden | gate], [..., 2 H]."""
    hidden, gate = wide(x).chunk(2, dim=-1)
    return hidden * F.silu(gate)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 when it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
