"""HunyuanVideo's table, on tensors in memory: both name styles, to the published layout and back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from in_memory_plans import Ranks, convert, recorded, same
from recorded_models import random_tensors
from tiny_checkpoint import Tensors

from mm_convert import CheckpointError, Layout, LayoutError, ModelError
from mm_convert.families.hunyuan_video import HUNYUAN_VIDEO, original_config

HIDDEN = 16
KINDS = ["hunyuan_video", "hunyuan_video_i2v"]

# The original release's names of diffusers' layers, as both projects publish them. What is fused stands below.
ORIGINAL = {
    "context_embedder.proj_in.": "txt_in.input_embedder.",
    "context_embedder.time_text_embed.timestep_embedder.linear_1.": "txt_in.t_embedder.mlp.0.",
    "context_embedder.time_text_embed.timestep_embedder.linear_2.": "txt_in.t_embedder.mlp.2.",
    "context_embedder.time_text_embed.text_embedder.": "txt_in.c_embedder.",
    "context_embedder.token_refiner.refiner_blocks.": "txt_in.individual_token_refiner.blocks.",
    "x_embedder.": "img_in.",
    "time_text_embed.timestep_embedder.linear_1.": "time_in.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "time_in.mlp.2.",
    "time_text_embed.guidance_embedder.linear_1.": "guidance_in.mlp.0.",
    "time_text_embed.guidance_embedder.linear_2.": "guidance_in.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
    "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
    "single_transformer_blocks.": "single_blocks.",
    "transformer_blocks.": "double_blocks.",
}
INSIDE = {
    "double_blocks.": {
        "attn.norm_added_q.": "txt_attn_q_norm.",
        "attn.norm_added_k.": "txt_attn_k_norm.",
        "attn.norm_q.": "img_attn_q_norm.",
        "attn.norm_k.": "img_attn_k_norm.",
        "attn.to_out.0.": "img_attn_proj.",
        "attn.to_add_out.": "txt_attn_proj.",
        "norm1.linear.": "img_mod.linear.",
        "norm1_context.linear.": "txt_mod.linear.",
        "ff.net.0.proj.": "img_mlp.fc1.",
        "ff.net.2.": "img_mlp.fc2.",
        "ff_context.net.0.proj.": "txt_mlp.fc1.",
        "ff_context.net.2.": "txt_mlp.fc2.",
    },
    "single_blocks.": {
        "attn.norm_q.": "q_norm.",
        "attn.norm_k.": "k_norm.",
        "norm.linear.": "modulation.linear.",
        "proj_out.": "linear2.",
    },
    "txt_in.": {
        "attn.to_out.0.": "self_attn_proj.",
        "ff.net.0.proj.": "mlp.fc1.",
        "ff.net.2.": "mlp.fc2.",
        "norm_out.linear.": "adaLN_modulation.1.",
    },
}
# MindSpeed MM's names of the original layers.
RENAMED = {
    ".t_embedder.mlp.": ".t_embedder.time_embed.",
    "time_in.mlp.": "time_in.time_embed.",
    "guidance_in.mlp.": "guidance_in.time_embed.",
    "vector_in.in_layer.": "vector_in.fc1.",
    "vector_in.out_layer.": "vector_in.fc2.",
    "final_layer.linear.": "proj_out.",
    "final_layer.adaLN_modulation.1.": "adaLN_modulation.1.",
}
COLUMN = ("_mod.linear.", ".modulation.linear.", "_mlp.fc1.", "vector_in.in_layer.", "final_layer.")
ROW = ("_attn_proj.weight", "_mlp.fc2.weight", "vector_in.out_layer.weight")


def renamed(name: str, table: dict[str, str]) -> str:
    """The name with the first beginning that the table knows replaced."""
    return next((new + name.removeprefix(old) for old, new in table.items() if name.startswith(old)), name)


def original(diffusers: Tensors) -> Tensors:
    """The tensors of the original release that diffusers' own converter would turn into these."""
    made: Tensors = {}
    for name, tensor in diffusers.items():
        module, _, kind = name.rpartition(".")
        if name.startswith("norm_out.linear."):
            scale, shift = tensor.chunk(2)
            made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        elif name.startswith("proj_out."):
            made[f"final_layer.linear.{kind}"] = tensor
        elif module.endswith(("to_q", "add_q_proj")):
            fused = [diffusers[f"{swap_letter(module, letter)}.{kind}"] for letter in "qkv"]
            block = renamed(module.partition(".attn.")[0] + ".", ORIGINAL)
            if block.startswith("single_blocks."):
                fused.append(diffusers[f"{module.partition('.attn.')[0]}.proj_mlp.{kind}"])
                made[f"{block}linear1.{kind}"] = torch.cat(fused)
            else:
                stream = "self" if block.startswith("txt_in.") else "txt" if module.endswith("proj") else "img"
                made[f"{block}{stream}_attn_qkv.{kind}"] = torch.cat(fused)
        elif not module.endswith(("to_k", "to_v", "add_k_proj", "add_v_proj", "proj_mlp")):
            new = renamed(name, ORIGINAL)
            table = next((table for prefix, table in INSIDE.items() if new.startswith(prefix)), {})
            block, inner = block_of(new)
            made[block + renamed(inner, table)] = tensor
    return made


def swap_letter(module: str, letter: str) -> str:
    return module.replace("to_q", f"to_{letter}").replace("add_q_proj", f"add_{letter}_proj")


