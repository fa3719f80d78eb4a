"""The ways to normalise. Each `run(call, *Parts)` returns the normed tensor in the shape and dtype of x, and with an
update y the pair (new residual, normed).

Shape suffixes: B samples, S tokens, H channels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fused_ops.dispatch import FLOATS, Backend, Rule, compiled_backend
from dit_fused_ops.norms import npu
from dit_fused_ops.norms.call import NormCall
from dit_fused_ops.norms.parts import (
    Parts,
    cast,
    gated_sum,
    modulation,
    normed_input,
    per_token,
    with_surroundings,
)
from dit_fused_ops.norms.reference import norm_naive, residual_gate_norm_naive
from dit_fused_ops.platform import op_missing, triton_missing
from dit_fused_ops.pointwise.backends import tiles

FOLDED_SAMPLES = 8  # the most samples that are normed one after the other

_ALL = frozenset({"layer", "rms", "modulation", "residual"})
_AROUND_LAYER = _ALL - {"rms"}
_NARROW = FLOATS - {torch.float64}


def _naive(call: NormCall, *tensors: Any) -> Any:
    """The reference in the dtype of the call."""
    x, weight, bias, scale, shift, y, gate = Parts(*tensors)
    affine = (weight, bias, per_token(scale), per_token(shift))
    if y is None:
        return norm_naive(x, *affine, kind=call.kind, eps=call.eps).to(call.dtype)
    residual, normed = residual_gate_norm_naive(x, y, per_token(gate), *affine, kind=call.kind, eps=call.eps)
    return residual, normed.to(call.dtype)


@with_surroundings
def eager(call: NormCall, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Torch's own steps, in float32 or wider."""
    x = x.to(call.compute_dtype)
    weight, bias = cast(x.dtype, weight, bias)
    if call.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, call.eps)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + call.eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _folded(call: NormCall, *tensors: Any) -> Any:
    """Let scale and shift be part of the weight and bias of torch's layer norm: one pass over each sample."""
    parts = Parts(*tensors)
    x = normed_input(call, parts)
    factor, term = _fold(call, parts)
    norm = functools.partial(F.layer_norm, normalized_shape=x.shape[-1:], eps=call.eps)
    if factor is None or term is None or factor.dim() == 1:
        normed = norm(x, weight=factor, bias=term)
    else:
        normed = torch.stack([norm(x[i], weight=factor[i], bias=term[i]) for i in range(x.shape[0])])
    return normed if parts.y is None else (x, normed)


def _fold(call: NormCall, parts: Parts) -> tuple[Tensor | None, Tensor | None]:
    """Return ``w · (1 + scale)`` and ``b · (1 + scale) + shift``, [H], or [B, H] where samples differ."""
    weight, bias = cast(call.compute_dtype, parts.weight, parts.bias)
    if not call.modulation:
        return weight, bias
    scale_BH, shift_BH = (tensor.squeeze(1) for tensor in modulation(parts, call.compute_dtype))
    factor_BH = 1 + scale_BH
    term_BH = shift_BH if bias is None else torch.addcmul(shift_BH, bias, factor_BH)
    factor_BH = factor_BH if weight is None else factor_BH * weight
    factor_BH, term_BH = torch.broadcast_tensors(factor_BH, term_BH)
    return (factor_BH[0], term_BH[0]) if factor_BH.shape[0] == 1 else (factor_BH, term_BH)


def _tiled(call: NormCall, *tensors: Any) -> Any:
    """All steps on a few rows at a time, so that what is between them never leaves the cache of a core."""
    parts = Parts(*tensors)
    normed_BSH = torch.empty(call.shape_BSH, dtype=call.dtype, device=call.device)
    residual_BSH = None if parts.y is None else torch.empty_like(normed_BSH)
    samples, tokens, hidden = call.shape_BSH
    for sample in range(samples):
        for rows in tiles(tokens, hidden):
            tile = _tile(call, parts, sample, rows)
            if tile.y is not None and residual_BSH is not None:
                tile = tile._replace(x=_residual_tile(tile.x, tile.y, tile.gate, residual_BSH[sample, rows]))
            _norm_tile(call, tile, normed_BSH[sample, rows])
    normed_BSH = normed_BSH.view(parts.x.shape)
    return normed_BSH if residual_BSH is None else (residual_BSH, normed_BSH)


