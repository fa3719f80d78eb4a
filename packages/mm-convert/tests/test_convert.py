"""Against a reference that reshapes whole tensors, and against itself there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference_layout
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_checkpoint import LLM_LAYERS, VIT_LAYERS, MakeModel, new_names, save_model, tensors

from mm_convert import (
    CheckpointError,
    Converter,
    HuggingFaceFolder,
    Layout,
    MegatronFolder,
    assemble,
    huggingface_reader,
    megatron_reader,
)

QWEN = Converter.named("Qwen2_5_VLConverter")


def load_hf(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


LAYOUTS = [
    ([[5]], [[3]], 1),
    ([[5]], [[3]], 4),
    ([[2, 3]], [[3, 0]], 2),
    ([[0, 5]], [[2, 1]], 1),
    ([[1, 2, 0, 2]], [[1, 0, 1, 1]], 2),
    ([[0, 1], [2, 2]], [[3, 0], [0, 0]], 2),
    ([[1, 1], [0, 1], [2, 0]], [[1, 1], [1, 0], [0, 0]], 1),
    ([[5], [0]], [[3], [0]], 1),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("llm", "vit", "tp"), LAYOUTS)
def test_equals_the_reference_and_comes_back(
    llm: list[list[int]], vit: list[list[int]], tp: int, tied: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    hf = make_model(tied=tied)
    layout = Layout(llm_pp_layers=llm, vit_pp_layers=vit, tp_size=tp)  # type: ignore[arg-type]
    QWEN.hf_to_mm(hf, tmp_path / "mm", layout)
    assert (tmp_path / "mm" / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    expected = reference_layout.megatron(tensors(tied=tied), llm, vit, tp, tied=tied)
    for (t, p, v), stage in expected.items():
        file = torch.load(tmp_path / "mm/release" / layout.rank_dir(t, p) / "model_optim_rng.pt", weights_only=True)
        assert file["checkpoint_version"] == 3.0
        assert same(file["model" if len(llm) == 1 else f"model{v}"], stage)
        assert len(file) == 1 + len(llm)
    assert MegatronFolder.open(tmp_path / "mm").layout == layout
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert same(load_hf(tmp_path / "back"), load_hf(hf))


def test_the_new_folder_is_a_whole_model(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),)))
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == [
        "config.json",
        "manifest.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    old, new = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (hf, tmp_path / "back"))
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())


@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_names_the_type_of_the_weights(key: str, trained: torch.dtype, tmp_path: Path) -> None:
    """Of a checkpoint that was trained in float32 from a folder in bfloat16: ``dtype="auto"`` would round it back."""
    halves = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    hf = save_model(tmp_path / "hf", halves)
    config = json.loads((hf / "config.json").read_text())
    config |= {key: "bfloat16", "vision_config": {**config["vision_config"], key: "bfloat16"}}
    (hf / "config.json").write_text(json.dumps(config, separators=(",", ":")))
    held = {name: tensor.to(trained) for name, tensor in halves.items()}
    QWEN.hf_to_mm(
        save_model(tmp_path / "trained", held), tmp_path / "mm", Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))
    )
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert same(load_hf(tmp_path / "back"), held)
    name = str(trained).removeprefix("torch.")
    found = (tmp_path / "back/config.json").read_text()
    assert json.loads(found) == config | {key: name, "vision_config": {**config["vision_config"], key: name}}
    assert (found == (hf / "config.json").read_text()) is (trained == torch.bfloat16), "else the file as it was"


@pytest.mark.parametrize("shards", [1, 2])
def test_new_names_and_a_single_file_are_read_and_written(shards: int, make_model: MakeModel, tmp_path: Path) -> None:
    layout = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),))
    hf = make_model(new=True, shards=shards)
    QWEN.hf_to_mm(hf, tmp_path / "mm", layout)
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert same(load_hf(tmp_path / "back"), new_names(tensors()))
    assert (tmp_path / "back" / "model.safetensors").exists() is (shards == 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layout_there_and_back(
    data: st.DataObject, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pp, vpp, tp = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 4]))

    def lists(total: int) -> tuple[tuple[int, ...], ...]:
        cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
        return tuple(tuple(counts[v * pp : (v + 1) * pp]) for v in range(vpp))

    tmp_path = tmp_path_factory.mktemp("any")
    hf = make_model(tmp_path.name)
    layout = Layout(llm_pp_layers=lists(LLM_LAYERS), vit_pp_layers=lists(VIT_LAYERS), tp_size=tp)
    QWEN.hf_to_mm(hf, tmp_path / "mm", layout)
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back", layout=layout)
    assert same(load_hf(tmp_path / "back"), load_hf(hf))


def test_a_tied_lm_head_that_equals_the_embedding_is_kept(make_model: MakeModel, tmp_path: Path) -> None:
    embedding = tensors(tied=True)["model.embed_tokens.weight"]
    hf = make_model(tied=True, **{"lm_head.weight": embedding.clone()})
    for pp in (((5,), (3,)), ((2, 3), (3, 0))):
        layout = Layout(llm_pp_layers=(pp[0],), vit_pp_layers=(pp[1],), tp_size=2)
        QWEN.hf_to_mm(hf, tmp_path / "mm", layout, overwrite=True)
        QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back", overwrite=True)
        assert same(load_hf(tmp_path / "back"), load_hf(hf))


def test_a_tied_lm_head_that_differs_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model(tied=True, **{"lm_head.weight": tensors()["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* must equal model\.embed_tokens\.weight"):
        QWEN.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),)))
    assert not (tmp_path / "mm").exists()


def test_replicas_that_drifted_apart_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=2))
    path = tmp_path / "mm/release/mp_rank_01/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["text_decoder.decoder.final_layernorm.weight"] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"final_layernorm.weight in mp_rank_01.* must equal"):
        QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_replicas_that_hold_nan_are_equal(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model(**{"model.norm.weight": torch.full((16,), float("nan"))})
    QWEN.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=2))
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    mm, model = MegatronFolder.open(tmp_path / "mm"), HuggingFaceFolder.open(hf)
    [norm] = [ref for ref in model.tensors if ref.name == "model.norm.weight"]
    assert assemble(QWEN.plan_mm_to_hf(mm, model), norm, megatron_reader(mm)).isnan().all()


def test_slices_of_tensors_in_memory(make_model: MakeModel, tmp_path: Path) -> None:
    hf, layout = make_model(), Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)
    QWEN.hf_to_mm(hf, tmp_path / "mm", layout)
    model = HuggingFaceFolder.open(hf)
    plan = QWEN.plan_hf_to_mm(model, layout)
    with huggingface_reader(model) as read:
        for ref in plan.targets:
            file = torch.load(tmp_path / "mm/release" / ref.file, weights_only=True, mmap=True)
            assert torch.equal(assemble(plan, ref, read), file[ref.section][ref.name])


def test_the_dtype_of_a_trained_checkpoint_is_kept(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),)))
    path = tmp_path / "mm/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    content["model"] = {n: t.bfloat16() for n, t in content["model"].items()} | {"x._extra_state": None}
    torch.save(content, path)
    QWEN.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert same(load_hf(tmp_path / "back"), {n: t.bfloat16() for n, t in tensors().items()})
