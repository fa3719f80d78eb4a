"""Wan2.1: text to video 1.3B and 14B, image to video and first-and-last-frame to video 14B.

No tensor changes its value or shape, and none is divided over tensor-parallel ranks: a pure renaming, with
the blocks dealt out over a pipeline. The blocks stand in the place of the language layers
(`llm_pp_layers`; the published option is `pp_layers`).

Reads diffusers' names (the ``transformer`` folder of a pipeline; `_class_name` WanTransformer3DModel) and
those of the original release (`_class_name` WanModel).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mm_convert.errors import ModelError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.families.table import Row, copied, table
from mm_convert.rules import Copy, Rule

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
    return ModelSizes(llm_layers=layers, features=frozenset(features), divided=False)


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    image = IMAGE in sizes.features
    start = START + (IMAGE_EMBEDDER if image else []) + (IMAGE_POSITIONS if POSITIONS in sizes.features else [])
    block = BLOCK + (IMAGE_ATTENTION if image else [])
    return (
        *table("llm", start, where="start"),
        *table("llm", block, hf="blocks.{i}.", mm="blocks.{j}."),
        *table("llm", END, where="end"),
    )


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

WAN = Family(
    model_types=("t2v", "i2v", "flf2v"),
    class_names=("WanTransformer3DModel", "WanModel"),
    sizes=_sizes,
    rules=_rules,
    renames=tuple((re.compile(pattern), replacement) for pattern, replacement in ORIGINAL_NAMES),
)