def _tile(call: NormCall, parts: Parts, sample: int, rows: slice) -> Parts:
    """Some rows of one sample of all tensors, in the dtype of the computation."""

    def some(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor_SH = tensor[sample if tensor.shape[0] > 1 else 0]
        return tensor_SH[rows] if tensor_SH.shape[0] > 1 else tensor_SH

    _, weight, bias, *vectors, y, gate = parts
    around = (some(per_token(tensor)) for tensor in (*vectors, y, gate))
    x = parts.x.reshape(call.shape_BSH)[sample, rows].to(call.compute_dtype)
    return Parts(x, *cast(x.dtype, weight, bias, *around))


def _residual_tile(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor) -> Tensor:
    """Write the new residual to `out`, and return it in the dtype of the computation, rounded as it is there."""
    if out.dtype == x.dtype:
        return gated_sum(x, y, gate, out)
    return out.copy_(gated_sum(x, y, gate)).to(x.dtype)


def _norm_tile(call: NormCall, tile: Parts, out: Tensor) -> None:
    """Norm and modulate the rows; the last steps work in `out` itself where it has the dtype of the computation."""
    x, weight, bias, scale, shift, *_ = tile
    work = out if out.dtype == x.dtype else torch.empty_like(x)
    if call.kind == "layer":
        normed = F.layer_norm(x, x.shape[-1:], weight, bias, call.eps)
    else:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        normed = torch.mul(x, mean_square.add_(call.eps).rsqrt_(), out=work)
        if weight is not None:
            normed.mul_(weight)
        if bias is not None:
            normed.add_(bias)
    if scale is not None and shift is not None:
        normed = torch.mul(normed, 1 + scale, out=work).add_(shift)
    if normed is not out:
        out.copy_(normed)


def _triton(call: NormCall, *tensors: Any) -> Any:
    from dit_fused_ops.norms.triton_kernels import norm

    return norm(call, eager, *tensors)


BACKENDS: tuple[Backend[NormCall], ...] = (
    Backend(
        name="npu_rms_norm",
        run=npu.npu_rms_norm,
        devices=frozenset({"npu"}),
        dtypes=_NARROW,
        honours=_ALL - {"layer"},
        missing=op_missing("npu", "npu_rms_norm"),
    ),
    Backend(
        name="mindiesd_adaln",
        run=npu.mindiesd_adaln,
        devices=frozenset({"npu"}),
        dtypes=_NARROW,
        honours=_AROUND_LAYER,
        rules=(Rule(lambda call: call.modulation != "", "it is a norm with scale and shift, and there are none"),),
        missing=op_missing("mindiesd", "adaln"),
        differentiable=False,
        traceable=False,
    ),
    Backend(
        name="mindiesd_layernorm",
        run=npu.mindiesd_layernorm,
        devices=frozenset({"npu"}),
        dtypes=_NARROW,
        honours=_AROUND_LAYER,
        missing=op_missing("mindiesd", "layernorm"),
        differentiable=False,
        traceable=False,
        note="the only one where impl_mode 1 and 2 compute otherwise than 0",
    ),
    Backend(
        name="npu_layer_norm",
        run=npu.npu_layer_norm,
        devices=frozenset({"npu"}),
        dtypes=_NARROW,
        honours=_AROUND_LAYER,
        note="torch's layer norm and addcmul in the dtype of x",
    ),
    Backend(
        name="triton",
        run=_triton,
        devices=frozenset({"cuda"}),
        dtypes=_NARROW,
        honours=_ALL,
        rules=(Rule(lambda call: call.x_shape[-1] <= 1 << 16, "a row must fit one program: 65536 channels"),),
        missing=triton_missing,
        traceable=False,
        note="its gradient is plain torch, computed from the inputs again",
    ),
    Backend(
        name="folded",
        run=_folded,
        devices=frozenset({"cpu"}),
        honours=_AROUND_LAYER,
        rules=(
            Rule(lambda call: call.modulation != "token", "scale and shift must be one vector a sample"),
            Rule(
                lambda call: not call.needs_grad or call.dtype == call.compute_dtype,
                "torch would sum the gradients of weight and bias in 16 bits",
            ),
            Rule(
                lambda call: not call.modulation or 0 < call.x_shape[0] <= FOLDED_SAMPLES,
                f"1 to {FOLDED_SAMPLES} samples are normed one after the other",
            ),
        ),
        traceable=False,  # a compiler fuses the steps itself, and would fix the number of samples
    ),
    Backend(
        name="tiled",
        run=_tiled,
        devices=frozenset({"cpu"}),
        honours=_ALL,
        differentiable=False,
        traceable=False,
    ),
    Backend(name="eager", run=eager, honours=_ALL),
    compiled_backend(_naive, honours=_ALL),
    Backend(name="naive", run=_naive, honours=_ALL, note="the reference, in float32"),
)
