"""``base + update · factor`` on CUDA: one read of each tensor, one write."""

# ruff: noqa: ANN001, ANN202 (Triton takes annotations of a kernel for its own types)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dit_fused_ops.pointwise.backends import as_LSH
from dit_fused_ops.pointwise.call import MultiplyAddCall

_BLOCK = 2048  # columns of one program at most


def warps(numbers: int) -> int:
    """Return the warps of a program that works on so many numbers: eight of them a thread."""
    return min(16, max(1, numbers // 256))


@triton.jit
def _multiply_add_kernel(
    out, base, update, factor, base_l, base_s, base_h, factor_l, factor_s, factor_h, rows, columns,
    PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One flat grid: its other axes are short.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    row = program // blocks
    sample, token = row // rows, row % rows
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    a = tl.load(base + sample * base_l + token * base_s + column * base_h, mask=inside).to(tl.float32)
    b = tl.load(update + row * columns + column, mask=inside).to(tl.float32)
    c = tl.load(factor + sample * factor_l + token * factor_s + column * factor_h, mask=inside).to(tl.float32)
    if PLUS_ONE:
        c += 1.0
    tl.store(out + row * columns + column, (a + b * c).to(out.dtype.element_ty), mask=inside)


def _launch(call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty(call.shape, dtype=call.dtype, device=call.device)
    base_LSH, factor_LSH = (as_LSH(tensor, call.shape) for tensor in (base, factor))
    samples, rows, columns = base_LSH.shape
    block = min(_BLOCK, triton.next_power_of_2(max(1, columns)))
    if out.numel():
        with torch.cuda.device_of(out):
            _multiply_add_kernel[(samples * rows * triton.cdiv(columns, block),)](
                out, base_LSH, update.contiguous(), factor_LSH, *base_LSH.stride(), *factor_LSH.stride(), rows, columns,
                PLUS_ONE=call.plus_one, BLOCK=block, num_warps=warps(block),
            )  # fmt: skip
    return out


class _MultiplyAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(base, update, factor)
        return _launch(call, base, update, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        base, update, factor = ctx.saved_tensors
        gradient = gradient.float()
        slope = factor.float() + 1 if ctx.call.plus_one else factor.float()
        gradients = (lambda: gradient, lambda: gradient * slope, lambda: gradient * update.float())
        return None, *(
            compute().sum_to_size(tensor.shape).to(tensor.dtype) if needed else None
            for compute, tensor, needed in zip(gradients, (base, update, factor), ctx.needs_input_grad[1:], strict=True)
        )


def multiply_add(call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Tensor:
    """Launch the kernel; the gradient is plain torch in float32."""
    if not call.needs_grad:
        return _launch(call, base, update, factor)
    result: Tensor = _MultiplyAdd.apply(call, base, update, factor)
    return result
