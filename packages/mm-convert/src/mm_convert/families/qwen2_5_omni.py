"""Qwen2.5-Omni, 3B and 7B: the thinker, which takes in text, images, video and sound.

It is Qwen2.5-VL with an audio tower, and with query, key and value of the vision attention apart. What speaks,
``talker.*`` and ``token2wav.*``, is not converted: on the way back it comes from the Hugging Face folder.

The key of the audio attention has no bias, the fused one of the training code has: zeros are written in its place, and
whatever training made of them is left out on the way back. That changes no output: a key's bias adds one number to all
scores of a query, and softmax does not see it.

Reads the published names (``thinker.visual.*``, ``thinker.audio_tower.*``, ``thinker.model.*``), the same without
``thinker.``, and those that transformers 5 holds in memory (``model.visual.*``, ``model.audio_tower.*``,
``model.language_model.*``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mm_convert.errors import ModelError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.families.qwen import NEW_NAMES, vision_language_sizes
from mm_convert.families.qwen2_5_vl import QWEN2_5_VL
from mm_convert.families.table import Row, column, copied, row, table
from mm_convert.rules import ZERO, Copy, GroupedQKV, Rule, StackedQKV

TOWER = "audio_tower."
LAYERS, LAYER = TOWER + "layers.{i}.", "audio_encoder.encoder.blocks.layers.{j}."
FUSED = "self_attention.linear_qkv."
FIRST: list[Row] = [
    *copied("conv1", "conv1"),
    *copied("conv2", "conv2"),
    ("audio_bos_eos_token.weight", "audio_bos_eos_token.weight", Copy()),
]
LAST = [*copied("ln_post", "ln_post"), *copied("proj", "proj")]


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    thinker = config.get("thinker_config") or config
    audio = thinker.get("audio_config") or {}
    try:
        return replace(
            vision_language_sizes(thinker),
            audio_layers=audio["encoder_layers"],
            audio_heads=audio["encoder_attention_heads"],
        )
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r} for the audio tower") from error


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    return (*map(_apart, QWEN2_5_VL.rules(sizes, pp_size)), *_audio(GroupedQKV(sizes.audio_heads)))


def _apart(rule: Rule) -> Rule:
    """The vision attention's query, key and value are three tensors here."""
    if not isinstance(rule.operation, StackedQKV):
        return rule
    [fused] = rule.hf
    three = tuple(fused.replace("attn.qkv.", f"attn.{one}.") for one in "qkv")
    return replace(rule, hf=three, operation=GroupedQKV(rule.operation.heads))


def _audio(by_head: GroupedQKV) -> list[Rule]:
    layer: list[Row] = [
        *copied("self_attn_layer_norm", "input_layernorm"),
        *copied("final_layer_norm", "pre_mlp_layernorm"),
        ("self_attn.{q,k,v}_proj.weight", FUSED + "weight", by_head),
        *row("self_attn.out_proj", "self_attention.linear_proj"),
        *column("fc1", "mlp.linear_fc1"),
        *row("fc2", "mlp.linear_fc2"),
    ]
    bias = (LAYERS + "self_attn.q_proj.bias", ZERO, LAYERS + "self_attn.v_proj.bias")
    return [
        *table("audio", FIRST, hf=TOWER, mm="audio_encoder.encoder.", where="first"),
        *table("audio", layer, hf=LAYERS, mm=LAYER),
        Rule(hf=bias, mm=LAYER + FUSED + "bias", operation=by_head, part="audio"),
        *table("audio", LAST, hf=TOWER, mm="audio_encoder.encoder.", where="last"),
    ]


KEPT = ("talker.*", "token2wav.*")
"""Names of the tensors that are not converted, with ``*`` as in file names."""

QWEN2_5_OMNI = Family(
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    sizes=_sizes,
    rules=_rules,
    unfusable=False,
    renames=(
        (re.compile(r"^thinker\."), ""),
        (re.compile(r"^model\.audio_tower\."), TOWER),
        *NEW_NAMES,
    ),
    kept=KEPT,
)
