"""What a norm with modulation is, in plain float32 torch: the truth that every backend is held against."""

from __future__ import annotations

from torch import Tensor

from dit_fused_ops.pointwise.reference import multiply_add_naive, wide

KINDS = ("layer", "rms")


def norm_naive(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    kind: str,
    eps: float,
) -> Tensor:
    """Return ``n(x) · (1 + scale) + shift`` with ``n(x) = (x - m) / sqrt(v + eps) · weight + bias``.

    Over the last dimension: in kind "layer" m is the mean and v the mean of ``(x - m)²`` (Layer Normalization, arXiv
    1607.06450); in kind "rms" m is 0 and v the mean of ``x²`` (RMSNorm, arXiv 1910.07467). The modulation is adaLN of
    DiT (arXiv 2212.09748). What is None is left out.

    Args:
        x: [..., H].
        weight: [H].
        bias: [H].
        scale: broadcasts to `x`.
        shift: broadcasts to `x`.
        kind: of `KINDS`.
        eps: added to v.

    Returns:
        float32, or float64 for float64 `x`.
    """
    x = wide(x)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        normed = normed * weight.to(x.dtype)
    if bias is not None:
        normed = normed + bias.to(x.dtype)
    if scale is not None:
        normed = normed * (1 + scale.to(x.dtype))
    return normed if shift is None else normed + shift.to(x.dtype)


def residual_gate_norm_naive(
    x: Tensor, y: Tensor, gate: Tensor | None, *affine: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``r = x + y · gate`` in the dtype of `x`, and `norm_naive` of r with weight, bias, scale and shift."""
    update = wide(x) + wide(y) if gate is None else multiply_add_naive(x, y, gate)
    residual = update.to(x.dtype)
    return residual, norm_naive(residual, *affine, kind=kind, eps=eps)
