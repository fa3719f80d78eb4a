"""mm-convert's tests use names, shapes and layouts of diffusers; here the installed diffusers is asked for them."""

import json
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

from house.tiny_diffusers import MODELS, RECORDED, record
from mm_convert import Layout, Plan, Ref, Segment, Spec, assemble, relate
from mm_convert.families.hunyuan_video import HUNYUAN_VIDEO, original_config

Tensors = dict[str, torch.Tensor]
HIDDEN = 3072  # diffusers' converter knows no other width


@pytest.mark.parametrize("model", MODELS)
def test_the_installed_diffusers_has_the_recorded_names_and_shapes(model: str) -> None:
    recorded = json.loads((RECORDED / f"{model}.json").read_text(encoding="utf-8"))
    made = record(model)
    assert made["saved"] == recorded["saved"]
    assert made["config"]["_class_name"] == recorded["config"]["_class_name"]


@pytest.mark.parametrize("tp", [1, 4])
def test_an_original_hunyuan_video_file_and_diffusers_conversion_of_it_make_the_same_ranks(tp: int) -> None:
    original = narrow_original()
    converted = convert_hunyuan_video_transformer_to_diffusers(dict(original))
    shapes = original_config({name: t.shape for name, t in original.items()})
    config = shapes | {"_class_name": "HunyuanVideoTransformer3DModel"}
    ours, theirs = ranks(shapes, original, tp), ranks(config, converted, tp)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[ref], theirs[ref]) for ref in ours)


def narrow_original() -> Tensors:
    """A file of the original release with as many rows as the model has, and hardly any column."""
    block = {"attn_qkv": 3, "attn_proj": 1, "mlp.fc1": 4, "mlp.fc2": 1, "mod.linear": 6}
    rows = {
        **dict.fromkeys(("img_in.proj", "vector_in.in_layer", "vector_in.out_layer", "txt_in.input_embedder"), 1),
        **{f"{part}.mlp.{k}": 1 for part in ("time_in", "guidance_in", "txt_in.t_embedder") for k in (0, 2)},
        **{f"txt_in.c_embedder.linear_{k}": 1 for k in (1, 2)},
        **{f"double_blocks.0.{stream}_{layer}": n for stream in ("img", "txt") for layer, n in block.items()},
        **{"single_blocks.0.linear1": 7, "single_blocks.0.linear2": 1, "single_blocks.0.modulation.linear": 3},
        **{"final_layer.linear": 1, "final_layer.adaLN_modulation.1": 2},
    }
    refiner = {"norm1": 1, "norm2": 1, "self_attn_qkv": 3, "self_attn_proj": 1, "adaLN_modulation.1": 2}
    for k in (0, 1):
        for layer, n in (refiner | {"mlp.fc1": 4, "mlp.fc2": 1}).items():
            rows[f"txt_in.individual_token_refiner.blocks.{k}.{layer}"] = n
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, n in rows.items():
        columns = 20 if name.endswith("linear2") else 4
        made[f"{name}.weight"] = torch.randn(n * HIDDEN, columns, generator=generator)
        made[f"{name}.bias"] = torch.randn(n * HIDDEN, generator=generator)
    norms = [f"double_blocks.0.{stream}_attn_{part}_norm" for stream in ("img", "txt") for part in "qk"]
    for name in (*norms, "single_blocks.0.q_norm", "single_blocks.0.k_norm"):
        made[f"{name}.weight"] = torch.randn(128, generator=generator)
    return made


def ranks(config: dict[str, Any], held: Tensors, tp: int) -> dict[Ref, torch.Tensor]:
    sources = {Ref("", "", name): Spec("F32", tuple(t.shape)) for name, t in held.items()}
    layout = Layout(llm_pp_layers=((1,),), vit_pp_layers=((1,),), tp_size=tp)
    targets, segments = relate(HUNYUAN_VIDEO, HUNYUAN_VIDEO.sizes(config), layout, sources)
    plan = Plan.build(sources, targets, segments)

    def read(segment: Segment) -> torch.Tensor:
        return held[segment.source.name].narrow(segment.dim, segment.source_start, segment.length)

    return {ref: assemble(plan, ref, read) for ref in targets}
