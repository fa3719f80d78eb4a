"""InternVL against its published layout, written anew with whole tensors, and there and back.

Names and shapes of transformers' port are recorded; the published names and tensors are made from them here as the
port's authors describe the way from one to the other: names part by part, query over key over value in one tensor,
InternLM2's heads group by group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from recorded_models import Recorded, random_tensors
from reference_models import by_group
from tiny_checkpoint import Tensors
from torch import Tensor
from whole_tensors import Converted, Cut, Lists, Made, Part, assert_same, columns, gated, published, rows, same

from mm_convert import CheckpointError, Layout, LayoutError, ModelError
from mm_convert.families.internvl import INTERNVL
from mm_convert.families.uneven import UnevenQKV, UnevenSplit

HEADS = 5
KINDS = ("weight", "bias")
LISTS: list[tuple[Lists, Lists]] = [  # 5 language and 3 vision layers
    ([[5]], [[3]]),
    ([[2, 3]], [[3, 0]]),
    ([[0, 5]], [[2, 1]]),
    ([[0, 1], [2, 2]], [[3, 0], [0, 0]]),
    ([[1, 2, 0, 2]], [[1, 0, 2, 0]]),
    ([[0, 0, 0, 1], [2, 0, 1, 1]], [[1, 1, 0, 1], [0, 0, 0, 0]]),
]
OUTSIDE = {
    "vision_tower.": "vision_model.",
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.": "attn.",
    "projection_layer": "proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}
INTERNLM2 = {
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


class Model(NamedTuple):
    """A checkpoint: what transformers' port of it holds, and what it holds itself."""

    config: dict[str, Any]
    port: Tensors
    held: Tensors


def renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def as_saved(port: Tensors) -> Tensors:
    return port


