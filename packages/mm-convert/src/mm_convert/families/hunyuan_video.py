"""HunyuanVideo: text to video and image to video, 13B.

Two kinds of blocks, each with its own numbering: double-stream blocks stand in the place of the language layers,
single-stream blocks in the place of the vision layers. There is no pipeline.

Reads the names of the original release (one ``.pt`` file, without ``config.json``: see `original_config`) and those
of diffusers (the ``transformer`` folder of a pipeline). They differ in values as well: diffusers keeps query, key and
value apart, separates the single blocks' `linear1`, and stores scale before shift in the last modulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_convert.errors import CheckpointError, ModelError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.families.lines import Line, qkv, rows
from mm_convert.families.slices import Spans, joined
from mm_convert.families.table import Row, both, column, copied, row, table
from mm_convert.rules import Copy, Rule

ORIGINAL, GUIDANCE = "original names", "guidance embedder"
ORIGINAL_CLASS = "HYVideoDiffusionTransformer"
REFINER_BLOCKS = 2  # a constant of the training code
MLP_RATIO = 4  # of every published model; linear1 is [3 + MLP_RATIO] hidden sizes high, linear2 [1 + MLP_RATIO] wide

LINEAR1_QKV = Spans(((0, 0, 1), (0, 1, 2), (0, 2, 3)), 3 + MLP_RATIO, "each")
LINEAR1_MLP = Spans(((0, 3, 3 + MLP_RATIO),), 3 + MLP_RATIO, "each")
LINEAR2 = Spans(((0, 0, 1), (0, 1, 1 + MLP_RATIO)), 1 + MLP_RATIO, "each", dim=1)
SCALE_BEFORE_SHIFT = Spans(((0, 1, 2), (0, 0, 1)), 2, "together")


def _weight(hf: str, mm: str) -> list[Row]:
    """A norm without a bias."""
    return [(f"{hf}.weight", f"{mm}.weight", Copy())]


def _undivided_qkv(hf: str, mm: str) -> list[Row]:
    return both(hf, mm, joined(3, "not") if "," in hf else Copy())


def _linear2(hf: str, mm: str) -> list[Row]:
    """Its columns take the attention's output, then the MLP's; each part is divided by itself."""
    return [(f"{hf}.weight", f"{mm}.weight", LINEAR2), (f"{hf}.bias", f"{mm}.bias", Copy())]


OUTSIDE: list[Line] = [
    (copied, "img_in.proj", "x_embedder.proj", "img_in.proj"),
    (copied, "time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1", "time_in.time_embed.0"),
    (copied, "time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2", "time_in.time_embed.2"),
    (column, "vector_in.in_layer", "time_text_embed.text_embedder.linear_1", "vector_in.fc1"),
    (row, "vector_in.out_layer", "time_text_embed.text_embedder.linear_2", "vector_in.fc2"),
    (column, "final_layer.linear", "proj_out", "proj_out"),
]
GUIDANCE_EMBEDDER: list[Line] = [
    (copied, "guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1", "guidance_in.time_embed.0"),
    (copied, "guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2", "guidance_in.time_embed.2"),
]
TEXT: list[Line] = [
    (copied, "input_embedder", "proj_in", "input_embedder"),
    (copied, "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1", "t_embedder.time_embed.0"),
    (copied, "t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2", "t_embedder.time_embed.2"),
    (copied, "c_embedder.linear_1", "time_text_embed.text_embedder.linear_1", "c_embedder.linear_1"),
    (copied, "c_embedder.linear_2", "time_text_embed.text_embedder.linear_2", "c_embedder.linear_2"),
]
REFINER: list[Line] = [
    (copied, "norm1", "norm1", "norm1"),
    (_undivided_qkv, "self_attn_qkv", "attn.to_{q,k,v}", "self_attn_qkv"),
    (copied, "self_attn_proj", "attn.to_out.0", "self_attn_proj"),
    (copied, "norm2", "norm2", "norm2"),
    (copied, "mlp.fc1", "ff.net.0.proj", "mlp.fc1"),
    (copied, "mlp.fc2", "ff.net.2", "mlp.fc2"),
    (copied, "adaLN_modulation.1", "norm_out.linear", "adaLN_modulation.1"),
]
DOUBLE: list[Line] = [
    (column, "img_mod.linear", "norm1.linear", "img_mod.linear"),
    (qkv, "img_attn_qkv", "attn.to_{q,k,v}", "img_attn_qkv"),
    (_weight, "img_attn_q_norm", "attn.norm_q", "img_attn_q_norm"),
    (_weight, "img_attn_k_norm", "attn.norm_k", "img_attn_k_norm"),
    (row, "img_attn_proj", "attn.to_out.0", "img_attn_proj"),
    (column, "img_mlp.fc1", "ff.net.0.proj", "img_mlp.fc1"),
    (row, "img_mlp.fc2", "ff.net.2", "img_mlp.fc2"),
    (column, "txt_mod.linear", "norm1_context.linear", "txt_mod.linear"),
    (qkv, "txt_attn_qkv", "attn.add_{q,k,v}_proj", "txt_attn_qkv"),
    (_weight, "txt_attn_q_norm", "attn.norm_added_q", "txt_attn_q_norm"),
    (_weight, "txt_attn_k_norm", "attn.norm_added_k", "txt_attn_k_norm"),
    (row, "txt_attn_proj", "attn.to_add_out", "txt_attn_proj"),
    (column, "txt_mlp.fc1", "ff_context.net.0.proj", "txt_mlp.fc1"),
    (row, "txt_mlp.fc2", "ff_context.net.2", "txt_mlp.fc2"),
]
SINGLE: list[Line] = [
    (column, "modulation.linear", "norm.linear", "modulation.linear"),
    (_weight, "q_norm", "attn.norm_q", "q_norm"),
    (_weight, "k_norm", "attn.norm_k", "k_norm"),
    (_linear2, "linear2", "proj_out", "linear2"),
]
LINEAR1 = {
    True: [*both("linear1", "linear1_qkv", LINEAR1_QKV), *both("linear1", "linear1_mlp", LINEAR1_MLP)],
    False: [*qkv("attn.to_{q,k,v}", "linear1_qkv"), *column("proj_mlp", "linear1_mlp")],
}
LAST_MODULATION = {
    True: column("final_layer.adaLN_modulation.1", "adaLN_modulation.1"),
    False: both("norm_out.linear", "adaLN_modulation.1", SCALE_BEFORE_SHIFT),
}


def original_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What diffusers' ``config.json`` would say of a file of the original release.

    Args:
        shapes: the file's tensors.

    Raises:
        CheckpointError: these are not the tensors of a HunyuanVideo model.
    """
    try:
        hidden, head = shapes["img_in.proj.weight"][0], shapes["single_blocks.0.q_norm.weight"][0]
    except KeyError as error:
        raise CheckpointError(f"this is no HunyuanVideo model of the original release: it has no {error}") from error
    double, single, refiner = (
        len({name.split(".")[place] for name in shapes if name.startswith(prefix)})
        for prefix, place in (("double_blocks.", 1), ("single_blocks.", 1), ("txt_in.individual_token_refiner.", 3))
    )
    return {
        "_class_name": ORIGINAL_CLASS,
        "num_layers": double,
        "num_single_layers": single,
        "num_refiner_layers": refiner,
        "num_attention_heads": hidden // head,
        "guidance_embeds": "guidance_in.mlp.0.weight" in shapes,
    }


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    for name, only in (("mlp_ratio", MLP_RATIO), ("num_refiner_layers", REFINER_BLOCKS)):
        if config.get(name, only) != only:
            raise ModelError(f"config.json has {name} {config[name]}; the training code takes only {only}")
    features = {GUIDANCE} if config.get("guidance_embeds") else set()
    if config.get("_class_name") == ORIGINAL_CLASS:
        features |= {ORIGINAL}
    try:
        return ModelSizes(
            llm_layers=config["num_layers"],
            vit_layers=config["num_single_layers"],
            key_value_heads=config["num_attention_heads"],
            features=frozenset(features),
        )
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]!r}") from error


