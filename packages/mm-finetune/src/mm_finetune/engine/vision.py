"""The vision tower: transformers' own, with its attention taken out of the loop over windows.

Shape suffixes: T patches of all pictures, N heads, D head dimension, C hidden size.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import linear

from mm_finetune.engine.attention import Rows, packed_attention
from mm_finetune.engine.pointwise import rms_norm, rotate
from mm_finetune.families import family_of


def vision_tower(hf_config: Any, config: TransformerConfig) -> nn.Module:
    """The vision transformer and its merger, with transformers' names.

    Args:
        hf_config: transformers' ``Qwen2_5_VLConfig`` or ``Qwen2VLConfig``.
        config: Megatron's; its precision and recomputation hold here too.
    """
    family = family_of(hf_config.model_type)
    theirs = import_module(family.module)
    tower: Any = getattr(theirs, family.tower)._from_config(hf_config.vision_config, dtype=config.params_dtype)
    windows, pictures = RememberedRows(), RememberedRows()
    for number, block in enumerate(tower.blocks):
        # Qwen2-VL has no windows.
        rows = pictures if number in getattr(tower, "fullatt_block_indexes", range(len(tower.blocks))) else windows
        block.attn = VisionAttention(block.attn, rows)
        block.norm1, block.norm2 = _norm(block.norm1), _norm(block.norm2)
    tower.merger.ln_q = _norm(tower.merger.ln_q)
    tower.patch_embed = PatchEmbedding(tower.patch_embed)
    if config.recompute_granularity == "full":
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # It would have a frozen tower keep activations and run backwards, for nothing.
        tower.disable_input_require_grads()
        tower.train()
    return tower  # type: ignore[no-any-return]


class PatchEmbedding(nn.Module):
    """A convolution whose steps are as long as its kernel, as the matrix product that it is: ten times faster on a CPU.

    Args:
        theirs: transformers' module; its weight is taken over, with its name and shape.
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        # No convolution module any more: torch_npu would give its weight the layout of convolutions.
        self.proj = nn.Module()
        self.proj.register_parameter("weight", theirs.proj.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[T, channels * time * height * width]`` to ``[T, C]``."""
        weight = cast(Tensor, self.proj.weight)
        return linear(hidden_states.to(weight.dtype), weight.flatten(1))


class RMSNorm(nn.Module):
    """transformers' norm of the tower by our operator.

    Args:
        theirs: transformers' module; its weight is taken over, with its name.
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.weight, self.eps = theirs.weight, float(theirs.variance_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Any shape whose last dimension is the hidden size."""
        return rms_norm(hidden_states, self.weight, self.eps)


def _norm(theirs: nn.Module) -> nn.Module:
    """Qwen2-VL's tower has LayerNorm, which torch computes in one go."""
    return theirs if isinstance(theirs, nn.LayerNorm) else RMSNorm(theirs)


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
    """

    def __init__(self, theirs: Any, rows: RememberedRows) -> None:
        super().__init__()
        self.qkv, self.proj = theirs.qkv, theirs.proj
        self.num_heads: int = theirs.num_heads
        self.rows = rows

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """``[T, C]`` to ``[T, C]``; `cu_seqlens` are the bounds of pictures or windows."""
        q_TND, k_TND, v_TND = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q_TND, k_TND = (rotate(x_TND, *position_embeddings) for x_TND in (q_TND, k_TND))
        out_TND = packed_attention(q_TND, k_TND, v_TND, self.rows.of(cu_seqlens), causal=False)
        projected: Tensor = self.proj(out_TND.flatten(1))
        return projected
