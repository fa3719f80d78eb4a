"""CogVideoX: text to video and image to video, 2B and 5B, 1.0 and 1.5.

The blocks stand in the place of the language layers (`llm_pp_layers`; the published option is `pp_layers`). A block's
two modulations become one table, image before text: ``norm1`` and ``norm2`` of the image, then those of the text.

Reads diffusers' names (the ``transformer`` folder of a pipeline) and those of the original release (one ``.pt`` file,
without ``config.json``: see `original_config`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mm_convert.errors import CheckpointError, ModelError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.families.lines import Line, qkv, rows
from mm_convert.families.slices import Spans
from mm_convert.families.table import Row, both, column, copied, row, table
from mm_convert.rules import Copy, Rule

ORIGINAL, OFS, POSITIONS = "original names", "ofs embedder", "learned positions"
ORIGINAL_CLASS = "DiffusionTransformer"
PREFIX = "model.diffusion_model."
UNUSED = re.compile(r"^(?!model\.diffusion_model\.)|embed_tokens|word_embeddings|position_embedding")
"""What else stands in an original file: other models, and tables of a language model, which this one never reads."""

# norm1 and norm2 are each shift, scale, gate of the image, then shift, scale, gate of the text.
IMAGE_BEFORE_TEXT = Spans(((0, 0, 3), (1, 0, 3), (0, 3, 6), (1, 3, 6)), 6, "together")


def _modulation(hf: str, mm: str) -> list[Row]:
    return both(hf, mm, IMAGE_BEFORE_TEXT) if "," in hf else column(hf, mm)


START: list[Line] = [
    (copied, "time_embed.0", "time_embedding.linear_1", "time_embed.time_embed.0"),
    (copied, "time_embed.2", "time_embedding.linear_2", "time_embed.time_embed.2"),
    (copied, "mixins.patch_embed.proj", "patch_embed.proj", "patch_embed.proj"),
    (copied, "mixins.patch_embed.text_proj", "patch_embed.text_proj", "caption_projection"),
]
OFS_EMBEDDER: list[Line] = [
    (copied, "ofs_embed.0", "ofs_embedding.linear_1", "ofs_embed.0"),
    (copied, "ofs_embed.2", "ofs_embedding.linear_2", "ofs_embed.2"),
]
BLOCK: list[Line] = [
    (_modulation, "mixins.adaln_layer.adaLN_modulations.{i}.1", "norm{1,2}.linear", "scale_shift_table.1"),
    (copied, "transformer.layers.{i}.input_layernorm", "norm1.norm", "norm1"),
    (qkv, "transformer.layers.{i}.attention.query_key_value", "attn1.to_{q,k,v}", "self_atten.proj_qkv"),
    (copied, "mixins.adaln_layer.query_layernorm_list.{i}", "attn1.norm_q", "self_atten.q_norm"),
    (copied, "mixins.adaln_layer.key_layernorm_list.{i}", "attn1.norm_k", "self_atten.k_norm"),
    (row, "transformer.layers.{i}.attention.dense", "attn1.to_out.0", "self_atten.proj_out"),
    (copied, "transformer.layers.{i}.post_attention_layernorm", "norm2.norm", "norm2"),
    (column, "transformer.layers.{i}.mlp.dense_h_to_4h", "ff.net.0.proj", "ff.net.0.proj"),
    (row, "transformer.layers.{i}.mlp.dense_4h_to_h", "ff.net.2", "ff.net.2"),
]
END: list[Line] = [
    (copied, "transformer.final_layernorm", "norm_final", "norm_final"),
    (copied, "mixins.final_layer.norm_final", "norm_out.norm", "norm_out"),
    (column, "mixins.final_layer.adaLN_modulation.1", "norm_out.linear", "adaLN_modulation.1"),
    (copied, "mixins.final_layer.linear", "proj_out", "proj_out_linear"),
]
LEARNED_POSITIONS = {True: "mixins.pos_embed.pos_embedding", False: "patch_embed.pos_embedding"}
# Numbers that follow from the model's sizes; no file of diffusers holds them.
ROTARY: list[Row] = [(f"mixins.pos_embed.freqs_{part}", f"pos_embed.freqs_{part}", Copy()) for part in ("cos", "sin")]


def original_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What diffusers' ``config.json`` would say of a file of the original release.

    Args:
        shapes: the file's tensors.

    Raises:
        CheckpointError: these are not the tensors of a CogVideoX model.
    """
    try:
        hidden = shapes[PREFIX + "mixins.patch_embed.proj.weight"][0]
        head = shapes[PREFIX + "mixins.adaln_layer.query_layernorm_list.0.weight"][0]
    except KeyError as error:
        raise CheckpointError(f"this is no CogVideoX model of the original release: it has no {error}") from error
    layers = {name.split(".")[4] for name in shapes if name.startswith(PREFIX + "transformer.layers.")}
    return {
        "_class_name": ORIGINAL_CLASS,
        "num_layers": len(layers),
        "num_attention_heads": hidden // head,
        "use_learned_positional_embeddings": PREFIX + LEARNED_POSITIONS[True] in shapes,
        "ofs_embed_dim": shapes.get(PREFIX + "ofs_embed.0.weight", (None,))[0],
    }


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    features = {
        feature
        for feature, there in (
            (ORIGINAL, config.get("_class_name") == ORIGINAL_CLASS),
            (OFS, config.get("ofs_embed_dim")),
            (POSITIONS, config.get("use_learned_positional_embeddings")),
        )
        if there
    }
    try:
        return ModelSizes(
            llm_layers=config["num_layers"],
            key_value_heads=config["num_attention_heads"],
            features=frozenset(features),
        )
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    original = ORIGINAL in sizes.features
    prefix, block = (PREFIX, PREFIX) if original else ("", "transformer_blocks.{i}.")

    start = rows(START + (OFS_EMBEDDER if OFS in sizes.features else []), original=original)
    if POSITIONS in sizes.features:
        start.append((LEARNED_POSITIONS[original], "pos_embed.pos_embedding", Copy()))
    rotary = table("llm", ROTARY, hf=prefix, where="start")
    return (
        *table("llm", start, hf=prefix, where="start"),
        *(replace(rule, optional=True) for rule in rotary),
        *table("llm", rows(BLOCK, original=original), hf=block, mm="videodit_blocks.{j}."),
        *table("llm", rows(END, original=original), hf=prefix, where="end"),
    )


COGVIDEOX = Family(
    model_types=(),
    class_names=("CogVideoXTransformer3DModel", ORIGINAL_CLASS),
    sizes=_sizes,
    rules=_rules,
    layer_names={"llm": "videodit_blocks."},
    features={OFS: "ofs_embed.", POSITIONS: "pos_embed.pos_embedding"},
    pipeline="plain",
    original_config=original_config,
    original_unused=UNUSED,
    generative=True,
)
