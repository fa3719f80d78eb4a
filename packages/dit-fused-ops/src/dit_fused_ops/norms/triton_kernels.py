"""Residual, gate, norm and modulation on CUDA: one program a row, one read of each tensor, one write of each result."""

# ruff: noqa: ANN001, ANN202 (Triton takes annotations of a kernel for its own types)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dit_fused_ops.norms.call import NormCall
from dit_fused_ops.norms.parts import Parts, Run, per_token
from dit_fused_ops.pointwise.triton_kernels import warps


@triton.jit
def _row(tensor, sample, token, along_sample, along_token, column, inside):
    """The vector of a token, or of its sample where the stride along the tokens is 0."""
    return tl.load(tensor + sample * along_sample + token * along_token + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm_kernel(
    normed, residual, x, y, weight, bias, gate, scale, shift,
    gate_b, gate_s, scale_b, scale_s, shift_b, shift_s, tokens, hidden, eps,
    IS_RMS: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    here = row * hidden + column
    value = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        update = tl.load(y + here, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            update *= _row(gate, sample, token, gate_b, gate_s, column, inside)
        rounded = (value + update).to(residual.dtype.element_ty)
        tl.store(residual + here, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if not IS_RMS:
        value = tl.where(inside, value - tl.sum(value, 0) / hidden, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / hidden + eps)
    if HAS_WEIGHT:
        value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if IS_MODULATED:
        value *= 1.0 + _row(scale, sample, token, scale_b, scale_s, column, inside)
        value += _row(shift, sample, token, shift_b, shift_s, column, inside)
    tl.store(normed + here, value.to(normed.dtype.element_ty), mask=inside)


def _launch(call: NormCall, parts: Parts) -> tuple[Tensor, ...]:
    x = parts.x.contiguous()
    normed = torch.empty_like(x)
    residual = torch.empty_like(x) if call.residual else x
    y = parts.y.contiguous() if parts.y is not None else x
    weight, bias = (x if tensor is None else tensor.contiguous() for tensor in (parts.weight, parts.bias))
    vectors = [_vector(tensor, x) for tensor in (parts.gate, parts.scale, parts.shift)]
    strides = (
        [stride for vector in vectors for stride in vector.stride()[:2]] if call.features - {call.kind} else [0] * 6
    )
    samples, tokens, hidden = call.shape_BSH
    block = triton.next_power_of_2(max(1, hidden))
    if x.numel():
        with torch.cuda.device_of(x):
            _norm_kernel[(samples * tokens,)](
                normed, residual, x, y, weight, bias, *vectors, *strides, tokens, hidden, call.eps,
                IS_RMS=call.kind == "rms", HAS_UPDATE=parts.y is not None, HAS_GATE=parts.gate is not None,
                HAS_WEIGHT=parts.weight is not None, HAS_BIAS=parts.bias is not None,
                IS_MODULATED=call.modulation != "", BLOCK=block, num_warps=warps(block),
            )  # fmt: skip
    return (residual, normed) if call.residual else (normed,)


def _vector(tensor: Tensor | None, x: Tensor) -> Tensor:
    """Expand [B, H], [B, 1, H] or [B, S, H] to the shape of x with strides of 0; x itself stands in for none."""
    tensor = per_token(tensor)
    if tensor is None:
        return x
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).expand(x.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: NormCall, again: Run, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.call, ctx.again = call, again
        ctx.save_for_backward(*tensors)
        return _launch(call, Parts(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            outputs = ctx.again(ctx.call, *leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # The new residual has no gradient where only what comes after it is trained.
        paths = [each for each in zip(outputs, gradients, strict=True) if each[0].requires_grad]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if leaf is not None and need]
        found = iter(torch.autograd.grad([out for out, _ in paths], wanted, [slope for _, slope in paths]))
        return None, None, *(next(found) if need else None for need in needed)


def norm(call: NormCall, again: Run, *tensors: Any) -> Any:
    """Launch the kernel; the gradient is that of `again`, the same call in torch, computed from the inputs."""
    if call.needs_grad:
        results: tuple[Tensor, ...] = _Norm.apply(call, again, *tensors)
    else:
        results = _launch(call, Parts(*tensors))
    return results if call.residual else results[0]
