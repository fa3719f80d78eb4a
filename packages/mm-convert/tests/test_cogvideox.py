"""CogVideoX's table, on tensors in memory: both name styles, to the published layout and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from in_memory_plans import Ranks, convert, recorded, same
from recorded_models import random_tensors
from tiny_checkpoint import Tensors

from mm_convert import CheckpointError, Layout, LayoutError
from mm_convert.families.cogvideox import COGVIDEOX, UNUSED, original_config

KINDS = ["cogvideox_2b", "cogvideox", "cogvideox_i2v", "cogvideox_1_5", "cogvideox_1_5_i2v"]
PREFIX = "model.diffusion_model."

# Original names and MindSpeed MM's of diffusers' layers; what is fused stands below.
OUTSIDE = {
    "time_embedding.linear_1": ("time_embed.0", "time_embed.time_embed.0"),
    "time_embedding.linear_2": ("time_embed.2", "time_embed.time_embed.2"),
    "patch_embed.proj": ("mixins.patch_embed.proj", "patch_embed.proj"),
    "patch_embed.text_proj": ("mixins.patch_embed.text_proj", "caption_projection"),
    "patch_embed": ("mixins.pos_embed", "pos_embed"),  # .pos_embedding
    "ofs_embedding.linear_1": ("ofs_embed.0", "ofs_embed.0"),
    "ofs_embedding.linear_2": ("ofs_embed.2", "ofs_embed.2"),
    "norm_final": ("transformer.final_layernorm", "norm_final"),
    "norm_out.norm": ("mixins.final_layer.norm_final", "norm_out"),
    "norm_out.linear": ("mixins.final_layer.adaLN_modulation.1", "adaLN_modulation.1"),
    "proj_out": ("mixins.final_layer.linear", "proj_out_linear"),
}
LAST = ("norm_final", "norm_out.", "adaLN_modulation.", "proj_out_linear")
INSIDE = {
    "attn1.norm_q": ("mixins.adaln_layer.query_layernorm_list.{}", "self_atten.q_norm"),
    "attn1.norm_k": ("mixins.adaln_layer.key_layernorm_list.{}", "self_atten.k_norm"),
    "attn1.to_out.0": ("transformer.layers.{}.attention.dense", "self_atten.proj_out"),
    "norm1.norm": ("transformer.layers.{}.input_layernorm", "norm1"),
    "norm2.norm": ("transformer.layers.{}.post_attention_layernorm", "norm2"),
    "ff.net.0.proj": ("transformer.layers.{}.mlp.dense_h_to_4h", "ff.net.0.proj"),
    "ff.net.2": ("transformer.layers.{}.mlp.dense_4h_to_h", "ff.net.2"),
}
QKV = ("transformer.layers.{}.attention.query_key_value", "self_atten.proj_qkv")
MODULATION = ("mixins.adaln_layer.adaLN_modulations.{}.1", "scale_shift_table.1")
COLUMN = (".ff.net.0.proj.", ".scale_shift_table.", "adaLN_modulation.")
ROW = (".proj_out.weight", ".ff.net.2.weight")


def fused(diffusers: Tensors, style: int) -> Tensors:
    """The whole model under original names (0) or MindSpeed MM's (1): query, key, value and modulations fused."""
    made: Tensors = {}
    for name, tensor in diffusers.items():
        module, _, kind = name.rpartition(".")
        if not name.startswith("transformer_blocks."):
            made[f"{OUTSIDE[module][style]}.{kind}"] = tensor
            continue
        _, number, inner = module.split(".", 2)
        block, there = f"transformer_blocks.{number}.", f"videodit_blocks.{number}." if style else ""
        if inner == "attn1.to_q":
            parts = [diffusers[f"{block}attn1.to_{letter}.{kind}"] for letter in "qkv"]
            made[f"{there}{QKV[style].format(number)}.{kind}"] = torch.cat(parts)
        elif inner == "norm1.linear":
            # [norm, (image, text), (shift, scale, gate)] with image and text outermost
            both = torch.stack([tensor, diffusers[f"{block}norm2.linear.{kind}"]])
            by_stream = both.view(2, 2, -1, *tensor.shape[1:]).transpose(0, 1)
            made[f"{there}{MODULATION[style].format(number)}.{kind}"] = by_stream.reshape(-1, *tensor.shape[1:])
        elif inner in INSIDE:
            made[f"{there}{INSIDE[inner][style].format(number)}.{kind}"] = tensor
    return made if style else {PREFIX + name: tensor for name, tensor in made.items()}


def published(whole: Tensors, stages: list[int], tp: int) -> Ranks:
    """What each rank holds of a model under MindSpeed MM's names."""
    made: Ranks = {}
    for p, count in enumerate(stages):
        for t in range(tp):
            folder = f"mp_rank_{t:02d}" + (f"_{p:03d}" if len(stages) > 1 else "")
            made[folder] = {}
            for name, x in whole.items():
                head, _, rest = name.partition(".")
                if head == "videodit_blocks":
                    number, _, inner = rest.partition(".")
                    local = int(number) - sum(stages[:p])
                    there, new = 0 <= local < count, f"videodit_blocks.{local}.{inner}"
                else:
                    there, new = p == (len(stages) - 1 if name.startswith(LAST) else 0), name
                if there:
                    made[folder][new] = cut(name, x, tp, t)
    return made