def as_in_memory(port: Tensors) -> Tensors:
    memory = {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    return {renamed(name, memory): tensor for name, tensor in port.items()}


def as_published(port: Tensors) -> Tensors:
    """Under the published names, vision attention fused."""
    made: Tensors = {}
    for name, tensor in port.items():
        new = name if name.startswith("language_model.") else renamed(name, OUTSIDE)
        if ".attn.q_proj." in new:
            three = [port[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            made[new.replace("q_proj", "qkv")] = torch.cat(three)
        elif not re.search(r"\.attn\.[kv]_proj\.", new):
            made[new] = tensor
    return made


def as_internlm2(port: Tensors) -> Tensors:
    """The same, with the language model in InternLM2's way."""
    made: Tensors = {}
    for name, tensor in as_published(port).items():
        if ".self_attn.q_proj." in name:
            q, k, v = (port[name.replace("q_proj", f"{x}_proj")] for x in "qkv")
            made[name.replace("self_attn.q_proj", "attention.wqkv")] = by_group(4, q, k, v)
        elif not re.search(r"self_attn\.[kv]_proj\.", name):
            made[renamed(name, INTERNLM2) if name.startswith("language_model.") else name] = tensor
    return made


def published_config(config: dict[str, Any], language: str) -> dict[str, Any]:
    vision = config["vision_config"]
    kept = {name: vision[name] for name in ("num_hidden_layers", "num_attention_heads", "norm_type")}
    own = {"qkv_bias": vision["attention_bias"], "qk_normalization": vision["use_qk_norm"]}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": {**config["text_config"], "model_type": language},
        "vision_config": {**kept, **own, "model_type": "intern_vit_6b"},
    }


def model(recorded: str, names: Callable[[Tensors], Tensors], language: str = "", *, tied: bool = False) -> Model:
    found = Recorded.named(recorded)
    config = found.config | {"tie_word_embeddings": tied}
    config |= {"text_config": config["text_config"] | {"tie_word_embeddings": tied}}
    port = random_tensors({n: s for n, s in found.saved.items() if not (tied and "lm_head" in n)})
    return Model(published_config(config, language) if language else config, port, names(port))


MODELS: dict[str, Callable[..., Model]] = {
    "port of Qwen2": lambda **given: model("internvl", as_saved, **given),
    "port of Llama": lambda **given: model("internvl_6b", as_saved, **given),
    "Qwen2": lambda **given: model("internvl", as_published, "qwen2", **given),
    "Llama": lambda **given: model("internvl_6b", as_published, "llama", **given),
    "InternLM2": lambda **given: model("internvl_6b", as_internlm2, "internlm2", **given),
}


def first_more(tensor: Tensor, dim: int = 0) -> Cut:
    """Dealt out with one more for the first ranks, which is what tensor_split is documented to do."""
    return lambda tp, t: tensor.tensor_split(tp, dim)[t]


def heads(three: list[Tensor]) -> Cut:
    def cut(tp: int, t: int) -> Tensor:
        apart = [x.reshape(HEADS, -1, *x.shape[1:]).tensor_split(tp)[t].flatten(0, 1) for x in three]
        return torch.cat(apart)

    return cut


def head_columns(tensor: Tensor) -> Cut:
    return lambda tp, t: tensor.reshape(len(tensor), HEADS, -1).tensor_split(tp, 1)[t].flatten(1, 2)


def expected(port: Tensors, llm: Lists, vit: Lists, tp: int) -> Any:
    return published({"llm": language(port, pp=len(llm[0])), "vit": vision(port)}, {"llm": llm, "vit": vit}, tp)


def language(hf: Tensors, *, pp: int) -> Part:
    prefix = "language_model.model."

    def layer(i: int, j: int) -> Iterator[Made]:
        old, new = f"{prefix}layers.{i}.", f"text_decoder.decoder.layers.{j}."
        yield new + "input_layernorm.weight", same(hf[old + "input_layernorm.weight"])
        yield new + "pre_mlp_layernorm.weight", same(hf[old + "post_attention_layernorm.weight"])
        for kind in KINDS:
            if f"{old}self_attn.q_proj.{kind}" in hf:
                q, k, v = (hf[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv")
                yield new + f"self_attention.linear_qkv.{kind}", rows(by_group(4, q, k, v))
        yield new + "self_attention.linear_proj.weight", columns(hf[old + "self_attn.o_proj.weight"])
        gate, up = hf[old + "mlp.gate_proj.weight"], hf[old + "mlp.up_proj.weight"]
        yield new + "mlp.linear_fc1.weight", gated(gate, up)
        yield new + "mlp.linear_fc2.weight", columns(hf[old + "mlp.down_proj.weight"])

    embedding, head = hf[prefix + "embed_tokens.weight"], hf.get("language_model.lm_head.weight")
    last = [("text_decoder.decoder.final_layernorm.weight", same(hf[prefix + "norm.weight"]))]
    if head is not None or pp > 1:
        last.append(("text_decoder.output_layer.weight", first_more(embedding if head is None else head)))
    return Part(layer, [("text_decoder.embedding.word_embeddings.weight", first_more(embedding))], last)


def vision(hf: Tensors) -> Part:
    def layer(i: int, j: int) -> Iterator[Made]:
        old, new = f"vision_tower.encoder.layer.{i}.", f"image_encoder.encoder.encoder.layers.{j}."
        for name, tensor in hf.items():
            inner = name.removeprefix(old)
            if inner == name:
                continue
            part, _, kind = inner.rpartition(".")
            if inner in ("lambda_1", "lambda_2"):
                yield new + inner.replace("lambda_", "ls"), same(tensor)
            elif part == "attention.q_proj":
                three = [hf[f"{old}attention.{x}_proj.{kind}"] for x in "qkv"]
                yield new + f"self_attention.linear_qkv.{kind}", heads(three)
            elif part == "attention.projection_layer":
                cut = head_columns(tensor) if kind == "weight" else same(tensor)
                yield new + f"self_attention.linear_proj.{kind}", cut
            elif part == "mlp.fc1":
                yield new + f"mlp.linear_fc1.{kind}", rows(tensor)
            elif part == "mlp.fc2":
                yield new + f"mlp.linear_fc2.{kind}", columns(tensor) if kind == "weight" else same(tensor)
            elif part in ("attention.q_norm", "attention.k_norm"):
                yield new + f"self_attention.{part[-6]}_layernorm.{kind}", same(tensor)
            elif part in ("layernorm_before", "layernorm_after"):
                norm = "input" if part.endswith("before") else "pre_mlp"
                yield new + f"{norm}_layernorm.{kind}", same(tensor)
            else:
                assert part in ("attention.k_proj", "attention.v_proj")

    old, new = "vision_tower.embeddings.", "image_encoder.encoder.embeddings."
    first = [
        (new + "class_embedding", same(hf[old + "cls_token"])),
        (new + "position_embedding", same(hf[old + "position_embeddings"])),
        (new + "patch_embedding.weight", same(hf[old + "patch_embeddings.projection.weight"])),
        (new + "patch_embedding.bias", same(hf[old + "patch_embeddings.projection.bias"])),
    ]
    pairs = {"layer_norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"}
    last = [
        (f"image_encoder.projector.{b}.{kind}", same(hf[f"multi_modal_projector.{a}.{kind}"]))
        for a, b in pairs.items()
        for kind in KINDS
    ]
    return Part(layer, first, last)


def converted(made: Model, llm: Lists, vit: Lists, tp: int) -> Converted:
    assert INTERNVL.accepts(made.config)
    layout = Layout(llm_pp_layers=llm, vit_pp_layers=vit, tp_size=tp)  # type: ignore[arg-type]
    return Converted.of(INTERNVL, INTERNVL.sizes(made.config), made.held, layout)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("llm", "vit"), LISTS)
@pytest.mark.parametrize("name", MODELS)
def test_published_layout_and_back(name: str, llm: Lists, vit: Lists, tp: int) -> None:
    made = MODELS[name]()
    result = converted(made, llm, vit, tp)
    assert_same(result.places(), expected(made.port, llm, vit, tp))
    assert_same({"": result.back()}, {"": made.held})


@pytest.mark.parametrize(("llm", "vit"), LISTS[:2])
@pytest.mark.parametrize("name", MODELS)
def test_a_tied_output_layer_is_a_copy_on_the_last_stage_of_a_pipeline(name: str, llm: Lists, vit: Lists) -> None:
    made = MODELS[name](tied=True)
    result = converted(made, llm, vit, 2)
    assert_same(result.places(), expected(made.port, llm, vit, 2))
    assert_same({"": result.back()}, {"": made.held})


@pytest.mark.parametrize("recorded", ["internvl", "internvl_6b"])
def test_the_names_that_transformers_holds_in_memory(recorded: str) -> None:
    made = model(recorded, as_in_memory)
    assert made.held.keys() == Recorded.named(recorded).in_memory.keys()
    result = converted(made, [[2, 3]], [[3, 0]], 2)
    assert_same(result.places(), expected(made.port, [[2, 3]], [[3, 0]], 2))
    assert_same({"": result.back()}, {"": made.held})


def test_25_heads_of_internvit_6b_over_four_ranks() -> None:
    # Width 3200, heads of 128: 7 of them on the first rank, 6 on each other.
    ranks = UnevenQKV(25).pieces([(9600, 3200)], 4)
    assert [[(p.start, p.stop) for p in pieces] for pieces in ranks] == [
        [(0, 896), (3200, 4096), (6400, 7296)],
        [(896, 1664), (4096, 4864), (7296, 8064)],
        [(1664, 2432), (4864, 5632), (8064, 8832)],
        [(2432, 3200), (5632, 6400), (8832, 9600)],
    ]


def test_a_vocabulary_that_two_ranks_do_not_divide() -> None:
    # InternLM2's 92553 tokens.
    [[first], [second]] = UnevenSplit(0).pieces([(92553, 2048)], 2)
    assert (first.start, first.stop, second.start, second.stop) == (0, 46277, 46277, 92553)


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"tp_size 8 is more than .* 5"):
        UnevenQKV(5).pieces([(60, 20)], 8)
    with pytest.raises(LayoutError, match=r"size 21 is not made of 5 heads of one size"):
        UnevenSplit(1, 5).pieces([(20, 21)], 2)


def test_a_tensor_parallel_size_that_does_not_divide_the_key_value_heads_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"tp_size 3 does not divide num_key_value_heads, 4: .*\[1, 2, 4\]"):
        converted(MODELS["InternLM2"](), [[5]], [[3]], 3)


def test_another_language_model_is_refused() -> None:
    config = {"model_type": "internvl_chat", "llm_config": {"model_type": "phi3"}, "vision_config": {}}
    with pytest.raises(ModelError, match=r"language model of this InternVL is 'phi3'; known: internlm2, llama, qwen2"):
        INTERNVL.sizes(config)


def test_a_vision_configuration_without_its_layers_is_refused() -> None:
    config = Recorded.named("internvl").config | {"vision_config": {"num_attention_heads": 5}}
    with pytest.raises(ModelError, match=r"no 'num_hidden_layers' in its vision_config"):
        INTERNVL.sizes(config)


def test_biases_that_the_configuration_denies_are_unknown() -> None:
    made = MODELS["Qwen2"]()
    config = made.config | {"vision_config": made.config["vision_config"] | {"qkv_bias": False}}
    with pytest.raises(CheckpointError, match=r"unknown 3: vision_model\.encoder\.layers\.0\.attn\.qkv\.bias"):
        converted(Model(config, made.port, made.held), [[5]], [[3]], 1)


@pytest.mark.parametrize("name", ["Qwen2", "Llama"])
def test_what_a_checkpoint_has_is_seen_in_the_megatron_names(name: str) -> None:
    # So that a folder without config.json can be dealt out anew.
    made = MODELS[name]()
    result = converted(made, [[5]], [[3]], 2)
    seen = {
        feature
        for feature, beginning in INTERNVL.features.items()
        if any(ref.name.startswith(beginning) for ref in result.tensors)
    }
    assert seen == INTERNVL.sizes(made.config).features
