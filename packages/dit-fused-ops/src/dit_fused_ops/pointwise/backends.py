"""The ways to multiply and add. Each `run(call, base, update, factor)` returns a tensor of the call's shape and dtype.

Shape suffixes: L leading dimensions in one, S rows, H columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_fused_ops.dispatch import FLOATS, Backend, Call, Rule, compiled_backend
from dit_fused_ops.platform import op_missing, triton_missing
from dit_fused_ops.pointwise.call import MultiplyAddCall
from dit_fused_ops.pointwise.reference import multiply_add_naive

TILE = 1 << 17  # numbers that are worked on at a time: the float32 of all steps stays in a cache of 2 MiB


def _naive(call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Tensor:
    """`multiply_add_naive` in the dtype of the call."""
    return multiply_add_naive(base, update, factor, call.plus_one).to(call.dtype)


def rounds_once(call: Call, *tensors: Tensor | None) -> bool:
    """Whether torch's own ``x + y · z`` of these tensors is computed in float32, or wider, and rounded once.

    So it is on CPU and CUDA where all have one dtype. The gradient is another matter: its products are rounded.
    """
    alike = all(tensor is None or tensor.dtype == call.dtype for tensor in tensors)
    return alike and not call.needs_grad and call.device.type in ("cpu", "cuda")


def _addcmul(call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Tensor:
    if not call.plus_one and rounds_once(call, base, update, factor):
        return torch.addcmul(base, update, factor)
    base, update, factor = (tensor.to(call.compute_dtype) for tensor in (base, update, factor))
    return torch.addcmul(base, update, 1 + factor if call.plus_one else factor).to(call.dtype)


def tiles(rows: int, columns: int) -> Iterator[slice]:
    """Cut `rows` so that one cut of `columns` each holds about `TILE` numbers for every thread of torch."""
    step = max(1, TILE * torch.get_num_threads() // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def as_LSH(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Expand the tensor to `shape`, and put all but the last two dimensions into one; a view up to three of them."""
    tensor = tensor.expand(shape)
    while tensor.dim() < 3:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -3)


def _tiled(call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty(call.shape, dtype=call.dtype, device=call.device)
    tensors_LSH = [as_LSH(tensor, call.shape) for tensor in (base, update, factor)]
    out_LSH = as_LSH(out, call.shape)
    for sample, destination in enumerate(out_LSH):
        for rows in tiles(*destination.shape):
            destination[rows] = _addcmul(call, *(tensor[sample, rows] for tensor in tensors_LSH))
    return out


def _triton(call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Tensor:
    from dit_fused_ops.pointwise.triton_kernels import multiply_add

    return multiply_add(call, base, update, factor)


def _mindiesd(call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Tensor:
    gated: Tensor = torch.ops.mindiesd.residual_gate_add(base, update, factor)
    return gated.to(call.dtype)


BACKENDS: tuple[Backend[MultiplyAddCall], ...] = (
    Backend(
        name="mindiesd",
        run=_mindiesd,
        devices=frozenset({"npu"}),
        dtypes=FLOATS - {torch.float64},
        rules=(
            Rule(lambda call: not call.plus_one, "it computes x + y * gate, not x * (1 + scale) + shift"),
            Rule(lambda call: len(call.shape) == 3, "x must be [B, S, H]"),
            Rule(lambda call: len(call.factor_shape) > 0, "one number for all is not what it takes"),
        ),
        missing=op_missing("mindiesd", "residual_gate_add"),
        differentiable=False,
        traceable=False,
    ),
    Backend(
        name="triton",
        run=_triton,
        devices=frozenset({"cuda"}),
        dtypes=FLOATS - {torch.float64},
        rules=(Rule(lambda call: call.compute_dtype == torch.float32, "no tensor may be float64"),),
        missing=triton_missing,
        traceable=False,
        note="its gradient is plain torch",
    ),
    Backend(
        name="tiled",
        run=_tiled,
        devices=frozenset({"cpu"}),
        rules=(
            Rule(
                lambda call: len(set(call.dtypes)) > 1 or (call.plus_one and call.dtype != call.compute_dtype),
                "one pass of addcmul is as good where all tensors have one dtype",
            ),
        ),
        differentiable=False,
        traceable=False,
    ),
    Backend(name="addcmul", run=_addcmul),
    compiled_backend(_naive),
    Backend(name="naive", run=_naive, note="the reference, in float32"),
)