def cut(name: str, x: torch.Tensor, tp: int, t: int) -> torch.Tensor:
    if ".proj_qkv." in name:
        return x.view(3, tp, -1, *x.shape[1:])[:, t].reshape(-1, *x.shape[1:])
    if name.endswith(ROW):
        return x.chunk(tp, 1)[t]
    return x.chunk(tp)[t] if any(part in name for part in COLUMN) else x


def models(kind: str) -> tuple[dict[str, Any], Tensors]:
    model = recorded(kind)
    return model["config"], random_tensors(model["saved"])


@pytest.mark.parametrize("stages", [[5], [2, 3], [1, 0, 4]])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("names", ["diffusers", "original"])
@pytest.mark.parametrize("kind", KINDS)
def test_published_layout_and_back(kind: str, names: str, tp: int, stages: list[int]) -> None:
    config, diffusers = models(kind)
    held = diffusers
    if names == "original":
        held = fused(diffusers, 0)
        config = original_config({name: t.shape for name, t in held.items()})
    done = convert(COGVIDEOX, config, held, Layout(llm_pp_layers=[stages], tp_size=tp))  # type: ignore[arg-type]
    expected = published(fused(diffusers, 1), stages, tp)
    assert done.ranks.keys() | {folder for folder, held in expected.items() if not held} == expected.keys()
    assert all(same(done.ranks.get(folder, {}), tensors) for folder, tensors in expected.items())
    assert same(done.back(), held)


@pytest.mark.parametrize("kind", KINDS)
def test_an_original_file_tells_what_diffusers_configuration_says(kind: str) -> None:
    config, diffusers = models(kind)
    told = original_config({name: t.shape for name, t in fused(diffusers, 0).items()})
    asked = ("num_layers", "num_attention_heads", "use_learned_positional_embeddings", "ofs_embed_dim")
    assert {name: told[name] for name in asked} == {name: config[name] for name in asked}


def test_a_file_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no CogVideoX model .*'model\.diffusion_model\.mixins\.patch_embed"):
        original_config({"blocks.0.weight": (1, 1)})


def test_rotary_tables_of_an_original_file_are_kept() -> None:
    _, diffusers = models("cogvideox")
    tables = {PREFIX + f"mixins.pos_embed.freqs_{part}": torch.rand(2, 3, 3, 4).bfloat16() for part in ("cos", "sin")}
    held = fused(diffusers, 0) | tables
    config = original_config({name: t.shape for name, t in held.items()})
    done = convert(COGVIDEOX, config, held, Layout(llm_pp_layers=((2, 3),), tp_size=2))
    for name, table in tables.items():
        short = name.removeprefix(PREFIX + "mixins.")
        assert [folder for folder, held in done.ranks.items() if short in held] == ["mp_rank_00_000", "mp_rank_01_000"]
        assert torch.equal(done.ranks["mp_rank_01_000"][short], table)
    assert same(done.back(), held)


def test_what_stands_beside_the_model_in_an_original_file_is_unused() -> None:
    held = fused(models("cogvideox_i2v")[1], 0)
    assert not [name for name in held if UNUSED.search(name)]
    for name in ("first_stage_model.encoder.conv_in.conv.weight", PREFIX + "transformer.position_embeddings.weight"):
        assert UNUSED.search(name)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused() -> None:
    config, diffusers = models("cogvideox")
    with pytest.raises(LayoutError, match=r"tp_size 3 .* legal for this model: \[1, 2, 4\]"):
        convert(COGVIDEOX, config, diffusers, Layout(llm_pp_layers=((5,),), tp_size=3))


def test_a_list_that_does_not_sum_to_the_blocks_is_refused() -> None:
    config, diffusers = models("cogvideox")
    with pytest.raises(LayoutError, match="sum to 4, but the model has 5"):
        convert(COGVIDEOX, config, diffusers, Layout(llm_pp_layers=((2, 2),)))


def test_a_modulation_of_a_wrong_size_is_refused() -> None:
    config, diffusers = models("cogvideox")
    wrong = diffusers | {f"transformer_blocks.3.norm{n}.linear.bias": torch.zeros(95) for n in (1, 2)}
    with pytest.raises(LayoutError, match=r"shape \[95\] has no 6 equal parts along dimension 0"):
        convert(COGVIDEOX, config, wrong, Layout(llm_pp_layers=((5,),)))


def test_an_embedder_that_the_configuration_lacks_is_unknown() -> None:
    config, diffusers = models("cogvideox_1_5_i2v")
    with pytest.raises(CheckpointError, match=r"unknown 4: ofs_embedding\.linear_1\.bias"):
        convert(COGVIDEOX, config | {"ofs_embed_dim": None}, diffusers, Layout(llm_pp_layers=((5,),)))
