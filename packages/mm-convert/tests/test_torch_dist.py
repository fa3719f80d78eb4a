"""megatron-core's distributed checkpoints, without megatron-core: keys and shapes by its documented format.

Expected keys are those of ``GPTModel.sharded_state_dict()`` of megatron-core 0.16; that it loads such a folder and that
its own folders are read is shown by a test over all packages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_models import Recorded
from safetensors.torch import save_file
from test_dcp import equal, load, save, save_pieces
from test_every_model import MODELS, layouts
from tiny_checkpoint import FFN, HEAD, HIDDEN, LLM_LAYERS, VIT_LAYERS, MakeModel, tensors
from torch import Tensor

from mm_convert.convert import Converter
from mm_convert.distributed.dcp import prepare_dcp_to_hf, prepare_hf_to_dcp
from mm_convert.distributed.folder import DistributedFolder
from mm_convert.distributed.megatron_keys import Place, extra_states, places, variants
from mm_convert.distributed.torch_dist import (
    prepare_hf_to_torch_dist,
    prepare_mm_to_torch_dist,
    prepare_torch_dist_to_hf,
    prepare_torch_dist_to_mm,
)
from mm_convert.errors import CheckpointError
from mm_convert.layout import Layout

VL, TEXT = Converter.named("Qwen2_5_VLConverter"), Converter.named("Qwen2_5Converter")
GROUPS, HEADS = 4, 8
COLUMNS = dict.fromkeys(("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "word_embeddings.weight"), 0)
DIVIDED = COLUMNS | dict.fromkeys(("linear_proj.weight", "linear_fc2.weight"), 1)
CUT = Layout(llm_pp_layers=[[1, 4]], vit_pp_layers=[[3, 0]], tp_size=2)  # type: ignore[arg-type]  # lists are taken


def text_model(directory: Path, *, tied: bool = False) -> Path:
    """A Hugging Face folder of the language model alone."""
    directory.mkdir()
    made = {name: t for name, t in tensors(tied=tied).items() if not name.startswith("visual.")}
    numbers = {"num_hidden_layers": LLM_LAYERS, "num_key_value_heads": GROUPS, "tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", **numbers}))
    save_file(made, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def loaded(directory: Path) -> dict[str, Tensor]:
    """Every tensor, by torch's own reader."""
    shapes = DistributedFolder.open(directory).tensors
    state = {key: torch.zeros(described.shape) for key, described in shapes.items()}
    load(state, directory)
    return state


