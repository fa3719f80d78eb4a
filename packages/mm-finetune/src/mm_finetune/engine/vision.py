"""The vision tower: transformers' own, with its attention taken out of the loop over windows.

Shape suffixes: T patches of all pictures, N heads, D head dimension, C hidden size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mm_finetune.engine.attention import Rows, packed_attention


def vision_tower(hf_config: Any, config: TransformerConfig) -> nn.Module:
    """The vision transformer and its merger, with transformers' names.

    Args:
        hf_config: transformers' ``Qwen2_5_VLConfig``.
        config: Megatron's; its precision and recomputation hold here too.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        apply_rotary_pos_emb_vision,
    )

    tower: Any = Qwen2_5_VisionTransformerPretrainedModel._from_config(
        hf_config.vision_config, dtype=config.params_dtype
    )
    windows, pictures = RememberedRows(), RememberedRows()
    for number, block in enumerate(tower.blocks):
        rows = pictures if number in tower.fullatt_block_indexes else windows
        block.attn = VisionAttention(block.attn, rows, apply_rotary_pos_emb_vision)
    if config.recompute_granularity == "full":
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tower.train()
    return tower  # type: ignore[no-any-return]


class RememberedRows:
    """Reads bounds from the device once a micro-batch, not once a layer."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.rows: Rows | None = None

    def of(self, cu_seqlens: Tensor) -> Rows:
        """The rows of the tensor; of the same object as before, the same."""
        if self.rows is None or cu_seqlens is not self.key:
            self.key, self.rows = cu_seqlens, Rows.packed(cu_seqlens)
        return self.rows


class VisionAttention(nn.Module):
    """Attention within each picture or window: one kernel call where transformers makes one for each of them.

    Args:
        theirs: transformers' module; its projections are taken over, with their names.
        rows: shared by the layers that see the same windows.
        rotate: transformers' function for the rotary embedding.
    """

    def __init__(self, theirs: Any, rows: RememberedRows, rotate: Any) -> None:
        super().__init__()
        self.qkv, self.proj = theirs.qkv, theirs.proj
        self.num_heads: int = theirs.num_heads
        self.rows, self.rotate = rows, rotate

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """``[T, C]`` to ``[T, C]``; `cu_seqlens` are the bounds of pictures or windows."""
        q_TND, k_TND, v_TND = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q_TND, k_TND = self.rotate(q_TND, k_TND, *position_embeddings)
        out_TND = packed_attention(q_TND, k_TND, v_TND, self.rows.of(cu_seqlens), causal=False)
        projected: Tensor = self.proj(out_TND.flatten(1))
        return projected
