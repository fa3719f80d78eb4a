"""Wan2.1: text to video 1.3B and 14B, image to video and first-and-last-frame to video 14B.

No tensor changes its value or shape, and none is divided over tensor-parallel ranks: a pure renaming, with
the blocks dealt out over a pipeline. The blocks stand in the place of the language layers
(`llm_pp_layers`; the published option is `pp_layers`).

Reads and writes diffusers' names (the ``transformer`` folder of a pipeline; `_class_name` WanTransformer3DModel)
and those of the original release (`_class_name` WanModel), each with the ``config.json`` that goes with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mm_convert.errors import ModelError
from mm_convert.families.family import Family, ModelSizes, Spelling
from mm_convert.families.table import Row, copied, table
from mm_convert.rules import Copy, Rule, Shape

IMAGE, POSITIONS = "image embedder", "image positions"
FEATURES = {"i2v": {IMAGE}, "flf2v": {IMAGE, POSITIONS}}

START = [
    *copied("patch_embedding", "patch_embedding"),
    *copied("condition_embedder.text_embedder.linear_1", "text_embedding.linear_1"),
    *copied("condition_embedder.text_embedder.linear_2", "text_embedding.linear_2"),
    *copied("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    *copied("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    *copied("condition_embedder.time_proj", "time_projection.1"),
]
IMAGE_EMBEDDER = [
    *copied("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    *copied("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    *copied("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    *copied("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
]
IMAGE_POSITIONS: list[Row] = [("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos", Copy())]
END = [("scale_shift_table", "head.modulation", Copy()), *copied("proj_out", "head.head")]


def _attention(hf: str, mm: str) -> list[Row]:
    return [
        *(row for part in "qkv" for row in copied(f"{hf}.to_{part}", f"{mm}.proj_{part}")),
        *copied(f"{hf}.to_out.0", f"{mm}.proj_out"),
        (f"{hf}.norm_q.weight", f"{mm}.q_norm.weight", Copy()),
        (f"{hf}.norm_k.weight", f"{mm}.k_norm.weight", Copy()),
    ]


BLOCK = [
    ("scale_shift_table", "modulation", Copy()),
    *_attention("attn1", "self_attn"),
    *_attention("attn2", "cross_attn"),
    *copied("norm2", "norm3"),
    *copied("ffn.net.0.proj", "ffn.0"),
    *copied("ffn.net.2", "ffn.2"),
]
IMAGE_ATTENTION = [
    *copied("attn2.add_k_proj", "cross_attn.k_img"),
    *copied("attn2.add_v_proj", "cross_attn.v_img"),
    ("attn2.norm_added_k.weight", "cross_attn.k_norm_img.weight", Copy()),
]


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    kind = config.get("model_type")
    features = FEATURES.get(kind, set()) if kind else set()
    if config.get("image_dim") is not None:
        features = features | {IMAGE}
    if config.get("pos_embed_seq_len") is not None:
        features = features | {POSITIONS}
    try:
        layers = config["num_layers"]
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error
    return ModelSizes(llm_layers=layers, features=frozenset(features))


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    image = IMAGE in sizes.features
    start = START + (IMAGE_EMBEDDER if image else []) + (IMAGE_POSITIONS if POSITIONS in sizes.features else [])
    block = BLOCK + (IMAGE_ATTENTION if image else [])
    return (
        *table("llm", start, where="start"),
        *table("llm", block, hf="blocks.{i}.", mm="blocks.{j}."),
        *table("llm", END, where="end"),
    )


def _compiled(names: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in names)


# Original names, turned into diffusers'. The second and the third norm have changed places.
ORIGINAL_NAMES = (
    (r"^(text|time)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
    (r"^(text|time)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"^(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
    (r"(\.attn\d)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attn\d)\.o\.", r"\1.to_out.0."),
    (r"(\.attn2)\.([kv])_img\.", r"\1.add_\2_proj."),
    (r"(\.attn2)\.norm_k_img\.", r"\1.norm_added_k."),
)

DIFFUSERS_NAMES = (
    (r"^condition_embedder\.(text|time)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"^(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
    (r"(_attn)\.to_([qkv])\.", r"\1.\2."),
    (r"(_attn)\.to_out\.0\.", r"\1.o."),
    (r"(_attn)\.add_([kv])_proj\.", r"\1.\2_img."),
    (r"(_attn)\.norm_added_k\.", r"\1.norm_k_img."),
)
"""Diffusers' names, turned into the original ones."""

# Constants of the published code, which only one of the two configurations states.
ORIGINAL_CONSTANTS = {"text_len": 512}
DIFFUSERS_CONSTANTS = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
BOTH = ("eps", "ffn_dim", "freq_dim", "num_layers")


def _original_config(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    if config.get("_class_name") != "WanTransformer3DModel":
        return dict(config)
    features = _sizes(config).features
    try:
        return {
            "_class_name": "WanModel",
            "model_type": "flf2v" if POSITIONS in features else "i2v" if IMAGE in features else "t2v",
            "dim": config["num_attention_heads"] * config["attention_head_dim"],
            "num_heads": config["num_attention_heads"],
            "in_dim": config["in_channels"],
            "out_dim": config["out_channels"],
            **{name: config[name] for name in BOTH},
            **ORIGINAL_CONSTANTS,
        }
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error


def _diffusers_config(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Sizes of the text and image embedders are not in the original configuration: the tensors show them."""
    if config.get("_class_name") == "WanTransformer3DModel":
        return dict(config)
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    try:
        return {
            "_class_name": "WanTransformer3DModel",
            "num_attention_heads": config["num_heads"],
            "attention_head_dim": config["dim"] // config["num_heads"],
            "in_channels": config["in_dim"],
            "out_channels": config["out_dim"],
            "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
            "patch_size": list(shapes["patch_embedding.weight"][2:]),
            "image_dim": image[0] if image else None,
            "added_kv_proj_dim": config["dim"] if image else None,
            "pos_embed_seq_len": positions[1] if positions else None,
            **{name: config[name] for name in BOTH},
            **DIFFUSERS_CONSTANTS,
        }
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error


WAN = Family(
    model_types=("t2v", "i2v", "flf2v"),
    class_names=("WanTransformer3DModel", "WanModel"),
    sizes=_sizes,
    rules=_rules,
    renames=_compiled(ORIGINAL_NAMES),
    spellings={
        "diffusers": Spelling(config=_diffusers_config),
        "original": Spelling(renames=_compiled(DIFFUSERS_NAMES), config=_original_config),
    },
    layer_names={"llm": "blocks."},
    features={IMAGE: "img_emb.proj.", POSITIONS: "img_emb.emb_pos"},
    divided=False,
    generative=True,
)
