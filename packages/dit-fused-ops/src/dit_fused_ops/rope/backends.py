"""The ways to rotate. Each `run(call, x, cos, sin)` returns a tensor of the shape and dtype of x.

Shape suffixes: as in `reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dit_fused_ops.dispatch import FLOATS, Backend, Rule, compiled_backend
from dit_fused_ops.platform import op_missing, triton_missing
from dit_fused_ops.rope.call import RopeCall
from dit_fused_ops.rope.reference import full_width, rotary_naive, rotate_pairs

Rotate = Callable[[RopeCall, Tensor, Tensor, Tensor], Tensor]

_TORCH_FEATURES = frozenset({"partial", "gradient of the tables"})


def _naive(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary_naive` with the tables of a call."""
    cos, sin = (wide_table(call, table) for table in (cos, sin))
    return rotary_naive(x, cos, sin, call.mode).to(call.dtype)


def wide_table(call: RopeCall, table: Tensor) -> Tensor:
    """The table in four dimensions and full width."""
    table = table.reshape(call.table_shape)
    return full_width(table, call.mode) if call.half_width else table


def pair_columns(call: RopeCall, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The columns of the first and of the second channel of each pair, in four dimensions."""
    table = table.reshape(call.table_shape).to(dtype)
    if call.half_width:
        return table, table
    if call.mode == "rotated_half":
        first, second = table.chunk(2, dim=-1)
        return first, second
    return table[..., 0::2], table[..., 1::2]


def _of_the_turning_channels(rotate: Rotate) -> Rotate:
    """Let `rotate` see the channels that turn, in the dtype of the computation, and put the result together."""

    @functools.wraps(rotate)
    def run(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = rotate(call, x[..., : call.rotary_dim].to(call.compute_dtype), cos, sin).to(call.dtype)
        return turned if call.rotary_dim == x.shape[-1] else torch.cat((turned, x[..., call.rotary_dim :]), dim=-1)

    return run


@_of_the_turning_channels
def _eager(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * wide_table(call, cos) + rotate_pairs(x, call.mode) * wide_table(call, sin)


@_of_the_turning_channels
def _split(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (cos_a, cos_b), (sin_a, sin_b) = (pair_columns(call, table, x.dtype) for table in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((torch.addcmul(a * cos_a, b, sin_a, value=-1), torch.addcmul(b * cos_b, a, sin_b)), dim=-1)


def _complex(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Full-width tables may hold other numbers at the second channel of a pair; looking costs little on a CPU.
    if call.half_width or all(torch.equal(*pair_columns(call, table, table.dtype)) for table in (cos, sin)):
        return _multiplied(call, x, cos, sin)
    return _eager(call, x, cos, sin)


@_of_the_turning_channels
def _multiplied(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turns = torch.complex(*(pair_columns(call, table, x.dtype)[0] for table in (cos, sin)))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def _triton(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from dit_fused_ops.rope.triton_kernels import rotate

    return rotate(call, x, cos, sin)


def _npu_rotary_mul(call: RopeCall, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # The vendor's op wants one dtype; where there are two, float32 holds both.
    dtype = call.dtype if call.dtype == call.table_dtype else torch.float32
    cos, sin = (wide_table(call, table).to(dtype) for table in (cos, sin))
    mode = "half" if call.mode == "rotated_half" else "interleave"
    turned: Tensor = torch.ops.npu.npu_rotary_mul(x.to(dtype), cos, sin, mode)
    return turned.to(call.dtype)


def _npu_rows_fit(call: RopeCall) -> bool:
    """B and N under 1000 in mode half, B · N under 1000 in mode interleave."""
    b, n = (call.x_shape[call.layout.index(axis)] for axis in "BN")
    return max(b, n) < 1000 if call.mode == "rotated_half" else b * n < 1000


def _npu_tables_fit(call: RopeCall) -> bool:
    """In mode interleave the tables stand along the tokens only."""
    return call.mode == "rotated_half" or all(
        size == 1 for size, axis in zip(call.table_shape, call.layout, strict=False) if axis in "BN"
    )


BACKENDS: tuple[Backend[RopeCall], ...] = (
    Backend(
        name="npu_rotary_mul",
        run=_npu_rotary_mul,
        devices=frozenset({"npu"}),
        dtypes=FLOATS - {torch.float64},
        rules=(
            Rule(lambda call: call.x_shape[3] % 2 == 0 and call.x_shape[3] < 896, "the head dim must be under 896"),
            Rule(_npu_rows_fit, "B and N must be under 1000 (B·N in mode rotated_interleaved)"),
            Rule(_npu_tables_fit, "in mode rotated_interleaved the tables must be 1 wide in B and N"),
            Rule(lambda call: call.table_dtype != torch.float64, "the tables must not be float64"),
        ),
        missing=op_missing("npu", "npu_rotary_mul"),
    ),
    Backend(
        name="triton",
        run=_triton,
        devices=frozenset({"cuda"}),
        dtypes=FLOATS - {torch.float64},
        honours=frozenset({"partial"}),
        rules=(
            Rule(lambda call: call.table_dtype != torch.float64, "the tables must not be float64"),
            Rule(lambda call: call.x_shape[3] <= 1 << 12, "the head dim must be at most 4096"),
        ),
        missing=triton_missing,
        traceable=False,
    ),
    Backend(
        name="complex",
        run=_complex,
        devices=frozenset({"cpu", "cuda"}),
        honours=_TORCH_FEATURES,
        rules=(
            Rule(lambda call: call.mode == "rotated_interleaved", "neighbouring channels must be the pairs"),
            Rule(
                lambda call: call.half_width or not (call.table_grad or call.device.type == "cuda"),
                "the tables must have one column a pair where they need a gradient, and on cuda",
            ),
        ),
        traceable=False,  # inductor has no complex arithmetic
    ),
    Backend(
        name="split",
        run=_split,
        honours=_TORCH_FEATURES,
        rules=(Rule(lambda call: call.mode == "rotated_half", "the halves of a head must be the pairs"),),
    ),
    Backend(name="eager", run=_eager, honours=_TORCH_FEATURES),
    compiled_backend(_naive, honours=_TORCH_FEATURES),
    Backend(name="naive", run=_naive, honours=_TORCH_FEATURES, note="the reference, in float32"),
)
