"""Rotation on CUDA: one program rotates the heads of one token, so that its row of the tables is read once.

Shape suffixes: B batch, S tokens, N heads, D channels of a head, P pairs of channels that turn.
"""

# ruff: noqa: ANN001, ANN202 (Triton takes annotations of a kernel for its own types)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dit_fused_ops.rope.call import RopeCall

_TILE = 1 << 12  # numbers of one program at most


@triton.jit
def _rotate_kernel(
    out, x, cos, sin,
    out_b, out_s, out_n, x_b, x_s, x_n, cos_b, cos_s, cos_n, cos_d, sin_b, sin_s, sin_n, sin_d,
    tokens, heads, pairs, channels,
    INTERLEAVED: tl.constexpr, HALF_WIDTH: tl.constexpr, BACKWARDS: tl.constexpr, HAS_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // tokens, row % tokens
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    inside = (n < heads) & (p < pairs)
    # The channels of pair p, and its columns in the tables.
    first = 2 * p if INTERLEAVED else p
    second = first + 1 if INTERLEAVED else p + pairs
    first_column = p if HALF_WIDTH else first
    second_column = p if HALF_WIDTH else second

    from_x = x + b * x_b + s * x_s + n * x_n
    to_out = out + b * out_b + s * out_s + n * out_n
    turning = tl.arange(0, 2 * BLOCK_P)[None, :]
    inside_both = (n < heads) & (turning < 2 * pairs)
    if INTERLEAVED:  # neighbours are read and written in one go: every second channel alone would be slow
        both = tl.load(from_x + turning, mask=inside_both, other=0.0).to(tl.float32)
        a, c = tl.split(tl.reshape(both, (BLOCK_N, BLOCK_P, 2)))
    else:
        a = tl.load(from_x + first, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(from_x + second, mask=inside, other=0.0).to(tl.float32)
    from_cos = cos + b * cos_b + s * cos_s + n * cos_n
    from_sin = sin + b * sin_b + s * sin_s + n * sin_n
    cos_a = tl.load(from_cos + first_column * cos_d, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(from_sin + first_column * sin_d, mask=inside, other=0.0).to(tl.float32)
    cos_c = cos_a if HALF_WIDTH else tl.load(from_cos + second_column * cos_d, mask=inside, other=0.0).to(tl.float32)
    sin_c = sin_a if HALF_WIDTH else tl.load(from_sin + second_column * sin_d, mask=inside, other=0.0).to(tl.float32)
    if BACKWARDS:  # the transposed matrix: sines change sign, and place
        turned_a = a * cos_a + c * sin_c
        turned_c = c * cos_c - a * sin_a
    else:
        turned_a = a * cos_a - c * sin_a
        turned_c = c * cos_c + a * sin_c
    if INTERLEAVED:
        turned = tl.reshape(tl.join(turned_a, turned_c), (BLOCK_N, 2 * BLOCK_P))
        tl.store(to_out + turning, turned.to(out.dtype.element_ty), mask=inside_both)
    else:
        tl.store(to_out + first, turned_a.to(out.dtype.element_ty), mask=inside)
        tl.store(to_out + second, turned_c.to(out.dtype.element_ty), mask=inside)

    if HAS_REST:
        d = 2 * pairs + tl.arange(0, BLOCK_D)[None, :]
        inside = (n < heads) & (d < channels)
        tl.store(to_out + d, tl.load(from_x + d, mask=inside), mask=inside)


def _launch(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor, *, backwards: bool) -> Tensor:
    axes = [call.layout.index(axis) for axis in "BSN"]
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, tokens, heads = (x.shape[axis] for axis in axes)
    tables = [t.reshape(call.table_shape).expand(*x.shape[:-1], -1) for t in (cos, sin)]
    pairs, channels = call.rotary_dim // 2, x.shape[-1]
    block_p = triton.next_power_of_2(pairs)
    block_d = triton.next_power_of_2(max(1, channels - 2 * pairs))
    block_n = min(triton.next_power_of_2(heads), max(1, _TILE // max(2 * block_p, block_d)))
    strides = [t.stride(axis) for t in (out, x) for axis in axes] + [t.stride(a) for t in tables for a in (*axes, 3)]
    if x.numel():
        with torch.cuda.device_of(x):
            _rotate_kernel[(batch * tokens, triton.cdiv(heads, block_n))](
                out, x, *tables, *strides, tokens, heads, pairs, channels,
                INTERLEAVED=call.mode == "rotated_interleaved", HALF_WIDTH=call.half_width, BACKWARDS=backwards,
                HAS_REST=channels > 2 * pairs, BLOCK_N=block_n, BLOCK_P=block_p,
                BLOCK_D=block_d, num_warps=min(8, max(1, block_n * block_p // 256)),
            )  # fmt: skip
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(cos, sin)
        return _launch(call, x, cos, sin, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        return None, _launch(ctx.call, gradient, *ctx.saved_tensors, backwards=True), None, None


def rotate(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Launch the kernel; the gradient is the rotation back, by the same kernel. The tables have none."""
    if not call.needs_grad:
        return _launch(call, x, cos, sin, backwards=False)
    result: Tensor = _Rotate.apply(call, x, cos, sin)
    return result
