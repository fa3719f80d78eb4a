"""The layers that megatron-core takes from us through its layer specification.

Shape suffixes: S tokens, B batch, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from mm_finetune.engine.adapters import AdaptableColumn, AdaptableRow
from mm_finetune.engine.attention import Rows, packed_attention
from mm_finetune.engine.pointwise import rms_norm, rotate


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
        return rms_norm(hidden_states, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, made as Megatron makes norms."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass
class PackedRow(PackedSeqParams):
    """What attention needs to know of a micro-batch, on its way through Megatron's layers.

    Megatron is told that rows are ordinary (``sbhd``): its own ``thd`` would rotate queries and keys sample by
    sample, by positions of its own making, while M-RoPE's stand in the batch.

    Attributes:
        rows: where a packed row's samples are; None: padded rows.
        rotary: cosines and sines ``[B * S, D]`` of the positions, row behind row; None: queries and keys stay as they
            are.
    """

    qkv_format: str = "sbhd"
    rows: Rows | None = None
    rotary: tuple[Tensor, Tensor] | None = None


class MultimodalRotary(nn.Module):
    """Cosines and sines of M-RoPE, once for all layers.

    Args:
        head_dim: D.
        base: the longest wavelength, over 2 pi.
        sections: how many of the D / 2 frequencies turn with time, height and width.
    """

    def __init__(self, head_dim: int, base: float, sections: Sequence[int]) -> None:
        super().__init__()
        self.frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.axes = torch.tensor([axis for axis, count in enumerate(sections) for _ in range(count)])

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``[3, B, S]``: two of ``[B * S, D]``, the second half of D being the first one once more."""
        if self.frequencies.device != position_ids.device:
            self.frequencies, self.axes = (each.to(position_ids.device) for each in (self.frequencies, self.axes))
        places = position_ids.flatten(1).t().float()[:, self.axes]
        angles = (places * self.frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


class CoreAttention(nn.Module):
    """Attention, grouped queries and rotary embedding included; within each sample of a packed row.

    Padding stands on the right, where a causal mask keeps it from every token that counts; so no mask
    of ``[S, S]`` is ever made.

    Args:
        attn_mask_type: causal, or none: a query then sees its whole sample.
        softmax_scale: of the scores; default ``D ** -0.5``.
    """

    def __init__(
        self,
        *_: Any,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        softmax_scale: float | None = None,
        **__: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale, self.causal = softmax_scale, attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedRow | None = None,
        **_: Any,
    ) -> Tensor:
        """``[S, B, H, D]`` each, key and value with fewer heads; returns ``[S, B, H * D]``."""
        if attention_mask is not None:
            raise ValueError("CoreAttention takes no mask; attn_mask_type says whether it is causal")
        tokens, batch = query.shape[:2]
        told = packed_seq_params or PackedRow()
        rows = told.rows or Rows.equal(batch, tokens, query.device)
        q_THD, k_THD, v_THD = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        if told.rotary:
            q_THD, k_THD = (rotate(x_THD, *told.rotary) for x_THD in (q_THD, k_THD))
        out_THD = packed_attention(q_THD, k_THD, v_THD, rows, self.softmax_scale, causal=self.causal)
        out_BSH: Tensor = out_THD.flatten(1).unflatten(0, (batch, tokens))
        return out_BSH.transpose(0, 1)


def norm_of(config: Any) -> type[RMSNorm | LayerNorm]:
    """The norm that Megatron's configuration names."""
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm


def layer_spec(config: Any, activation: Callable[[Tensor], Tensor], *, causal: bool) -> ModuleSpec:
    """A layer of Megatron's, with our attention and norms, and linear layers that take adapters.

    Args:
        config: Megatron's configuration.
        activation: of the MLP; the gate is in it.
        causal: tokens see what stands before them alone.
    """
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization=config.normalization)
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm_of(config)
    parts.self_attention.params = {"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask}
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    attention.core_attention = CoreAttention
    mlp.activation_func = activation
    attention.linear_qkv = mlp.linear_fc1 = AdaptableColumn
    attention.linear_proj = mlp.linear_fc2 = AdaptableRow
    return layer
