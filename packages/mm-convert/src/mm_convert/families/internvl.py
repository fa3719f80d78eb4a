"""InternVL 2, 2.5 and 3: an InternViT, a projector, and InternLM2, Llama or Qwen2 as the language model.

Nothing of the projector is divided. The vision attention keeps its order, query over key over value, and each
tensor-parallel rank holds its heads of each; InternViT-6B has 25 heads, so the first ranks may hold one more than the
others. A vocabulary of any size is dealt out in the same way.

Reads the published names (``vision_model.*``, ``mlp1.*``, ``language_model.*``; `model_type` internvl_chat), and those
of transformers' own port (``vision_tower.*``, ``multi_modal_projector.*``; internvl), also as it holds them in memory.
The port keeps query, key and value of the vision attention apart, and has InternLM2's tensors under Llama's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mm_convert.errors import ModelError
from mm_convert.families.family import LAYER_NAMES, Family, ModelSizes
from mm_convert.families.qwen import EMBEDDING, OUTPUT, language, text_sizes
from mm_convert.families.table import Row, both, column, copied, row, table
from mm_convert.families.uneven import UnevenQKV, UnevenSplit
from mm_convert.rules import Copy, GroupedQKV, Rule, Split

VISION, LAYER = "image_encoder.encoder.", "image_encoder.encoder.encoder.layers."

APART, NORM_BIAS, QKV_BIAS, QK_NORM = "vision q, k, v apart", "norm biases", "vision qkv biases", "vision q and k norms"
FUSED_TEXT, TEXT_BIAS = "language wqkv", "language qkv biases"
TEXT_FEATURES: Mapping[str, set[str]] = {"internlm2": {FUSED_TEXT}, "llama": set(), "qwen2": {TEXT_BIAS}}


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    port, vision = "text_config" in config, config.get("vision_config") or {}
    text = config.get("text_config" if port else "llm_config") or {}
    kind = str(text.get("model_type"))
    if kind not in TEXT_FEATURES:
        raise ModelError(f"the language model of this InternVL is {kind!r}; known: {', '.join(TEXT_FEATURES)}")
    # The published code asks the language model whether it is tied, transformers' the whole.
    tied = {"tie_word_embeddings": bool(config.get("tie_word_embeddings", False))}
    try:
        return replace(
            text_sizes(config if port else {**tied, **text}),
            vit_layers=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            features=frozenset(TEXT_FEATURES[kind] | _vision_features(vision, port=port)),
            uneven=True,
        )
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r} in its vision_config") from error


def _vision_features(vision: Mapping[str, Any], *, port: bool) -> set[str]:
    # What a file leaves out is the default of the class that wrote it.
    given = {
        APART: port,
        NORM_BIAS: vision.get("norm_type", "layer_norm" if port else "rms_norm") == "layer_norm",
        QKV_BIAS: vision.get("attention_bias" if port else "qkv_bias", False),
        QK_NORM: vision.get("use_qk_norm", False) if port else vision.get("qk_normalization", True),
    }
    return {feature for feature, present in given.items() if present}


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    text = language(sizes, pp_size, qkv_bias=TEXT_BIAS in sizes.features, qk_norm=False)
    return (*_vision(sizes), *(_adapted(rule, fused=FUSED_TEXT in sizes.features) for rule in text))


def _adapted(rule: Rule, *, fused: bool) -> Rule:
    if rule.mm in (EMBEDDING, OUTPUT):
        return replace(rule, operation=UnevenSplit(0))
    if fused and isinstance(rule.operation, GroupedQKV):
        # InternLM2 stores what GroupedQKV makes.
        return replace(rule, hf=("model.layers.{i}.attention.wqkv.weight",), operation=Split(0))
    return rule


def _vision(sizes: ModelSizes) -> list[Rule]:
    qkv = ("attn.{q,k,v}_proj" if APART in sizes.features else "attn.qkv", "self_attention.linear_qkv")
    layer: list[Row] = [
        *_norm("norm1", "input_layernorm", sizes),
        *_norm("norm2", "pre_mlp_layernorm", sizes),
        *both(*qkv, UnevenQKV(sizes.vision_heads))[: 2 if QKV_BIAS in sizes.features else 1],
        ("attn.proj.weight", "self_attention.linear_proj.weight", UnevenSplit(1, sizes.vision_heads)),
        ("attn.proj.bias", "self_attention.linear_proj.bias", Copy()),
        *column("mlp.fc1", "mlp.linear_fc1"),
        *row("mlp.fc2", "mlp.linear_fc2"),
        *((name, name, Copy()) for name in ("ls1", "ls2")),
    ]
    if QK_NORM in sizes.features:
        # Over all heads together, and the same on every rank.
        layer += [(f"attn.{x}_norm.weight", f"self_attention.{x}_layernorm.weight", Copy()) for x in "qk"]
    embeddings: list[Row] = [
        *((name, name, Copy()) for name in ("class_embedding", "position_embedding")),
        *copied("patch_embedding", "patch_embedding"),
    ]
    projector = [*copied("0", "norm"), *copied("1", "linear_fc1"), *copied("3", "linear_fc2")]
    return [
        *table("vit", embeddings, hf="vision_model.embeddings.", mm=VISION + "embeddings.", where="first"),
        *table("vit", layer, hf="vision_model.encoder.layers.{i}.", mm=LAYER + "{j}."),
        *table("vit", projector, hf="mlp1.", mm="image_encoder.projector.", where="last"),
    ]


def _norm(hf: str, mm: str, sizes: ModelSizes) -> list[Row]:
    return copied(hf, mm)[: 2 if NORM_BIAS in sizes.features else 1]


# The vision model and the projector are turned into the published names, the language model into Llama's.
NAMES = (
    (r"^(?:model\.)?vision_tower\.", "vision_model."),
    (r"^(vision_model\.encoder)\.layer\.", r"\1.layers."),
    (r"^(vision_model\.embeddings)\.cls_token$", r"\1.class_embedding"),
    (r"^(vision_model\.embeddings)\.position_embeddings$", r"\1.position_embedding"),
    (r"^(vision_model\.embeddings)\.patch_embeddings\.projection\.", r"\1.patch_embedding."),
    (r"^(vision_model\..*)\.attention\.", r"\1.attn."),
    (r"^(vision_model\..*)\.attn\.projection_layer\.", r"\1.attn.proj."),
    (r"^(vision_model\..*)\.layernorm_before\.", r"\1.norm1."),
    (r"^(vision_model\..*)\.layernorm_after\.", r"\1.norm2."),
    (r"^(vision_model\..*)\.lambda_([12])$", r"\1.ls\2"),
    (r"^(?:model\.)?multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.(?:lm_head|output)\.", "lm_head."),
    (r"^model\.tok_embeddings\.", "model.embed_tokens."),
    (r"^(model\.layers\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
    (r"^(model\.layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    (r"^(model\.layers\.\d+)\.attention\.wo\.", r"\1.self_attn.o_proj."),
    (r"^(model\.layers\.\d+)\.feed_forward\.w1\.", r"\1.mlp.gate_proj."),
    (r"^(model\.layers\.\d+)\.feed_forward\.w3\.", r"\1.mlp.up_proj."),
    (r"^(model\.layers\.\d+)\.feed_forward\.w2\.", r"\1.mlp.down_proj."),
)

INTERNVL = Family(
    model_types=("internvl_chat", "internvl"),
    sizes=_sizes,
    rules=_rules,
    unfusable=False,
    renames=tuple((re.compile(pattern), replacement) for pattern, replacement in NAMES),
    layer_names={**LAYER_NAMES, "vit": LAYER},
    uneven=True,
    features={
        NORM_BIAS: LAYER + "0.input_layernorm.bias",
        QKV_BIAS: LAYER + "0.self_attention.linear_qkv.bias",
        QK_NORM: LAYER + "0.self_attention.q_layernorm.",
        TEXT_BIAS: LAYER_NAMES["llm"] + "0.self_attention.linear_qkv.bias",
    },
)