def fused(i: int, kind: str) -> Tensor:
    """The fused projection, by the formula of the layout: query heads, key and value of each group."""
    made = tensors()
    q, k, v = (made[f"model.layers.{i}.self_attn.{p}_proj.{kind}"] for p in "qkv")
    parts = [t.reshape(GROUPS, n * HEAD, -1) for t, n in ((q, HEADS // GROUPS), (k, 1), (v, 1))]
    return torch.cat(parts, 1).reshape((HEADS + 2 * GROUPS) * HEAD, *q.shape[1:])


def test_a_language_model_has_the_keys_and_tensors_of_megatron_cores_own(tmp_path: Path) -> None:
    prepare_hf_to_torch_dist(TEXT, text_model(tmp_path / "hf"), tmp_path / "dist").run()
    found = loaded(tmp_path / "dist/release")
    made = tensors()
    gated = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    stacks: dict[str, Callable[[int], Tensor]] = {
        "self_attention.linear_qkv.weight": lambda i: fused(i, "weight"),
        "self_attention.linear_qkv.bias": lambda i: fused(i, "bias"),
        "self_attention.linear_qkv.layer_norm_weight": lambda i: made[f"model.layers.{i}.input_layernorm.weight"],
        "self_attention.linear_proj.weight": lambda i: made[f"model.layers.{i}.self_attn.o_proj.weight"],
        "mlp.linear_fc1.layer_norm_weight": lambda i: made[f"model.layers.{i}.post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": lambda i: torch.cat([made[f"model.layers.{i}.{name}"] for name in gated]),
        "mlp.linear_fc2.weight": lambda i: made[f"model.layers.{i}.mlp.down_proj.weight"],
    }  # fmt: skip
    expected = {
        f"decoder.layers.{name}": torch.stack([at(i) for i in range(LLM_LAYERS)]) for name, at in stacks.items()
    }
    expected["embedding.word_embeddings.weight"] = made["model.embed_tokens.weight"]
    expected["decoder.final_layernorm.weight"] = made["model.norm.weight"]
    expected["output_layer.weight"] = made["lm_head.weight"]
    assert equal(found, expected)


def test_the_files_beside_the_tensors_are_those_that_megatron_core_reads(tmp_path: Path) -> None:
    prepare_hf_to_torch_dist(TEXT, text_model(tmp_path / "hf"), tmp_path / "dist").run()
    assert (tmp_path / "dist/latest_checkpointed_iteration.txt").read_bytes() == b"release"
    told = json.loads((tmp_path / "dist/release/metadata.json").read_text())
    assert (told["sharded_backend"], told["sharded_backend_version"], told["common_backend"]) == (
        "torch_dist",
        1,
        "torch",
    )
    assert torch.load(tmp_path / "dist/release/common.pt", weights_only=True) == {"checkpoint_version": 3.0}
    objects = DistributedFolder.open(tmp_path / "dist").objects
    assert f"decoder.layers.mlp.linear_fc2._extra_state/shard_4_{LLM_LAYERS}" in objects
    state: dict[str, Any] = {objects[0]: None}
    load(state, tmp_path / "dist/release")
    assert state[objects[0]] == [None]


def test_a_vision_language_model_keeps_the_names_of_its_parts(make_model: MakeModel, tmp_path: Path) -> None:
    prepare_hf_to_torch_dist(VL, make_model(), tmp_path / "dist").run()
    found = DistributedFolder.open(tmp_path / "dist").tensors
    assert found["text_decoder.decoder.layers.mlp.linear_fc1.weight"].shape == (LLM_LAYERS, 2 * FFN, HIDDEN)
    assert found["image_encoder.encoder.blocks.layers.input_layernorm.weight"].shape[0] == VIT_LAYERS
    assert "image_encoder.projector.encoder.linear_fc1.weight" in found


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_the_same_folder(make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
    hf = make_model(tied=tied)
    prepare_hf_to_torch_dist(VL, hf, tmp_path / "dist").run()
    prepare_torch_dist_to_hf(VL, tmp_path / "dist", hf, tmp_path / "back").run()
    for shard in sorted(hf.glob("*.safetensors")):
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.read_bytes()


def test_rank_folders_and_torch_dist_are_one_model(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    VL.hf_to_mm(hf, tmp_path / "mm", CUT)
    prepare_hf_to_torch_dist(VL, hf, tmp_path / "direct").run()
    prepare_mm_to_torch_dist(VL, tmp_path / "mm", tmp_path / "dist").run()
    assert equal(loaded(tmp_path / "dist/release"), loaded(tmp_path / "direct/release"))
    prepare_torch_dist_to_mm(VL, tmp_path / "dist", tmp_path / "again", CUT, hf_dir=hf).run()
    files = sorted((tmp_path / "mm/release").glob("*/*.pt"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "again/release" / file.parent.name / file.name).read_bytes() == file.read_bytes()


def one_by_one(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same checkpoint with each layer's tensors apart, gate and up projection too."""
    made: dict[str, Tensor] = {}
    for key, tensor in found.items():
        if ".layers." not in key:
            made[key] = tensor
            continue
        stack, _, rest = key.partition(".layers.")
        for i, layer in enumerate(tensor):
            single = f"{stack}.layers.{i}.{rest}"
            halves = dict(zip((f"{single}_w", f"{single}_v"), layer.chunk(2), strict=True))
            made |= halves if rest == "mlp.linear_fc1.weight" else {single: layer}
    return made


def unfused(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same checkpoint with the norms under their plain names."""
    names = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
             "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}  # fmt: skip
    return {key.replace(fused := next((f for f in names if key.endswith(f)), "-"), names.get(fused, "-")): t
            for key, t in found.items()}  # fmt: skip


@pytest.mark.parametrize("written", [one_by_one, unfused])
def test_other_ways_to_store_the_same_are_read(tmp_path: Path, written: Callable[[Any], dict[str, Tensor]]) -> None:
    hf = text_model(tmp_path / "hf")
    prepare_hf_to_torch_dist(TEXT, hf, tmp_path / "dist").run()
    save(written(loaded(tmp_path / "dist/release")), tmp_path / "other")
    prepare_torch_dist_to_hf(TEXT, tmp_path / "other", hf, tmp_path / "back").run()
    assert (tmp_path / "back/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def pieces_of(key: str, tensor: Tensor) -> Iterator[tuple[slice, ...]]:
    """Two layers at a time, each dimension that tensor parallelism divides in two."""
    stacked = ".layers." in key
    cut = DIVIDED.get(".".join(key.split(".")[-2:]))
    for first in range(0, LLM_LAYERS if stacked else 1, 2):
        layers = [slice(first, min(first + 2, LLM_LAYERS))] if stacked else []
        whole = [slice(0, size) for size in tensor.shape[len(layers) :]]
        if cut is None:
            yield (*layers, *whole)
        else:
            half = whole[cut].stop // 2
            for part in (slice(0, half), slice(half, whole[cut].stop)):
                yield (*layers, *whole[:cut], part, *whole[cut + 1 :])


def test_pieces_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    """Two tensor-parallel ranks: column-parallel along rows, row-parallel along columns, two layers in one piece."""
    hf = text_model(tmp_path / "hf")
    prepare_hf_to_torch_dist(TEXT, hf, tmp_path / "dist").run()
    found = loaded(tmp_path / "dist/release")
    cuts = {key: [*pieces_of(key, t)] for key, t in found.items()}
    save_pieces(tmp_path / "ranks", found, cuts)
    prepare_torch_dist_to_hf(TEXT, tmp_path / "ranks", hf, tmp_path / "back").run()
    assert (tmp_path / "back/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("decoder.layers.mlp.linear_fc2.weight"), r"missing 1: decoder\.layers\.mlp\.linear_fc2"),
        (lambda t: t.update({"decoder.extra": torch.ones(2)}), r"unknown 1: decoder\.extra"),
        (lambda t: t.update({"decoder.layers.mlp.linear_fc2.weight": torch.ones(LLM_LAYERS + 1, HIDDEN, FFN)}),
         r"unknown 1: decoder\.layers\.mlp\.linear_fc2\.weight"),
        (lambda t: t.update({"decoder.final_layernorm.weight": torch.ones(HIDDEN + 1)}), "final_layernorm.*is \\[17"),
    ],
)  # fmt: skip
def test_missing_unknown_and_misshaped_tensors_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], words: str
) -> None:
    hf = text_model(tmp_path / "hf")
    prepare_hf_to_torch_dist(TEXT, hf, tmp_path / "dist").run()
    state = loaded(tmp_path / "dist/release")
    change(state)
    save({**state, "optimizer.state": torch.ones(2)}, tmp_path / "changed")
    with pytest.raises(CheckpointError, match=words):
        prepare_torch_dist_to_hf(TEXT, tmp_path / "changed", hf, tmp_path / "back")


def test_experts_are_stacked_and_what_only_some_layers_have_is_not() -> None:
    expert = "text_decoder.decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1.weight"
    names = [expert.format(i, x) for i in range(2) for x in range(3)]
    names += [f"text_decoder.decoder.layers.{i}.mlp.router.weight" for i in range(2)]
    names += [f"text_decoder.decoder.layers.{i}.pre_mlp_layernorm.weight" for i in range(2)]
    blocks = "image_encoder.encoder.blocks.layers."
    names += [f"{blocks}{i}.input_layernorm.weight" for i in range(3)] + [f"{blocks}1.deepstack_layer.layernorm.weight"]
    found = places(names)
    assert found[expert.format(1, 2)] == Place(
        "text_decoder.decoder.layers.mlp.experts.experts.linear_fc1.weight", (1, 2)
    )
    norm = "text_decoder.decoder.layers.1.pre_mlp_layernorm.weight"
    assert found[norm] == Place("text_decoder.decoder.layers.pre_mlp_layernorm.weight", (1,))
    assert found[f"{blocks}2.input_layernorm.weight"] == Place(f"{blocks}input_layernorm.weight", (2,))
    assert found[f"{blocks}1.deepstack_layer.layernorm.weight"] == Place(f"{blocks}1.deepstack_layer.layernorm.weight")


def test_a_dense_layers_norm_is_that_of_the_fused_layer() -> None:
    assert variants("decoder.layers.3.pre_mlp_layernorm.weight")[0] == Place(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight", (3,)
    )
    held_at = [Place("decoder.layers.self_attention.linear_qkv.weight", (1,))]
    assert extra_states(held_at, {held_at[0].key: (4,)}) == [
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_1_4",
        "decoder.layers.self_attention.core_attention._extra_state/shard_1_4",
    ]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_there_and_back(tmp_path: Path, model: str) -> None:
    """To the folder of megatron-core, to rank folders, and to that of FSDP2; each way back gives the same bytes."""
    recorded, converter = Recorded.named(model), Converter.named(MODELS[model])
    hf = recorded.write(tmp_path / "hf")
    prepare_hf_to_torch_dist(converter, hf, tmp_path / "dist").run()
    prepare_torch_dist_to_hf(converter, tmp_path / "dist", hf, tmp_path / "back").run()
    layout = layouts(recorded)[0]
    converter.hf_to_mm(hf, tmp_path / "mm", layout)
    prepare_torch_dist_to_mm(converter, tmp_path / "dist", tmp_path / "cut", layout, hf_dir=hf).run()
    prepare_mm_to_torch_dist(converter, tmp_path / "cut", tmp_path / "again", hf_dir=hf).run()
    prepare_hf_to_dcp(hf, tmp_path / "dcp", family=converter.family).run()
    prepare_dcp_to_hf(tmp_path / "dcp", hf, tmp_path / "back2", family=converter.family).run()
    assert contents(tmp_path / "back", "*.safetensors") == contents(hf, "*.safetensors")
    assert contents(tmp_path / "back2", "*.safetensors") == contents(hf, "*.safetensors")
    assert contents(tmp_path / "cut", "release/*/*.pt") == contents(tmp_path / "mm", "release/*/*.pt")
    assert equal(loaded(tmp_path / "again/release"), loaded(tmp_path / "dist/release"))


def contents(directory: Path, pattern: str) -> dict[Path, bytes]:
    found = {path.relative_to(directory): path.read_bytes() for path in directory.glob(pattern)}
    assert found
    return found
