"""Qwen2.5-VL: 3B, 7B, 32B and 72B.

Names and shapes are those of the published checkpoints and of MindSpeed MM's training code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from mm_convert.errors import ModelError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.rules import Copy, Gated, GroupedQKV, Operation, Rule, Split, StackedQKV

Where = Literal["layer", "first", "last"]

HF_LLM = "model.layers.{i}."
MM_LLM = "text_decoder.decoder.layers.{j}."
HF_VIT = "visual.blocks.{i}."
MM_VIT = "image_encoder.encoder.blocks.layers.{j}."
PROJECTOR = "image_encoder.projector."
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
OUTPUT = "text_decoder.output_layer.weight"


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    # Published files are flat; transformers >= 4.52 nests the language part under `text_config`.
    text = {**config, **(config.get("text_config") or {})}
    vision = config.get("vision_config") or {}
    try:
        return ModelSizes(
            llm_layers=text["num_hidden_layers"],
            vit_layers=vision["depth"],
            key_value_heads=text["num_key_value_heads"],
            vision_heads=vision["num_heads"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error


def _llm(hf: str | tuple[str, ...], mm: str, operation: Operation, where: Where = "layer") -> Rule:
    return Rule(hf=(hf,) if isinstance(hf, str) else hf, mm=mm, operation=operation, part="llm", where=where)


def _vit(hf: str | tuple[str, ...], mm: str, operation: Operation, where: Where = "layer") -> Rule:
    return replace(_llm(hf, mm, operation, where), part="vit")


def _language(sizes: ModelSizes) -> list[Rule]:
    qkv = GroupedQKV(sizes.key_value_heads)
    hf, mm = HF_LLM, MM_LLM
    return [
        _llm(hf + "input_layernorm.weight", mm + "input_layernorm.weight", Copy()),
        _llm(hf + "post_attention_layernorm.weight", mm + "pre_mlp_layernorm.weight", Copy()),
        _llm(_each(hf + "self_attn.{}_proj.weight", "qkv"), mm + "self_attention.linear_qkv.weight", qkv),
        _llm(_each(hf + "self_attn.{}_proj.bias", "qkv"), mm + "self_attention.linear_qkv.bias", qkv),
        _llm(hf + "self_attn.o_proj.weight", mm + "self_attention.linear_proj.weight", Split(1)),
        _llm(_each(hf + "mlp.{}_proj.weight", ("gate", "up")), mm + "mlp.linear_fc1.weight", Gated()),
        _llm(hf + "mlp.down_proj.weight", mm + "mlp.linear_fc2.weight", Split(1)),
        _llm("model.norm.weight", "text_decoder.decoder.final_layernorm.weight", Copy(), "last"),
    ]


def _vision(sizes: ModelSizes) -> list[Rule]:
    qkv = StackedQKV(sizes.vision_heads)
    hf, mm = HF_VIT, MM_VIT
    return [
        _vit("visual.patch_embed.proj.weight", "image_encoder.encoder.patch_embed.proj.weight", Copy(), "first"),
        _vit(hf + "norm1.weight", mm + "input_layernorm.weight", Copy()),
        _vit(hf + "norm2.weight", mm + "pre_mlp_layernorm.weight", Copy()),
        _vit(hf + "attn.qkv.weight", mm + "self_attention.linear_qkv.weight", qkv),
        _vit(hf + "attn.qkv.bias", mm + "self_attention.linear_qkv.bias", qkv),
        _vit(hf + "attn.proj.weight", mm + "self_attention.linear_proj.weight", Split(1)),
        _vit(hf + "attn.proj.bias", mm + "self_attention.linear_proj.bias", Copy()),
        _vit(_each(hf + "mlp.{}_proj.weight", ("gate", "up")), mm + "mlp.linear_fc1.weight", Gated()),
        _vit(_each(hf + "mlp.{}_proj.bias", ("gate", "up")), mm + "mlp.linear_fc1.bias", Gated()),
        _vit(hf + "mlp.down_proj.weight", mm + "mlp.linear_fc2.weight", Split(1)),
        _vit(hf + "mlp.down_proj.bias", mm + "mlp.linear_fc2.bias", Copy()),
        _vit("visual.merger.ln_q.weight", PROJECTOR + "layernorm.weight", Copy(), "last"),
        _vit("visual.merger.mlp.0.weight", PROJECTOR + "encoder.linear_fc1.weight", Split(0), "last"),
        _vit("visual.merger.mlp.0.bias", PROJECTOR + "encoder.linear_fc1.bias", Split(0), "last"),
        _vit("visual.merger.mlp.2.weight", PROJECTOR + "encoder.linear_fc2.weight", Split(1), "last"),
        _vit("visual.merger.mlp.2.bias", PROJECTOR + "encoder.linear_fc2.bias", Copy(), "last"),
    ]


def _vocabulary(sizes: ModelSizes, pp_size: int) -> list[Rule]:
    embedding = _llm("model.embed_tokens.weight", EMBEDDING, Split(0), "first")
    if not sizes.tied:
        return [embedding, _llm("lm_head.weight", OUTPUT, Split(0), "last")]
    # Trainers save a tied lm_head as well: it must then equal the embedding.
    spare = replace(_llm("lm_head.weight", EMBEDDING, Split(0), "first"), optional=True)
    copied = [_llm("model.embed_tokens.weight", OUTPUT, Split(0), "last")] if pp_size > 1 else []
    return [embedding, spare, *copied]


def _each(pattern: str, parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(pattern.replace("{}", part) for part in parts)


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    return (*_vision(sizes), *_language(sizes), *_vocabulary(sizes, pp_size))


QWEN2_5_VL = Family(
    model_types=("qwen2_5_vl",),
    sizes=_sizes,
    rules=_rules,
    renames=(
        (re.compile(r"^model\.visual\."), "visual."),
        (re.compile(r"^model\.language_model\."), "model."),
    ),
)