def _rules(sizes: ModelSizes, pp_size: int) -> tuple[Rule, ...]:
    original = ORIGINAL in sizes.features
    double, single, text, refiner = (
        ("double_blocks.{i}.", "single_blocks.{i}.", "txt_in.", "individual_token_refiner.blocks.")
        if original
        else (
            "transformer_blocks.{i}.",
            "single_transformer_blocks.{i}.",
            "context_embedder.",
            "token_refiner.refiner_blocks.",
        )
    )
    outside = OUTSIDE + (GUIDANCE_EMBEDDER if GUIDANCE in sizes.features else [])
    rules = [
        *table("llm", rows(outside, original=original) + LAST_MODULATION[original], where="start"),
        *table("llm", rows(TEXT, original=original), hf=text, mm="txt_in.", where="start"),
        *table("llm", rows(DOUBLE, original=original), hf=double, mm="double_blocks.{j}."),
        *table("vit", rows(SINGLE, original=original) + LINEAR1[original], hf=single, mm="single_blocks.{j}."),
    ]
    for k in range(REFINER_BLOCKS):
        mm = f"txt_in.individual_token_refiner.blocks.{k}."
        rules += table("llm", rows(REFINER, original=original), hf=f"{text}{refiner}{k}.", mm=mm, where="start")
    return tuple(rules)


HUNYUAN_VIDEO = Family(
    model_types=(),
    class_names=("HunyuanVideoTransformer3DModel", ORIGINAL_CLASS),
    sizes=_sizes,
    rules=_rules,
    layer_names={"llm": "double_blocks.", "vit": "single_blocks."},
    features={GUIDANCE: "guidance_in."},
    pipeline="none",
    original_config=original_config,
    generative=True,
)
