"""Qwen2-VL: 2B, 7B and 72B. Norms of the vision part have biases, and its MLP is not gated.

Reads the published names (``visual.*``, ``model.layers.*``) and those that transformers >= 4.52 holds in
memory (``model.visual.*``, ``model.language_model.*``).
"""

from __future__ import annotations

from mm_convert.families.family import Family, ModelSizes
from mm_convert.families.qwen import (
    NEW_NAMES,
    OLD_AND_NEW,
    PATCHES,
    language,
    vision,
    vision_language_sizes,
    vision_qkv,
)
from mm_convert.families.table import column, copied, row
from mm_convert.rules import Rule


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    block = [
        *copied("norm1", "input_layernorm"),
        *copied("norm2", "pre_mlp_layernorm"),
        *vision_qkv(sizes),
        *row("attn.proj", "self_attention.linear_proj"),
        *column("mlp.fc1", "mlp.linear_fc1"),
        *row("mlp.fc2", "mlp.linear_fc2"),
    ]
    merger = [
        *copied("ln_q", "layernorm"),
        *column("mlp.0", "encoder.linear_fc1"),
        *row("mlp.2", "encoder.linear_fc2"),
    ]
    return (*vision([PATCHES], block, merger), *language(sizes, pp_size, qkv_bias=True, qk_norm=False))


QWEN2_VL = Family(
    model_types=("qwen2_vl",),
    sizes=vision_language_sizes,
    rules=_rules,
    renames=NEW_NAMES,
    spellings=OLD_AND_NEW,
)
