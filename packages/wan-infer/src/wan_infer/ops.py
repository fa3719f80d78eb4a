"""What a block computes beside its matrix products, by the kernels of dit-fused-ops. Nobody else here knows them.

Nothing is measured while a video is made: the kernels are those that `dit-fused-ops tune` found the fastest, else the
first of its table that fits. So a seed means the same video from run to run.

Shape suffixes: B batch, S query tokens, T key tokens, N heads, D channels of a head, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from dit_fused_ops import (
    attention_forward,
    layernorm_scale_shift,
    residual_gate_add,
    residual_gate_norm_scale_shift,
    rotary_position_embedding,
)
from dit_fused_ops import rms_norm as fused_rms_norm

_MODE = "static"


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, computed in float32; dtype of `x`."""
    return fused_rms_norm(x, weight_C, eps, opt_mode=_MODE)


def attention(q_BSND: Tensor, k_BTND: Tensor, v_BTND: Tensor, *, key_bias_T: Tensor | None = None) -> Tensor:
    """Return ``softmax(q kᵀ / √D + key_bias) v`` of each head, [B, S, N, D].

    Args:
        q_BSND: queries.
        k_BTND: keys.
        v_BTND: values.
        key_bias_T: added to the score of each key, in the dtype of the queries; ``log(n)`` makes a key count n times.
    """
    bias = None if key_bias_T is None else key_bias_T[None, None, None]
    return attention_forward(q_BSND, k_BTND, v_BTND, bias, opt_mode=_MODE)


def rotate(q_BSND: Tensor, k_BSND: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate neighbouring channels (2i, 2i + 1) of every head by the angle of the token; dtypes and shapes stay.

    Args:
        q_BSND: queries.
        k_BSND: keys.
        table: of `rope_table`, [S, D / 2, 2].
    """
    cos, sin = table.unbind(-1)
    return rotary_position_embedding(q_BSND, cos, sin, "rotated_interleaved", key=k_BSND, opt_mode=_MODE)


def modulated_norm(norm: nn.LayerNorm, x_BSC: Tensor, scale_BC: Tensor, shift_BC: Tensor) -> Tensor:
    """Return ``norm(x) · (1 + scale) + shift``, [B, S, C]."""
    return layernorm_scale_shift(norm, x_BSC, scale_BC, shift_BC, opt_mode=_MODE)


def next_norm(
    norm: nn.LayerNorm,
    x_BSC: Tensor,
    update_BSC: Tensor,
    *,
    gate_BC: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the residual stream ``x + update · gate`` and its norm, modulated by (scale, shift) where given."""
    scale_BC, shift_BC = modulation or (None, None)
    return residual_gate_norm_scale_shift(norm, x_BSC, update_BSC, gate_BC, scale_BC, shift_BC, opt_mode=_MODE)


def gated(x_BSC: Tensor, update_BSC: Tensor, gate_BC: Tensor) -> Tensor:
    """Return ``x + update · gate``, [B, S, C]."""
    return residual_gate_add(x_BSC, update_BSC, gate_BC[:, None], opt_mode=_MODE)
