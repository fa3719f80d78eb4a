"""Text models: Qwen2.5 (0.5B to 72B; Qwen2 has the same tensors) and Qwen3 (dense 0.6B to 32B; with
experts 30B-A3B and 235B-A22B).

They stand under the names that the same language model has inside a vision-language one
(``text_decoder.*``), so that one decoder loads both.

Reads the published names (``model.layers.*``), which are also those in transformers' memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_convert.families.family import Family, ModelSizes
from mm_convert.families.qwen import DENSE_MLP, SEPARATE_EXPERTS, expert_sizes, language, text_sizes
from mm_convert.rules import Rule


def _qwen2_5(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    return tuple(language(sizes, pp_size, qkv_bias=True, qk_norm=False))


def _qwen3(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    mlp = SEPARATE_EXPERTS if sizes.experts else DENSE_MLP
    return tuple(language(sizes, pp_size, qkv_bias=False, qk_norm=True, mlp=mlp))


def _qwen3_sizes(config: Mapping[str, Any]) -> ModelSizes:
    sizes = text_sizes(config)
    return expert_sizes(config, sizes) if config.get("model_type") == "qwen3_moe" else sizes


QWEN2_5 = Family(model_types=("qwen2",), sizes=text_sizes, rules=_qwen2_5)
QWEN3 = Family(model_types=("qwen3", "qwen3_moe"), sizes=_qwen3_sizes, rules=_qwen3)
