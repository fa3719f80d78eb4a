"""Folders of Wan on the command line: diffusers' and the original release's, a whole pipeline's, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_models import load_hf, random_tensors
from safetensors.torch import save_file
from test_bad_input import refused
from test_wan import published, recorded
from tiny_checkpoint import MakeModel, Tensors, new_names, tensors

from mm_convert import Converter, MegatronFolder
from mm_convert.cli import main
from mm_convert.families.wan import WAN

STEM = "diffusion_pytorch_model"
KINDS = ["t2v", "i2v", "flf2v"]
NAMES = ["diffusers", "original"]


def model(kind: str, names: str) -> tuple[dict[str, Any], Tensors]:
    """The recorded configuration, and random tensors that are the same under both names."""
    found = recorded(kind)
    held = random_tensors(found["saved"])
    if names == "diffusers":
        return found["config"], held
    return found["original_config"], {name: held[WAN.canonical(name)] for name in found["original"]}


def wan(directory: Path, kind: str = "t2v", names: str = "diffusers", shards: int = 2) -> Path:
    config, held = model(kind, names)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(held, directory / f"{STEM}.safetensors", {"format": "pt"})
        return directory
    weight_map = {name: f"{STEM}-{k % shards + 1:05d}-of-{shards:05d}.safetensors" for k, name in enumerate(held)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in held.items() if weight_map[n] == file}, directory / file, {"format": "pt"})
    (directory / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def hf_to_mm(hf: Path, mm: Path, pp: str | None = None, *more: str) -> list[str]:
    lists = [] if pp is None else ["--cfg.target_parallel_config.pp_layers", pp]
    return ["WanConverter", "hf_to_mm", "--cfg.source_path", str(hf), "--cfg.target_path", str(mm), *lists, *more]


def mm_to_hf(mm: Path, hf: Path, save: Path, *more: str) -> list[str]:
    return ["WanConverter", "mm_to_hf", "--cfg.source_path", str(mm), "--cfg.target_path", str(save),
            "--cfg.hf_dir", str(hf), *more]  # fmt: skip


def resplit(mm: Path, target: Path, pp: str | None = None) -> list[str]:
    return [words if words != "hf_to_mm" else "resplit" for words in hf_to_mm(mm, target, pp)]


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def files(directory: Path) -> dict[str, bytes]:
    """Every file but the manifest, which names the command."""
    found = (p for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(directory)): p.read_bytes() for p in found}


@pytest.mark.parametrize(("names", "shards"), [("diffusers", 1), ("original", 2)])
@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
@pytest.mark.parametrize(("typed", "lists"), [(None, [[5]]), ("[2,3]", [[2, 3]]), ("[[1,1],[0,3]]", [[1, 1], [0, 3]])])
def test_published_files_and_back(
    kind: str, names: str, shards: int, typed: str | None, lists: list[list[int]], tmp_path: Path
) -> None:
    """``checkpoint_version`` stands beside virtual stages only; the way back has the template's own file names."""
    hf, mm, back = wan(tmp_path / "hf", kind, names, shards), tmp_path / "mm", tmp_path / "back"
    assert main(hf_to_mm(hf, mm, typed)) == 0
    assert (mm / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    ranks = published(model(kind, "diffusers")[1], lists)
    for (p, v), held in ranks.items():
        folder = f"mp_rank_00_{p:03d}" if len(lists[0]) > 1 else "mp_rank_00"
        file = torch.load(mm / "release" / folder / "model_optim_rng.pt", weights_only=True)
        virtual = len(lists) > 1
        assert same(file[f"model{v}" if virtual else "model"], held)
        assert file.keys() == ({"model0", "model1", "checkpoint_version"} if virtual else {"model"})
    assert MegatronFolder.open(mm).layout.llm_pp_layers == tuple(map(tuple, lists))
    assert main(mm_to_hf(mm, hf, back)) == 0
    made, template = files(back), files(hf)
    for text in (made, template):
        text.pop(f"{STEM}.safetensors.index.json", None)
    assert made == template
    if shards > 1:
        old, new = (json.loads((d / f"{STEM}.safetensors.index.json").read_text()) for d in (hf, back))
        assert new["weight_map"] == old["weight_map"]


def test_flat_and_nested_lists_are_the_same(tmp_path: Path) -> None:
    hf = wan(tmp_path / "hf")
    assert main(hf_to_mm(hf, tmp_path / "a", "[2,3]")) == 0
    assert main(hf_to_mm(hf, tmp_path / "b", "[[2,3]]", "--cfg.target_parallel_config.tp_size", "1")) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("target", [None, "[[5]]", "[1,0,4]", "[[1,1],[0,3]]"])
@pytest.mark.parametrize("source", ["[2,3]", "[[0,2],[3,0]]"])
def test_resplit_gives_what_hf_to_mm_gives(source: str, target: str | None, tmp_path: Path) -> None:
    hf = wan(tmp_path / "hf", "flf2v")
    assert main(hf_to_mm(hf, tmp_path / "a", source)) == 0
    assert main(hf_to_mm(hf, tmp_path / "b", target)) == 0
    assert main(resplit(tmp_path / "a", tmp_path / "c", target)) == 0
    assert files(tmp_path / "c") == files(tmp_path / "b")


@pytest.mark.parametrize("naming", NAMES)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_either_naming_with_its_configuration(kind: str, names: str, naming: str, tmp_path: Path) -> None:
    hf = wan(tmp_path / "hf", kind, names)
    assert main(hf_to_mm(hf, tmp_path / "mm")) == 0
    assert main(mm_to_hf(tmp_path / "mm", hf, tmp_path / "back", "--hf_naming", naming)) == 0
    config, held = model(kind, naming)
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    assert same(load_hf(tmp_path / "back"), held)
    weight_map = json.loads((tmp_path / "back" / f"{STEM}.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == held.keys()


def test_a_pipeline_is_its_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    wan(pipeline / "transformer")
    (pipeline / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert main(hf_to_mm(pipeline, tmp_path / "mm")) == 0
    assert f"{pipeline / 'transformer'} (Hugging Face)" in capsys.readouterr().out
    assert main(mm_to_hf(tmp_path / "mm", pipeline, tmp_path / "back")) == 0
    assert same(load_hf(tmp_path / "back"), load_hf(pipeline / "transformer"))
    assert not (tmp_path / "back/transformer").exists()


def test_a_pipeline_of_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tmp_path / "pipeline"
    for name in ("transformer", "transformer_2"):
        wan(pipeline / name)
    (pipeline / "model_index.json").write_text("{}")
    refused(hf_to_mm(pipeline, tmp_path / "mm"), tmp_path / "mm", capsys, "several models", "transformer_2")
    assert main(hf_to_mm(pipeline / "transformer_2", tmp_path / "mm")) == 0


def test_a_plan_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = wan(tmp_path / "hf")
    assert main(["plan", *hf_to_mm(hf, tmp_path / "mm", "[2,3]")]) == 0
    assert "mp_rank_00_001/model_optim_rng.pt: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("pp", "more", "words"),
    [
        ("[2,2]", [], [" pp_layers [[2,2]] sum to 4, but the model has 5 blocks", "[[2,3]] would fit"]),
        ("[2,3]", ["--cfg.target_parallel_config.tp_size", "2"], ["tp_size 2", "[1]"]),
        ("[2,3]", ["--cfg.target_parallel_config.ep_size", "2"], ["ep_size 2", "legal: 1"]),
        (None, ["--cfg.target_parallel_config.tp_size", "2"], ["tp_size 2", "[1]"]),
        (None, ["--cfg.target_parallel_config.ep_size", "2"], ["ep_size 2", "legal: 1"]),
        ("[[2,3],[1]]", [], ["one row for each virtual stage"]),
    ],
)
def test_layouts_that_are_none(
    pp: str | None, more: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(hf_to_mm(wan(tmp_path / "hf"), tmp_path / "mm", pp, *more), tmp_path / "mm", capsys, *words)


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--plan"], ["--resume"]])
def test_the_source_is_never_the_target(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published converter writes into the folder that it reads; here it says what to type instead."""
    hf = wan(tmp_path / "hf")
    before = files(hf)
    example = str(tmp_path / "hf-converted")
    refused(hf_to_mm(hf, hf, "[5]", *more), hf, capsys, "is read", "a folder of its own", example)
    assert main(hf_to_mm(hf, tmp_path / "mm")) == 0
    refused(mm_to_hf(tmp_path / "mm", hf, hf, *more), hf, capsys, "is read", example)
    refused(mm_to_hf(tmp_path / "mm", hf, tmp_path / "mm", *more), hf, capsys, "is read")
    refused(resplit(tmp_path / "mm", tmp_path / "mm") + more, hf, capsys, "is read")
    assert files(hf) == before


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, mm = wan(tmp_path / "hf"), tmp_path / "mm"
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"_class_name": "CogVideoXTransformer3DModel"}))
    refused(hf_to_mm(hf, mm), mm, capsys, "_class_name 'CogVideoXTransformer3DModel'", "WanTransformer3DModel")
    (hf / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "num_layers"}))
    refused(hf_to_mm(hf, mm), mm, capsys, "no 'num_layers'")
    (hf / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, hf / "model.safetensors")
    refused(hf_to_mm(hf, mm), mm, capsys, "weights twice", "model and as diffusion_pytorch_model")
    (hf / "model.safetensors").unlink()
    index = hf / f"{STEM}.safetensors.index.json"
    for text in ('{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        refused(hf_to_mm(hf, mm), mm, capsys, "weight_map must hold the name of a file")
    index.unlink()
    refused(hf_to_mm(hf, mm), mm, capsys, f"{STEM}.safetensors is missing", index.name)
    (hf / "config.json").rename(tmp_path / "model_index.json")
    refused(hf_to_mm(hf, mm), mm, capsys, "has no config.json")


def test_a_configuration_that_can_not_be_put_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, mm, back = wan(tmp_path / "hf"), tmp_path / "mm", tmp_path / "back"
    assert main(hf_to_mm(hf, mm)) == 0
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "in_channels"}))
    refused(mm_to_hf(mm, hf, back, "--hf_naming", "original"), back, capsys, "no 'in_channels'")


@pytest.mark.parametrize("naming", ["old", "new"])
@pytest.mark.parametrize("new", [False, True])
def test_names_of_a_vision_language_model(new: bool, naming: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Old are the published names, new those of transformers >= 4.52 in memory."""
    hf, mm, back = make_model(new=new), tmp_path / "mm", tmp_path / "back"
    line = ["--cfg.mm_dir", str(mm), "--cfg.hf_config.hf_dir", str(hf)]
    lists = ["--cfg.parallel_config.llm_pp_layers", "[2,3]", "--cfg.parallel_config.vit_pp_layers", "[3,0]"]
    assert main(["Qwen2_5_VLConverter", "hf_to_mm", *line, *lists]) == 0
    assert main(["Qwen2_5_VLConverter", "mm_to_hf", *line, "--cfg.save_hf_dir", str(back), "--hf_naming", naming]) == 0
    expected = new_names(tensors()) if naming == "new" else tensors()
    assert same(load_hf(back), expected)
    assert json.loads((back / "model.safetensors.index.json").read_text())["weight_map"].keys() == expected.keys()
    assert json.loads((back / "manifest.json").read_text())["options"]["hf_naming"] == naming
    assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_a_naming_that_the_model_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, mm = wan(tmp_path / "hf"), tmp_path / "mm"
    assert main(hf_to_mm(hf, mm)) == 0
    with pytest.raises(SystemExit) as stop:
        main(mm_to_hf(mm, hf, tmp_path / "back", "--hf_naming", "new"))
    assert stop.value.code == 2
    assert "diffusers" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"hf_naming 'new'; this model has template, diffusers, original"):
        Converter.named("WanConverter").mm_to_hf(mm, hf, tmp_path / "back", hf_naming="new")
