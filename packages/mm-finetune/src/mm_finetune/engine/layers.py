"""The two layers that megatron-core takes from us through its layer specification.

Shape suffixes: S tokens, B batch, H heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class RMSNorm(nn.Module):
    """Root mean square norm, in float32 inside: ``weight * x / sqrt(mean(x²) + eps)``.

    Megatron's own local norm refuses sequence parallelism; all that it takes is the mark on the weight,
    by which Megatron sums its gradient over tensor-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Any shape whose last dimension is the hidden size."""
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)


class CoreAttention(nn.Module):
    """Causal attention, grouped queries included, by torch's fused attention of the device.

    Padding stands on the right, where a causal mask keeps it from every token that counts; so no mask
    of ``[S, S]`` is ever made.
    """

    def __init__(self, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any) -> Tensor:
        """``[S, B, H, D]`` each, key and value with fewer heads; returns ``[S, B, H * D]``."""
        if attention_mask is not None:
            raise ValueError("CoreAttention is causal and takes no mask")
        q_BHSD, k_BHSD, v_BHSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BHSD = scaled_dot_product_attention(
            q_BHSD, k_BHSD, v_BHSD, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)
