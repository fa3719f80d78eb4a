"""What the Qwen models share: sizes, the language model, the vocabulary, the vision attention.

Names and shapes are those of the published checkpoints and of MindSpeed MM's training code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mm_convert.errors import ModelError
from mm_convert.families.family import ModelSizes, Spelling
from mm_convert.families.table import Row, both, table
from mm_convert.rules import Copy, Gated, GroupedQKV, Rule, Split, Stacked, StackedQKV, Transposed

LAYERS = "text_decoder.decoder.layers.{j}."
FINAL_NORM = "text_decoder.decoder.final_layernorm.weight"
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
OUTPUT = "text_decoder.output_layer.weight"
BLOCKS = "image_encoder.encoder.blocks.layers.{j}."
PATCHES: Row = ("patch_embed.proj.weight", "patch_embed.proj.weight", Copy())

NEW_NAMES = (
    (re.compile(r"^model\.visual\."), "visual."),
    (re.compile(r"^model\.language_model\."), "model."),
)
"""The names that transformers >= 4.52 holds in memory, turned into those of the published files."""

OLD_AND_NEW = {
    "old": Spelling(),
    "new": Spelling(
        renames=(
            (re.compile(r"^model\."), "model.language_model."),
            (re.compile(r"^visual\."), "model.visual."),
        )
    ),
}
"""The published names, and those that transformers >= 4.52 holds in memory."""

QKV_BIAS = ("self_attn.{q,k,v}_proj.bias", "self_attention.linear_qkv.bias")
QK_NORM: list[Row] = [
    ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", Copy()),
    ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", Copy()),
]
"""Qwen3's norms of query and key, over one head."""


def text_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """The sizes of a text model.

    Raises:
        ModelError: a number is missing.
    """
    # Published files are flat; transformers >= 4.52 nests the language part under `text_config`.
    text = {**config, **(config.get("text_config") or {})}
    try:
        return ModelSizes(
            llm_layers=text["num_hidden_layers"],
            vit_layers=0,
            key_value_heads=text["num_key_value_heads"],
            vision_heads=0,
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vocabulary=text.get("vocab_size") or 0,
        )
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error


def vision_language_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """The sizes of a vision-language model.

    Raises:
        ModelError: a number is missing.
    """
    vision = config.get("vision_config") or {}
    try:
        return replace(
            text_sizes(config),
            vit_layers=vision["depth"],
            vision_heads=vision["num_heads"],
            deepstack=tuple(vision.get("deepstack_visual_indexes") or ()),
        )
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error


def expert_sizes(config: Mapping[str, Any], sizes: ModelSizes) -> ModelSizes:
    """The sizes of a model of which every language layer has experts.

    Raises:
        ModelError: a number is missing, or some layers are dense.
    """
    text = {**config, **(config.get("text_config") or {})}
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        raise ModelError(
            f"config.json has mlp_only_layers {text.get('mlp_only_layers')} and decoder_sparse_step"
            f" {text.get('decoder_sparse_step')}: only models whose layers all have experts can be converted"
        )
    try:
        matrix = (text["hidden_size"], text["moe_intermediate_size"])
        active = text.get("num_experts_per_tok", 1)
        # transformers 5 writes it under another name.
        experts = text.get("num_local_experts") or text["num_experts"]
        return replace(sizes, experts=experts, experts_per_token=active, expert_matrix=matrix)
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error


DENSE_MLP: list[Row] = [
    ("mlp.{gate,up}_proj.weight", "mlp.linear_fc1.weight", Gated()),
    ("mlp.down_proj.weight", "mlp.linear_fc2.weight", Split(1)),
]
ROUTER: Row = ("mlp.gate.weight", "mlp.router.weight", Copy())
SEPARATE_EXPERTS: list[Row] = [
    ROUTER,
    ("mlp.experts.{x}.{gate,up}_proj.weight", "mlp.experts.local_experts.{y}.linear_fc1.weight", Gated()),
    ("mlp.experts.{x}.down_proj.weight", "mlp.experts.local_experts.{y}.linear_fc2.weight", Split(1)),
]


def stacked_experts(sizes: ModelSizes) -> list[Row]:
    """Experts one over another, ``[experts, in, out]`` in the published files, ``[experts, out, in]`` in memory."""
    hidden, inner = sizes.expert_matrix
    experts = "mlp.experts.local_experts.{y}."
    return [
        ROUTER,
        ("mlp.experts.gate_up_proj[{x}]", experts + "linear_fc1.weight", Transposed(Stacked(2), inputs=hidden)),
        ("mlp.experts.down_proj[{x}]", experts + "linear_fc2.weight", Transposed(Split(1), inputs=inner)),
    ]


def language(
    sizes: ModelSizes,
    pp_size: int,
    *,
    prefix: str = "model.",
    qkv_bias: bool,
    qk_norm: bool,
    mlp: Sequence[Row] = DENSE_MLP,
) -> list[Rule]:
    """The language model.

    Args:
        sizes: the model's numbers.
        pp_size: number of pipeline ranks.
        prefix: what the Hugging Face names begin with.
        qkv_bias: query, key and value have biases (Qwen2, Qwen2.5).
        qk_norm: query and key are normed (Qwen3).
        mlp: rows of a layer's feed-forward part.
    """
    qkv = GroupedQKV(sizes.key_value_heads)
    layer: list[Row] = [
        ("input_layernorm.weight", "input_layernorm.weight", Copy()),
        ("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", Copy()),
        ("self_attn.{q,k,v}_proj.weight", "self_attention.linear_qkv.weight", qkv),
        *([(*QKV_BIAS, qkv)] if qkv_bias else []),
        *(QK_NORM if qk_norm else []),
        ("self_attn.o_proj.weight", "self_attention.linear_proj.weight", Split(1)),
        *mlp,
    ]
    return [
        *table("llm", layer, hf=prefix + "layers.{i}.", mm=LAYERS),
        *table("llm", [(prefix + "norm.weight", FINAL_NORM, Copy())], where="last"),
        *_vocabulary(prefix + "embed_tokens.weight", tied=sizes.tied, pp_size=pp_size),
    ]


def vision(patches: list[Row], block: list[Row], merger: list[Row], *, prefix: str = "visual.") -> list[Rule]:
    """The vision model.

    Args:
        patches: what stands before the first block.
        block: a block.
        merger: what brings patches together and into the language model.
        prefix: what the Hugging Face names begin with.
    """
    return [
        *table("vit", patches, hf=prefix, mm="image_encoder.encoder.", where="first"),
        *table("vit", block, hf=prefix + "blocks.{i}.", mm=BLOCKS),
        *table("vit", merger, hf=prefix + "merger.", mm="image_encoder.projector.", where="last"),
    ]


def vision_qkv(sizes: ModelSizes) -> list[Row]:
    """The vision attention's fused query, key and value."""
    return both("attn.qkv", "self_attention.linear_qkv", StackedQKV(sizes.vision_heads))


def _vocabulary(source: str, *, tied: bool, pp_size: int) -> list[Rule]:
    embedding = table("llm", [(source, EMBEDDING, Split(0))], where="first")
    if not tied:
        return embedding + table("llm", [("lm_head.weight", OUTPUT, Split(0))], where="last")
    # Trainers save a tied lm_head as well: it must then equal the embedding.
    [spare] = table("llm", [("lm_head.weight", EMBEDDING, Split(0))], where="first")
    copied = table("llm", [(source, OUTPUT, Split(0))], where="last") if pp_size > 1 else []
    return [*embedding, replace(spare, optional=True), *copied]
