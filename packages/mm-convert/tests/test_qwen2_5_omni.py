"""The thinker of Qwen2.5-Omni against its published layout, written anew with whole tensors, and there and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recorded_models import Recorded, random_tensors
from reference_models import by_group
from tiny_checkpoint import Tensors
from whole_tensors import Converted, Lists, Made, Part, assert_same, columns, gated, published, rows, same

from mm_convert import CheckpointError, Layout, LayoutError, ModelError
from mm_convert.families.qwen2_5_omni import QWEN2_5_OMNI

RECORDED = Recorded.named("qwen2_5_omni")
WHOLE_CONFIG = {"model_type": "qwen2_5_omni", "thinker_config": RECORDED.config}
KINDS = ("weight", "bias")
LISTS: list[tuple[Lists, Lists, Lists]] = [  # 5 language, 3 vision and 3 audio layers
    ([[5]], [[3]], [[3]]),
    ([[2, 3]], [[3, 0]], [[3, 0]]),
    ([[0, 5]], [[2, 1]], [[0, 3]]),
    ([[0, 1], [2, 2]], [[3, 0], [0, 0]], [[2, 1], [0, 0]]),
    ([[1, 2, 0, 2]], [[1, 0, 2, 0]], [[0, 3, 0, 0]]),
    ([[0, 0, 0, 1], [2, 0, 1, 1]], [[1, 1, 0, 1], [0, 0, 0, 0]], [[0, 2, 0, 0], [1, 0, 0, 0]]),
]


def expected(hf: Tensors, llm: Lists, vit: Lists, audio: Lists, tp: int) -> Any:
    """The published layout, from the names of a thinker saved alone."""
    parts = {"llm": language(hf, pp=len(llm[0])), "vit": vision(hf), "audio": tower(hf)}
    return published(parts, {"llm": llm, "vit": vit, "audio": audio}, tp)


def language(hf: Tensors, *, pp: int) -> Part:
    def layer(i: int, j: int) -> Iterator[Made]:
        old, new = f"model.layers.{i}.", f"text_decoder.decoder.layers.{j}."
        yield new + "input_layernorm.weight", same(hf[old + "input_layernorm.weight"])
        yield new + "pre_mlp_layernorm.weight", same(hf[old + "post_attention_layernorm.weight"])
        for kind in KINDS:
            q, k, v = (hf[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv")
            yield new + f"self_attention.linear_qkv.{kind}", rows(by_group(4, q, k, v))
        yield new + "self_attention.linear_proj.weight", columns(hf[old + "self_attn.o_proj.weight"])
        gate, up = hf[old + "mlp.gate_proj.weight"], hf[old + "mlp.up_proj.weight"]
        yield new + "mlp.linear_fc1.weight", gated(gate, up)
        yield new + "mlp.linear_fc2.weight", columns(hf[old + "mlp.down_proj.weight"])

    embedding = hf["model.embed_tokens.weight"]
    last = [("text_decoder.decoder.final_layernorm.weight", same(hf["model.norm.weight"]))]
    if "lm_head.weight" in hf or pp > 1:
        last.append(("text_decoder.output_layer.weight", rows(hf.get("lm_head.weight", embedding))))
    return Part(layer, [("text_decoder.embedding.word_embeddings.weight", rows(embedding))], last)


def vision(hf: Tensors) -> Part:
    def layer(i: int, j: int) -> Iterator[Made]:
        old, new = f"visual.blocks.{i}.", f"image_encoder.encoder.blocks.layers.{j}."
        yield new + "input_layernorm.weight", same(hf[old + "norm1.weight"])
        yield new + "pre_mlp_layernorm.weight", same(hf[old + "norm2.weight"])
        for kind, across in (("weight", columns), ("bias", same)):
            q, k, v = (hf[f"{old}attn.{x}.{kind}"] for x in "qkv")
            yield new + f"self_attention.linear_qkv.{kind}", rows(by_group(4, q, k, v))
            yield new + f"self_attention.linear_proj.{kind}", across(hf[old + f"attn.proj.{kind}"])
            gate, up = hf[old + f"mlp.gate_proj.{kind}"], hf[old + f"mlp.up_proj.{kind}"]
            yield new + f"mlp.linear_fc1.{kind}", gated(gate, up)
            yield new + f"mlp.linear_fc2.{kind}", across(hf[old + f"mlp.down_proj.{kind}"])

    patches = [("image_encoder.encoder.patch_embed.proj.weight", same(hf["visual.patch_embed.proj.weight"]))]
    new = "image_encoder.projector."
    merger = [
        (new + "layernorm.weight", same(hf["visual.merger.ln_q.weight"])),
        (new + "encoder.linear_fc1.weight", rows(hf["visual.merger.mlp.0.weight"])),
        (new + "encoder.linear_fc1.bias", rows(hf["visual.merger.mlp.0.bias"])),
        (new + "encoder.linear_fc2.weight", columns(hf["visual.merger.mlp.2.weight"])),
        (new + "encoder.linear_fc2.bias", same(hf["visual.merger.mlp.2.bias"])),
    ]
    return Part(layer, patches, merger)


def tower(hf: Tensors) -> Part:
    def layer(i: int, j: int) -> Iterator[Made]:
        old, new = f"audio_tower.layers.{i}.", f"audio_encoder.encoder.blocks.layers.{j}."
        for kind, across in (("weight", columns), ("bias", same)):
            q, v = hf[f"{old}self_attn.q_proj.{kind}"], hf[f"{old}self_attn.v_proj.{kind}"]
            k = hf[f"{old}self_attn.k_proj.weight"] if kind == "weight" else torch.zeros_like(q)
            yield new + f"self_attention.linear_qkv.{kind}", rows(by_group(4, q, k, v))
            yield new + f"self_attention.linear_proj.{kind}", across(hf[old + f"self_attn.out_proj.{kind}"])
            yield new + f"mlp.linear_fc1.{kind}", rows(hf[old + f"fc1.{kind}"])
            yield new + f"mlp.linear_fc2.{kind}", across(hf[old + f"fc2.{kind}"])
            yield new + f"input_layernorm.{kind}", same(hf[old + f"self_attn_layer_norm.{kind}"])
            yield new + f"pre_mlp_layernorm.{kind}", same(hf[old + f"final_layer_norm.{kind}"])

    def ends(*names: str) -> list[Made]:
        return [("audio_encoder.encoder." + name, same(hf["audio_tower." + name])) for name in names]

    first = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "audio_bos_eos_token.weight")
    return Part(layer, ends(*first), ends("ln_post.weight", "ln_post.bias", "proj.weight", "proj.bias"))


def converted(hf: Tensors, layout: Layout, config: dict[str, Any] = WHOLE_CONFIG) -> Converted:
    return Converted.of(QWEN2_5_OMNI, QWEN2_5_OMNI.sizes(config), hf, layout)


def with_prefix(hf: Tensors) -> Tensors:
    """The published names."""
    return {"thinker." + name: tensor for name, tensor in hf.items()}


def in_memory(hf: Tensors) -> Tensors:
    """The names that transformers holds in memory."""
    new = {name: re.sub(r"^model\.", "model.language_model.", name) for name in hf}
    new = {name: re.sub(r"^(visual|audio_tower)\.", r"model.\1.", held) for name, held in new.items()}
    return {new[name]: tensor for name, tensor in hf.items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("llm", "vit", "audio"), LISTS)
def test_published_layout_and_back(llm: Lists, vit: Lists, audio: Lists, tp: int) -> None:
    hf = random_tensors(RECORDED.saved)
    layout = Layout(llm_pp_layers=llm, vit_pp_layers=vit, audio_pp_layers=audio, tp_size=tp)  # type: ignore[arg-type]
    model = converted(with_prefix(hf), layout)
    assert_same(model.places(), expected(hf, llm, vit, audio, tp))
    assert_same({"": model.back()}, {"": with_prefix(hf)})


@pytest.mark.parametrize(("llm", "vit", "audio"), LISTS[:2])
def test_a_tied_output_layer_is_a_copy_on_the_last_stage_of_a_pipeline(llm: Lists, vit: Lists, audio: Lists) -> None:
    hf = random_tensors(RECORDED.tied().saved)
    layout = Layout(llm_pp_layers=llm, vit_pp_layers=vit, audio_pp_layers=audio, tp_size=2)  # type: ignore[arg-type]
    model = converted(with_prefix(hf), layout, {"thinker_config": RECORDED.tied().config})
    assert_same(model.places(), expected(hf, llm, vit, audio, 2))
    assert_same({"": model.back()}, {"": with_prefix(hf)})


@pytest.mark.parametrize("names", [dict, in_memory], ids=["saved", "in memory"])
def test_a_thinker_saved_alone(names: Any) -> None:
    hf = random_tensors(RECORDED.saved)
    held = names(hf)
    assert held.keys() in (RECORDED.saved.keys(), RECORDED.in_memory.keys())
    assert QWEN2_5_OMNI.accepts(RECORDED.config)
    layout = Layout(llm_pp_layers=[[2, 3]], vit_pp_layers=[[3, 0]], audio_pp_layers=[[3, 0]])  # type: ignore[arg-type]
    model = converted(held, layout, RECORDED.config)
    assert_same(model.places(), expected(hf, [[2, 3]], [[3, 0]], [[3, 0]], 1))
    assert_same({"": model.back()}, {"": held})


def test_what_training_made_of_the_zeros_is_left_out_on_the_way_back() -> None:
    hf = with_prefix(random_tensors(RECORDED.saved))
    layout = Layout(llm_pp_layers=[[5]], vit_pp_layers=[[3]], audio_pp_layers=[[3]])  # type: ignore[arg-type]
    model = converted(hf, layout)
    for ref, tensor in model.tensors.items():
        if ref.name.startswith("audio_encoder.") and ref.name.endswith("linear_qkv.bias"):
            key = tensor.view(4, 3, 2)[:, 1]  # heads; query, key, value; elements of a head
            assert not key.any()
            key.fill_(7)
    assert_same({"": model.back()}, {"": hf})


def test_a_bias_of_the_key_changes_no_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    without, with_bias = ((q @ key.T).softmax(dim=1) @ v for key in (k, k + bias))
    torch.testing.assert_close(with_bias, without)


def test_tensor_parallel_size_that_no_head_fits_is_refused() -> None:
    config = RECORDED.config | {"audio_config": {"encoder_layers": 3, "encoder_attention_heads": 5}}
    layout = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), audio_pp_layers=((3,),), tp_size=2)
    with pytest.raises(LayoutError, match=r"tp_size 2 does not divide the number of audio heads, 5"):
        converted({}, layout, config)


def test_audio_layers_left_out_of_the_lists_are_refused() -> None:
    layout = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))
    with pytest.raises(LayoutError, match=r"sum to 0, but the model has 3 audio layers"):
        converted({}, layout)


def test_a_missing_tensor_of_the_tower_is_named() -> None:
    hf = with_prefix(random_tensors(RECORDED.saved))
    del hf["thinker.audio_tower.layers.1.self_attn.v_proj.bias"]
    layout = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), audio_pp_layers=((3,),))
    with pytest.raises(CheckpointError, match=r"missing 1: audio_tower\.layers\.1\.self_attn\.v_proj\.bias"):
        converted(hf, layout)


def test_a_configuration_without_audio_is_refused() -> None:
    config = {name: value for name, value in RECORDED.config.items() if name != "audio_config"}
    with pytest.raises(ModelError, match=r"no 'encoder_layers' for the audio tower"):
        QWEN2_5_OMNI.sizes(config)
