"""Qwen3-VL: dense 2B, 4B, 8B and 32B, with experts 30B-A3B and 235B-A22B.

The size of a head is a number of its own, not hidden size over heads.

The outputs of some vision layers (`deepstack_visual_indexes`) also go to the language model, each through a
merger of its own: merger k stands beside its layer, and moves with it over the pipeline.

Reads the published names (``model.visual.*``, ``model.language_model.*``), which are also those in
transformers' memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

from mm_convert.families.family import Family, ModelSizes, Spelling
from mm_convert.families.qwen import (
    BLOCKS,
    DENSE_MLP,
    expert_sizes,
    language,
    stacked_experts,
    vision,
    vision_language_sizes,
    vision_qkv,
)
from mm_convert.families.table import Row, column, copied, row, table
from mm_convert.rules import Copy, Rule

HF = "model.visual."
MERGER = [
    *copied("norm", "layernorm"),
    *column("linear_fc1", "encoder.linear_fc1"),
    *row("linear_fc2", "encoder.linear_fc2"),
]


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    block = [
        *copied("norm1", "input_layernorm"),
        *copied("norm2", "pre_mlp_layernorm"),
        *vision_qkv(sizes),
        *row("attn.proj", "self_attention.linear_proj"),
        *column("mlp.linear_fc1", "mlp.linear_fc1"),
        *row("mlp.linear_fc2", "mlp.linear_fc2"),
    ]
    patches: list[Row] = [
        *copied("patch_embed.proj", "patch_embed.proj"),
        ("pos_embed.weight", "pos_embed.weight", Copy()),
    ]
    deepstack = [
        table("vit", MERGER, hf=f"{HF}deepstack_merger_list.{k}.", mm=BLOCKS + "deepstack_layer.", where=layer)
        for k, layer in enumerate(sizes.deepstack)
    ]
    return (
        *vision(patches, block, MERGER, prefix=HF),
        *chain.from_iterable(deepstack),
        *language(
            sizes,
            pp_size,
            prefix="model.language_model.",
            qkv_bias=False,
            qk_norm=True,
            mlp=stacked_experts(sizes) if sizes.experts else DENSE_MLP,
        ),
    )


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    sizes = vision_language_sizes(config)
    return expert_sizes(config, sizes) if config.get("model_type") == "qwen3_vl_moe" else sizes


QWEN3_VL = Family(
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    sizes=_sizes,
    rules=_rules,
    # A text model that takes the language model's place, and a folder whose names were turned into old ones.
    renames=(
        (re.compile(r"^model\.(?!visual\.|language_model\.)"), "model.language_model."),
        (re.compile(r"^visual\."), "model.visual."),
    ),
    spellings={
        "new": Spelling(),
        "old": Spelling(
            renames=(
                (re.compile(r"^model\.visual\."), "visual."),
                (re.compile(r"^model\.language_model\."), "model."),
            )
        ),
    },
    stacked=(re.compile(r"\.mlp\.experts\.(?:gate_up|down)_proj$"),),
)