def block_of(name: str) -> tuple[str, str]:
    """A name cut after the number of its block."""
    cut = re.match(r"(double_blocks|single_blocks|txt_in\.individual_token_refiner\.blocks)\.\d+\.", name)
    return (cut[0], name.removeprefix(cut[0])) if cut else ("", name)


def thirds(x: torch.Tensor, tp: int, t: int) -> torch.Tensor:
    return x.view(3, tp, -1, *x.shape[1:])[:, t].reshape(-1, *x.shape[1:])


def published(source: Tensors, tp: int) -> Ranks:
    """What each rank holds of a model of the original release."""
    return {f"mp_rank_{t:02d}": dict(rank(source, tp, t)) for t in range(tp)}


def rank(source: Tensors, tp: int, t: int) -> list[tuple[str, torch.Tensor]]:
    made = []
    for name, x in source.items():
        new = name
        for old, replacement in RENAMED.items():
            new = new.replace(old, replacement)
        if ".linear1." in name:
            made.append((new.replace("linear1", "linear1_qkv"), thirds(x[: 3 * HIDDEN], tp, t)))
            made.append((new.replace("linear1", "linear1_mlp"), x[3 * HIDDEN :].chunk(tp)[t]))
        elif name.startswith("txt_in."):
            made.append((new, x))
        elif name.endswith("linear2.weight"):
            parts = (x[:, :HIDDEN], x[:, HIDDEN:])
            made.append((new, torch.cat([part.chunk(tp, 1)[t] for part in parts], 1)))
        elif "_attn_qkv." in name:
            made.append((new, thirds(x, tp, t)))
        elif name.endswith(ROW):
            made.append((new, x.chunk(tp, 1)[t]))
        else:
            made.append((new, x.chunk(tp)[t] if any(part in name for part in COLUMN) else x))
    return made


def layout(tp: int = 1) -> Layout:
    return Layout(llm_pp_layers=((2,),), vit_pp_layers=((3,),), tp_size=tp)


def models(kind: str) -> tuple[dict[str, Any], Tensors, Tensors]:
    """The recorded configuration, and random tensors under both kinds of names."""
    model = recorded(kind)
    diffusers = random_tensors(model["saved"])
    return model["config"], diffusers, original(diffusers)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("names", ["diffusers", "original"])
@pytest.mark.parametrize("kind", KINDS)
def test_published_layout_and_back(kind: str, names: str, tp: int) -> None:
    config, diffusers, source = models(kind)
    held = diffusers if names == "diffusers" else source
    if names == "original":
        config = original_config({name: t.shape for name, t in source.items()})
    done = convert(HUNYUAN_VIDEO, config, held, layout(tp))
    expected = published(source, tp)
    assert done.ranks.keys() == expected.keys()
    assert all(same(done.ranks[folder], tensors) for folder, tensors in expected.items())
    assert same(done.back(), held)


@pytest.mark.parametrize("kind", KINDS)
def test_an_original_file_tells_what_diffusers_configuration_says(kind: str) -> None:
    config, _, source = models(kind)
    told = original_config({name: t.shape for name, t in source.items()})
    asked = ("num_layers", "num_single_layers", "num_refiner_layers", "num_attention_heads", "guidance_embeds")
    assert {name: told[name] for name in asked} == {name: config[name] for name in asked}


def test_a_file_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no HunyuanVideo model .*'img_in\.proj\.weight'"):
        original_config({"blocks.0.weight": (1, 1)})


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused() -> None:
    config, diffusers, _ = models("hunyuan_video")
    with pytest.raises(LayoutError, match=r"tp_size 3 .* legal for this model: \[1, 2, 4\]"):
        convert(HUNYUAN_VIDEO, config, diffusers, layout(3))


def test_a_pipeline_is_refused() -> None:
    config, diffusers, _ = models("hunyuan_video")
    pipeline = Layout(llm_pp_layers=((1, 1),), vit_pp_layers=((1, 2),))
    with pytest.raises(LayoutError, match="2 pipeline ranks of 1 virtual stages: this model has no pipeline"):
        convert(HUNYUAN_VIDEO, config, diffusers, pipeline)


@pytest.mark.parametrize(("name", "value"), [("mlp_ratio", 2.0), ("num_refiner_layers", 3)])
def test_a_size_that_the_training_code_does_not_have_is_refused(name: str, value: float) -> None:
    config, diffusers, _ = models("hunyuan_video")
    with pytest.raises(ModelError, match=name):
        convert(HUNYUAN_VIDEO, config | {name: value}, diffusers, layout())


def test_a_fused_layer_of_a_wrong_size_is_refused() -> None:
    _, _, source = models("hunyuan_video")
    config = original_config({name: t.shape for name, t in source.items()})
    wrong = source | {"single_blocks.1.linear1.weight": torch.zeros(7 * HIDDEN - 1, HIDDEN)}
    with pytest.raises(LayoutError, match=r"shape \[111, 16\] has no 7 equal parts along dimension 0"):
        convert(HUNYUAN_VIDEO, config, wrong, layout())


def test_a_missing_guidance_embedder_is_named() -> None:
    config, diffusers, _ = models("hunyuan_video")
    lacking = {name: t for name, t in diffusers.items() if "guidance" not in name}
    with pytest.raises(CheckpointError, match=r"missing 4: time_text_embed\.guidance_embedder"):
        convert(HUNYUAN_VIDEO, config, lacking, layout())
