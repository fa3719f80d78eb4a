"""Qwen2.5-VL: 3B, 7B, 32B and 72B.

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
from mm_convert.families.table import both, column, row
from mm_convert.rules import Copy, Gated, Rule


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    block = [
        ("norm1.weight", "input_layernorm.weight", Copy()),
        ("norm2.weight", "pre_mlp_layernorm.weight", Copy()),
        *vision_qkv(sizes),
        *row("attn.proj", "self_attention.linear_proj"),
        *both("mlp.{gate,up}_proj", "mlp.linear_fc1", Gated()),
        *row("mlp.down_proj", "mlp.linear_fc2"),
    ]
    merger = [
        ("ln_q.weight", "layernorm.weight", Copy()),
        *column("mlp.0", "encoder.linear_fc1"),
        *row("mlp.2", "encoder.linear_fc2"),
    ]
    return (*vision([PATCHES], block, merger), *language(sizes, pp_size, qkv_bias=True, qk_norm=False))


QWEN2_5_VL = Family(
    model_types=("qwen2_5_vl",),
    sizes=vision_language_sizes,
    rules=_rules,
    renames=NEW_NAMES,
    spellings=OLD_AND_NEW,
)
