"""Norms, alone and with the residual, gate, scale and shift that surround them in a diffusion transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_fused_ops.arguments import require_tensor, require_type
from dit_fused_ops.dispatch import Op, Probe, dispatcher, spread_rows
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.norms.backends import BACKENDS
from dit_fused_ops.norms.call import ACCURATE, NormCall, describe
from dit_fused_ops.norms.parts import Parts, per_token
from dit_fused_ops.norms.reference import norm_naive, residual_gate_norm_naive

__all__ = [
    "RMSNorm",
    "rms_norm",
    "fast_layernorm",
    "layernorm_scale_shift",
    "rmsnorm_scale_shift",
    "residual_gate_norm_scale_shift",
    "norm_naive",
    "residual_gate_norm_naive",
    "NORM",
]

_PROBED_ROWS = 64  # compared with the reference before a backend may win


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    fused: bool = True,
    *,
    opt_mode: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``x / sqrt(mean(x²) + eps) · weight`` over the last dimension (RMSNorm, arXiv 1910.07467).

    Computed in float32 or wider; shape and dtype are those of `x`, whatever the dtype of `weight`.

    Args:
        x: [..., H], of 2 to 8 dimensions.
        weight: [H]; None for none.
        eps: added to the mean.
        fused: False computes the naive reference.
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Raises:
        ParametersInvalid: the shapes do not fit.
        BackendRefused: `backend` cannot carry out this call.
    """
    if not 1 < require_tensor(x, "x").dim() < 9:
        raise ParametersInvalid(
            f"The input dimension should be greater than 1 and less than 9. Given the shape {list(x.shape)}"
        )
    options = ("rms", eps, ACCURATE, False, fused, None)
    named = backend if fused else "naive"
    result: Tensor = dispatcher(NORM, (x, weight, None, None, None, None, None), options, mode=opt_mode, named=named)
    return result


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight [hidden_size] that begins as ones.

    Args:
        hidden_size: of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self,
        hidden_states: Tensor,
        if_fused: bool = True,
        *,
        opt_mode: str | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Norm [..., hidden_size] of 2 to 8 dimensions; the arguments are those of `rms_norm`."""
        return rms_norm(hidden_states, self.weight, self.eps, if_fused, opt_mode=opt_mode, backend=backend)

    def extra_repr(self) -> str:
        """Size and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def fast_layernorm(
    norm: nn.LayerNorm,
    x: Tensor,
    impl_mode: int = ACCURATE,
    fused: bool = True,
    *,
    opt_mode: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``norm(x)``, computed in float32 or wider: shape and dtype are those of `x`.

    Args:
        norm: a layer norm, with or without weight and bias.
        x: [..., *normalized_shape].
        impl_mode: 0 accurate, 1 fast, 2 in float16 throughout, which all tensors must be then. Only the NPU kernel of
            MindIE SD tells the modes apart; everything else is accurate in each of them.
        fused: False computes the naive reference.
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Raises:
        ParametersInvalid: `norm` is no layer norm, the mode is none of these, or the shapes do not fit.
        BackendRefused: `backend` cannot carry out this call.
    """
    require_type(norm, "norm", nn.LayerNorm)
    normed = tuple(norm.normalized_shape)
    kept = require_tensor(x, "x").dim() - len(normed)
    if kept < 0 or tuple(x.shape[kept:]) != normed:
        raise ParametersInvalid(f"the last dimensions of x {list(x.shape)} must be the normalized_shape {list(normed)}")
    rows = x.flatten(kept) if len(normed) > 1 else x
    weight, bias = (None if tensor is None else tensor.flatten() for tensor in (norm.weight, norm.bias))
    tensors = (rows, weight, bias, None, None, None, None)
    options = ("layer", norm.eps, impl_mode, False, fused, None)
    result: Tensor = dispatcher(NORM, tensors, options, mode=opt_mode, named=backend if fused else "naive")
    return result.view(x.shape)


def layernorm_scale_shift(
    layernorm: nn.LayerNorm,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    fused: bool = True,
    *,
    legacy: bool = False,
    opt_mode: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``layernorm(x) · (1 + scale) + shift`` (adaLN of DiT, arXiv 2212.09748).

    Computed in float32 or wider; shape and dtype are those of `x`.

    Args:
        layernorm: over [H], with or without weight and bias.
        x: [B, S, H].
        scale: [B, H], [B, 1, H] or [B, S, H]; its first size may be 1.
        shift: in one of these forms too.
        fused: False computes the naive reference.
        legacy: refuse a first size of 1 where B is larger, as MindIE SD does.
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Raises:
        ParametersInvalid: a type, rank or size does not fit.
        BackendRefused: `backend` cannot carry out this call.
    """
    require_type(layernorm, "layernorm", nn.LayerNorm)
    return _modulated(layernorm, x, scale, shift, fused, legacy, opt_mode, backend)


def rmsnorm_scale_shift(
    norm: nn.Module,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    fused: bool = True,
    *,
    opt_mode: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``norm(x) · (1 + scale) + shift`` of an `RMSNorm`; all else as in `layernorm_scale_shift`.

    Args:
        norm: `RMSNorm` of this package or of torch, over [H].
        x: [B, S, H].
        scale: [B, H], [B, 1, H] or [B, S, H]; its first size may be 1.
        shift: in one of these forms too.
        fused: False computes the naive reference.
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Raises:
        ParametersInvalid: a type, rank or size does not fit.
        BackendRefused: `backend` cannot carry out this call.
    """
    if not isinstance(norm, (RMSNorm, nn.RMSNorm)):
        raise ParametersInvalid(f"norm must be an RMSNorm of this package or of torch, given {type(norm).__name__}")
    return _modulated(norm, x, scale, shift, fused, False, opt_mode, backend)


def residual_gate_norm_scale_shift(
    norm: nn.Module,
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    fused: bool = True,
    *,
    opt_mode: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``r = x + y · gate`` and ``norm(r) · (1 + scale) + shift``: what stands between two parts of a DiT block.

    Both are computed in float32 or wider, and have shape and dtype of `x`; r is rounded to it before it is normed.

    Args:
        norm: a layer norm, or an RMSNorm of this package or of torch, over [H], with or without weight and bias.
        x: the residual, [B, S, H].
        y: what is added to it, [B, S, H]; its dtype may differ.
        gate: [B, H], [B, 1, H] or [B, S, H], the first size may be 1; None for a gate of 1.
        scale: in one of these forms too; None, with `shift`, for no modulation.
        shift: in one of these forms too.
        fused: False computes the naive reference.
        opt_mode: "runtime" or "static", instead of the dispatcher's setting.
        backend: the backend that must do it, of `capabilities()`.

    Returns:
        The new residual and its modulated norm.

    Raises:
        ParametersInvalid: a type, rank or size does not fit.
        BackendRefused: `backend` cannot carry out this call.
    """
    if y is None:
        raise ParametersInvalid("y must be a Tensor, given None; a norm without an update is layernorm_scale_shift")
    kind, weight, bias, eps, over = _of(norm, x)
    tensors = (x, weight, bias, scale, shift, y, gate)
    options = (kind, eps, ACCURATE, False, fused, over)
    result: tuple[Tensor, Tensor] = dispatcher(
        NORM, tensors, options, mode=opt_mode, named=backend if fused else "naive"
    )
    return result


def _modulated(
    norm: nn.Module,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    fused: bool,
    legacy: bool,
    opt_mode: str | None,
    backend: str | None,
) -> Tensor:
    if scale is None or shift is None:
        raise ParametersInvalid("scale and shift must be Tensors, given None; a norm without them is fast_layernorm")
    kind, weight, bias, eps, over = _of(norm, x)
    tensors = (x, weight, bias, scale, shift, None, None)
    options = (kind, eps, ACCURATE, legacy, fused, over)
    result: Tensor = dispatcher(NORM, tensors, options, mode=opt_mode, named=backend if fused else "naive")
    return result


def _of(norm: nn.Module, x: Tensor) -> tuple[str, Tensor | None, Tensor | None, float, tuple[int, ...] | None]:
    """Return kind, weight, bias and eps of a norm, and the sizes that it is over where it says so."""
    if isinstance(norm, nn.LayerNorm):
        return "layer", norm.weight, norm.bias, norm.eps, norm.normalized_shape
    if isinstance(norm, RMSNorm):
        return "rms", norm.weight, None, norm.eps, None
    if not isinstance(norm, nn.RMSNorm):
        raise ParametersInvalid(f"norm must be a LayerNorm or an RMSNorm, given {type(norm).__name__}")
    eps = torch.finfo(require_tensor(x, "x").dtype).eps if norm.eps is None else norm.eps
    return "rms", norm.weight, None, eps, norm.normalized_shape


def _probe(call: NormCall, *tensors: Any) -> Probe:
    samples = spread_rows(call.shape_BSH[0], 2, call.device)
    rows = spread_rows(call.shape_BSH[1], _PROBED_ROWS, call.device)

    def some(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor_BSH = per_token(tensor) if call.features - {call.kind} else tensor.reshape(call.shape_BSH)
        assert tensor_BSH is not None
        return tensor_BSH.expand(call.shape_BSH).index_select(0, samples).index_select(1, rows)

    def select(output: Any) -> Tensor:
        outputs = output if isinstance(output, tuple) else (output,)
        return torch.cat([part for each in outputs if (part := some(each)) is not None])

    x, weight, bias, *around, y, gate = Parts(*tensors)
    affine = (weight, bias, *(some(tensor) for tensor in around))
    few = some(x)
    assert few is not None
    if y is None:
        return Probe(select=select, wanted=norm_naive(few, *affine, kind=call.kind, eps=call.eps))
    update = some(y)
    assert update is not None
    residual, normed = residual_gate_norm_naive(few, update, some(gate), *affine, kind=call.kind, eps=call.eps)
    return Probe(select=lambda output: select(output).float(), wanted=torch.cat((residual.to(normed.dtype), normed)))


NORM: Op[NormCall] = Op(name="norm", describe=describe, backends=BACKENDS, probe=_probe)
