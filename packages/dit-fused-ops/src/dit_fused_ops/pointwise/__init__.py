"""Gate, scale and shift of single numbers: the public functions, their references, their backends."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_fused_ops.arguments import require_tensor, require_type
from dit_fused_ops.dispatch import Op, Probe, dispatcher
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.pointwise.activation import ACTIVATION, gelu_naive, swiglu
from dit_fused_ops.pointwise.backends import BACKENDS
from dit_fused_ops.pointwise.call import MultiplyAddCall, describe
from dit_fused_ops.pointwise.reference import (
    multiply_add_naive,
    residual_gate_add_naive,
    scale_shift_naive,
    swiglu_naive,
)

__all__ = [
    "residual_gate_add",
    "scale_shift",
    "gather_residual_gate",
    "gather_scale_shift",
    "muls_add",
    "swiglu",
    "residual_gate_add_naive",
    "scale_shift_naive",
    "swiglu_naive",
    "gelu_naive",
    "MULTIPLY_ADD",
    "ACTIVATION",
]

_PROBED_ROWS = 64  # compared with the reference before a backend may win


def residual_gate_add(
    x: Tensor, y: Tensor, gate: Tensor, *, opt_mode: str | None = None, backend: str | None = None
) -> Tensor:
    """Return ``x + y · gate``, computed in float32 or wider: shape and dtype are those of `x`.

    Args:
        x: the residual, [..., H].
        y: what is added to it, of the same shape; its dtype may differ.
        gate: broadcasts to `x`: [B, 1, H], [B, S, H], [H].
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Raises:
        ParametersInvalid: the shapes do not fit, or the tensors are on several devices.
        BackendRefused: `backend` cannot carry out this call.
    """
    result: Tensor = dispatcher(MULTIPLY_ADD, (x, y, gate), (False,), mode=opt_mode, named=backend)
    return result


def scale_shift(
    x: Tensor, scale: Tensor, shift: Tensor, *, opt_mode: str | None = None, backend: str | None = None
) -> Tensor:
    """Return ``x · (1 + scale) + shift``, computed in float32 or wider: shape and dtype are those of `x`.

    Args:
        x: [..., H].
        scale: broadcasts to `x`: [B, 1, H], [B, S, H], [H].
        shift: the same.
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Raises:
        ParametersInvalid: the shapes do not fit, or the tensors are on several devices.
        BackendRefused: `backend` cannot carry out this call.
    """
    result: Tensor = dispatcher(MULTIPLY_ADD, (shift, x, scale), (True,), mode=opt_mode, named=backend)
    return result


def gather_residual_gate(residual: Tensor, value: Tensor, gate_table: Tensor, indices: Tensor) -> Tensor:
    """Return ``residual + value · gate_table[indices]``: each token has its gate from a small table.

    Args:
        residual: [B, S, H].
        value: [B, S, H].
        gate_table: [M, H].
        indices: rows of the table, int32 or int64, [S] or [B, S].

    Raises:
        ParametersInvalid: the shapes do not fit, or the indices are no integers.
    """
    return residual_gate_add(residual, value, _rows_of(gate_table, indices, "gate_table"))


def gather_scale_shift(x: Tensor, scale_table: Tensor, shift_table: Tensor, indices: Tensor) -> Tensor:
    """Return ``x · (1 + scale_table[indices]) + shift_table[indices]``: each token has its own from small tables.

    Args:
        x: [B, S, H].
        scale_table: [M, H].
        shift_table: [M, H].
        indices: rows of the tables, int32 or int64, [S] or [B, S].

    Raises:
        ParametersInvalid: the shapes do not fit, or the indices are no integers.
    """
    scale = _rows_of(scale_table, indices, "scale_table")
    return scale_shift(x, scale, _rows_of(shift_table, indices, "shift_table"))


def muls_add(x: Tensor, y: Tensor, scale: float, *, opt_mode: str | None = None, backend: str | None = None) -> Tensor:
    """Return ``x · scale + y`` of two tensors of one shape, computed in float32 or wider, in the dtype of `y`.

    Args:
        x: of any shape.
        y: of the same shape.
        scale: one number.
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Raises:
        ParametersInvalid: the shapes differ, or `scale` is no number.
        BackendRefused: `backend` cannot carry out this call.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ParametersInvalid(
            f"scale must be a number, given {type(scale).__name__}; residual_gate_add takes tensors"
        )
    if require_tensor(x, "x").shape != require_tensor(y, "y").shape:
        raise ParametersInvalid(f"x and y must have one shape, given {list(x.shape)} and {list(y.shape)}")
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    factor = torch.full((), scale, dtype=dtype, device=x.device)
    result: Tensor = dispatcher(MULTIPLY_ADD, (y, x, factor), (False,), mode=opt_mode, named=backend)
    return result


def _rows_of(table: Tensor, indices: Tensor, name: str) -> Tensor:
    require_tensor(table, name)
    require_type(indices, "indices", Tensor)
    if table.dim() != 2:
        raise ParametersInvalid(f"{name} must be [M, H], given the shape {list(table.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ParametersInvalid(f"indices must be int32 or int64, given {indices.dtype}; convert them with .long()")
    return torch.nn.functional.embedding(indices, table)


def _probe(call: MultiplyAddCall, base: Tensor, update: Tensor, factor: Tensor) -> Probe:
    def some(tensor: Tensor) -> Tensor:
        rows = tensor.expand(call.shape)
        return rows.flatten(0, -2)[:_PROBED_ROWS] if rows.dim() > 1 else rows

    wanted = multiply_add_naive(some(base), some(update), some(factor), call.plus_one)
    return Probe(select=some, wanted=wanted)


MULTIPLY_ADD: Op[MultiplyAddCall] = Op(name="multiply_add", describe=describe, backends=BACKENDS, probe=_probe)
