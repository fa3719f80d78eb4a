"""Norm, gated activation and rotary embedding: by the device's fused operator, or in as few passes as possible.

Each function looks its device up in a table. What is not named there takes the way that every device can go: forward
and backward written out, which reads and writes memory about half as often as what autograd would make of the formula.

Shape suffixes: T tokens, N heads, D head dimension, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x²) + eps)`` over the last dimension, in float32 inside; ``[..., H]`` and ``[H]``."""
    return NORMS.get(x.device.type, _written_norm)(x, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """``silu(first half) * second half`` of the last dimension."""
    return GATES.get(x.device.type, _written_swiglu)(x)


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, the activation of Qwen2-VL's tower (arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


def rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """``x * cos + (-second half, first half) * sin``: the rotary embedding of Qwen.

    Args:
        x_TND: queries or keys.
        cos_TD: its second half is its first one once more; no gradient.
        sin_TD: the same.
    """
    return ROTATIONS.get(x_TND.device.type, _written_rotate)(x_TND, cos_TD, sin_TD)


def _torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _written_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed: Tensor = _Norm.apply(x, weight, eps)
    return normed


def _npu_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The operator also gives the reciprocal root, which only its backward pass needs."""
    normed: Tensor = torch.ops.npu.npu_rms_norm(x, weight, eps)[0]
    return normed


def _written_swiglu(x: Tensor) -> Tensor:
    gated: Tensor = _Swiglu.apply(x)
    return gated


def _npu_swiglu(x: Tensor) -> Tensor:
    gated: Tensor = torch.ops.npu.npu_swiglu(x, -1)
    return gated


def _written_rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    rotated: Tensor = _Rotation.apply(x_TND, cos_TD, sin_TD)
    return rotated


def _npu_rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """As a batch of 1 in its layout BSND: batch and heads must stay below 1000, tokens need not."""
    tables = (table_TD.to(x_TND.dtype)[None, :, None] for table_TD in (cos_TD, sin_TD))
    rotated: Tensor = torch.ops.npu.npu_rotary_mul(x_TND[None], *tables, "half")
    return rotated[0]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        size = x.shape[-1]
        root = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(size)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        normed: Tensor = (wide * root).mul_(weight).to(x.dtype)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, root = ctx.saved_tensors
        normed, grad = x.float() * root, grad.float()
        weight_grad = None
        if ctx.needs_input_grad[1]:
            product = grad * normed
            weight_grad = product.flatten(0, -2).sum(0).to(weight.dtype)
            along = (product @ weight.float())[..., None]
        else:
            along = torch.linalg.vecdot(grad * weight, normed)[..., None]
        # The part of the gradient that would change the length, which the norm takes away, goes out.
        x_grad = (grad * weight).addcmul_(normed, along, value=-1 / x.shape[-1]).mul_(root)
        return x_grad.to(x.dtype), weight_grad, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, -1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, -1)
        x_grad = torch.empty_like(x)
        gate_grad, value_grad = x_grad.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=value_grad)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=gate_grad)
        return x_grad


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _turned(x_TND, cos_TD, sin_TD, 1)

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor | None, ...]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _turned(grad_TND, cos_TD, sin_TD, -1), None, None


def _turned(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: int) -> Tensor:
    half = x_TND.shape[-1] // 2
    cos, sin = (table_TD[:, None, :half].to(x_TND.dtype) for table_TD in (cos_TD, sin_TD))
    out_TND = torch.empty(x_TND.shape, dtype=x_TND.dtype, device=x_TND.device)
    for out, near, far, direction in zip(
        out_TND.chunk(2, -1), x_TND.chunk(2, -1), reversed(x_TND.chunk(2, -1)), (-sign, sign), strict=True
    ):
        torch.mul(near, cos, out=out).addcmul_(far, sin, value=direction)
    return out_TND


# torch has a fused norm on CUDA alone.
NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"npu": _npu_norm, "cuda": _torch_norm}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"npu": _npu_swiglu}
ROTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"npu": _npu_rotate}
