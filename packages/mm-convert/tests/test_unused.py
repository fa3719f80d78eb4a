"""Tensors that may be left over, parts of a model alone, and a language model from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_models import load_hf
from test_bad_input import CONVERTER, edit_config, hf_to_mm, mm_to_hf, refused
from tiny_checkpoint import MakeModel, Tensors, new_names, save_model, tensors

from mm_convert import Converter, Layout
from mm_convert.cli import main

TALKER = {
    "talker.model.norm.weight": torch.arange(6.0).reshape(2, 3),
    "talker.scale": torch.tensor(3.5, dtype=torch.float64),
    "talker.empty": torch.zeros(0, 4),
}
RELEASE = "release/mp_rank_00/model_optim_rng.pt"
WHOLE = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())["options"]  # type: ignore[no-any-return]


def rank(mm: Path, folder: str = "mp_rank_00") -> Tensors:
    return torch.load(mm / "release" / folder / "model_optim_rng.pt", weights_only=True)["model"]  # type: ignore[no-any-return]


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_allowed_tensors_are_left_over_and_come_back_from_the_template(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm, back = make_model(**TALKER), tmp_path / "mm", tmp_path / "back"
    line = hf_to_mm(hf, mm, "[5]", "[3]", 1)
    refused(line, mm, capsys, "unknown 3", "talker.empty")
    assert main([*line, "--allow-unused", "talker.[!s]*", "--allow-unused", "talker.scale"]) == 0
    assert "3 tensors left over, as allowed" in capsys.readouterr().out
    assert manifest(mm)["unused"] == sorted(TALKER)
    assert manifest(mm)["allow_unused"] == ["talker.[!s]*", "talker.scale"]
    plain = tmp_path / "plain"
    assert main(hf_to_mm(make_model("other"), plain, "[5]", "[3]", 1)) == 0
    assert (mm / RELEASE).read_bytes() == (plain / RELEASE).read_bytes()
    assert main([*mm_to_hf(mm, hf, back), "--allow-unused", "talker.*"]) == 0
    assert "3 tensors taken from hf_dir as they are" in capsys.readouterr().out
    for file in hf.glob("*.safetensors"):
        assert (back / file.name).read_bytes() == file.read_bytes()
    assert manifest(back)["unused"] == sorted(TALKER)


def test_what_may_be_left_over_is_used_where_it_is_needed(make_model: MakeModel, tmp_path: Path) -> None:
    hf, mm = make_model(**TALKER), tmp_path / "mm"
    assert main([*hf_to_mm(hf, mm, "[5]", "[3]", 1), "--allow-unused", "*"]) == 0
    assert manifest(mm)["unused"] == sorted(TALKER)


def test_layers_beyond_the_last_one(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As models have them that predict several tokens: `num_hidden_layers` does not count them."""
    extra = {"model.layers.5.input_layernorm.weight": torch.ones(16)}
    hf, mm = make_model(**extra), tmp_path / "mm"
    refused(hf_to_mm(hf, mm, "[5]", "[3]", 1), mm, capsys, "unknown 1", *extra)
    assert main([*hf_to_mm(hf, mm, "[5]", "[3]", 1), "--allow-unused", "model.layers.5.*"]) == 0
    assert manifest(mm)["unused"] == list(extra)


def test_old_and_new_names_with_tensors_left_over(make_model: MakeModel, tmp_path: Path) -> None:
    """Only what is converted is spelt otherwise; what is taken as it is keeps its name."""
    hf, mm, back = make_model(**TALKER), tmp_path / "mm", tmp_path / "back"
    unused = ["--allow-unused", "talker.*"]
    assert main([*hf_to_mm(hf, mm, "[5]", "[3]", 1), *unused]) == 0
    assert main([*mm_to_hf(mm, hf, back), *unused, "--hf_naming", "new"]) == 0
    assert same(load_hf(back), new_names(tensors()) | TALKER)


@pytest.mark.parametrize("way", ["hf_to_mm", "mm_to_hf"])
def test_a_pattern_of_nothing(
    way: str, make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm = make_model(), tmp_path / "mm"
    line, target = hf_to_mm(hf, mm, "[5]", "[3]", 1), mm
    if way == "mm_to_hf":
        assert main(line) == 0
        line, target = mm_to_hf(mm, hf, tmp_path / "back"), tmp_path / "back"
    refused([*line, "--allow-unused", "taker.*"], target, capsys, "--allow-unused taker.*", "no tensor", "lm_head")


def test_the_dry_run_lists_them(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make_model(**TALKER)
    line = ["plan", *hf_to_mm(hf, tmp_path / "mm", "[5]", "[3]", 1), "--allow-unused", "talker.*"]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert all(f"\n        {name}\n" in shown for name in TALKER)
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["unused"] == sorted(TALKER)


def test_resplit_has_no_such_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([CONVERTER, "resplit", "--allow-unused", "a"])
    assert stop.value.code == 2
    assert "--allow-unused" in capsys.readouterr().err


@pytest.mark.parametrize("new", [False, True])
def test_the_vision_part_alone(new: bool, make_model: MakeModel, tmp_path: Path) -> None:
    hf, mm, whole = make_model(new=new), tmp_path / "mm", tmp_path / "whole"
    assert main([*hf_to_mm(hf, mm), "--cfg.save_vit_only", "true"]) == 0
    assert main(hf_to_mm(hf, whole)) == 0
    for folder in ("mp_rank_00_000", "mp_rank_00_001"):
        vision = {n: t for n, t in rank(whole, folder).items() if n.startswith("image_encoder.")}
        assert same(rank(mm, folder), vision)


def test_the_vision_part_alone_must_be_whole(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm = make_model(surprise=torch.ones(1)), tmp_path / "mm"
    line = [*hf_to_mm(hf, mm), "--cfg.save_vit_only", "true"]
    refused(line, mm, capsys, "unknown 1: surprise")
    assert main([*line, "--allow-unused", "surprise"]) == 0


def text_model(directory: Path, made: Tensors, **changes: object) -> Path:
    save_model(directory, {n: t for n, t in made.items() if not n.startswith("visual.")})
    edit_config(model_type="qwen2", vision_config=None, **changes)(directory)
    return directory


@pytest.mark.parametrize("kind", ["text", "vision-language, new names"])
def test_a_language_model_from_elsewhere(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    hf, mm, other = make_model(), tmp_path / "mm", tensors(seed=1)
    folder = tmp_path / "llm"
    if kind == "text":
        text_model(folder, other)
    else:
        save_model(folder, new_names(other), nested=True)
    assert main([*hf_to_mm(hf, mm, "[5]", "[3]", 1), "--cfg.common_model_config.llm_hf_dir", str(folder)]) == 0
    mixed = {n: (t if n.startswith("visual.") else other[n]) for n, t in tensors().items()}
    Converter.named(CONVERTER).hf_to_mm(save_model(tmp_path / "mixed", mixed), tmp_path / "expected", WHOLE)
    assert same(rank(mm), rank(tmp_path / "expected"))
    assert manifest(mm)["llm_hf_dir"].keys() == {path.name for path in folder.glob("*.safetensors")}


def test_a_language_model_that_does_not_fit(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm, made = make_model(), tmp_path / "mm", tensors(seed=1)

    def refuse(name: str, changed: Tensors, *words: str, **config: object) -> None:
        folder = text_model(tmp_path / name, changed, **config)
        line = [*hf_to_mm(hf, mm, "[5]", "[3]", 1), "--cfg.common_model_config.llm_hf_dir", str(folder)]
        refused(line, mm, capsys, *words)

    refuse("short", {n: t for n, t in made.items() if n != "model.norm.weight"}, "missing 1: model.norm.weight")
    refuse("long", made | {"model.layers.5.mlp.up_proj.weight": torch.ones(1)}, "layers.5", "no such language model")
    wide = {"model.norm.weight": torch.ones(17)}
    refuse("wide", made | wide, "does not fit", "model.norm.weight is [17] there, [16] here")
    refuse("heads", made, "num_key_value_heads is 2 there, 4 here", num_key_value_heads=2)


def test_published_options_of_no_effect(make_model: MakeModel, tmp_path: Path) -> None:
    hf, mm, plain = make_model(), tmp_path / "mm", tmp_path / "plain"
    assert main(hf_to_mm(hf, plain, "[5]", "[3]", 1)) == 0
    more = ["--cfg.trust_remote_code", "true", "--cfg.llm_hf_config.hf_dir", str(hf)]
    sizes = [
        f"--cfg.parallel_config.{part}={n}" for part, n in (("ep_size", 1), ("vit_tp_size", 0), ("audio_tp_size", 0))
    ]
    assert main([*hf_to_mm(hf, mm, "[5]", "[3]", 1), *more, *sizes]) == 0
    assert (mm / RELEASE).read_bytes() == (plain / RELEASE).read_bytes()
    assert main([*mm_to_hf(mm, hf, tmp_path / "back"), "--cfg.trust_remote_code", "true"]) == 0


def test_experts_of_a_model_that_has_none(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mm = tmp_path / "mm"
    refused(
        [*hf_to_mm(make_model(), mm), "--cfg.parallel_config.ep_size", "2"], mm, capsys, "ep_size 2", "legal for this"
    )


STRUCTURE = ["--cfg.common_model_config.enable_canonical_hf_struct", "true"]


def test_the_structure_for_adapters_is_found_on_the_way_back(make_model: MakeModel, tmp_path: Path) -> None:
    """Query, key and value stand apart under the names of the published canonical structure."""
    hf, mm, back = make_model(), tmp_path / "mm", tmp_path / "back"
    assert main([*hf_to_mm(hf, mm, "[5]", "[3]", 2), *STRUCTURE]) == 0
    held = tensors()["model.layers.0.self_attn.k_proj.weight"].chunk(2)
    for t in (0, 1):
        found = rank(mm, f"mp_rank_{t:02d}")
        assert torch.equal(found["text_decoder.decoder.layers.0.self_attention.k_proj.weight"], held[t])
        assert not any("text_decoder" in name and "linear_qkv" in name for name in found)
    for number, more in enumerate(([], STRUCTURE)):
        assert main([*mm_to_hf(mm, hf, back.with_name(f"back{number}")), *more]) == 0
        assert same(load_hf(back.with_name(f"back{number}")), tensors())


def test_resplit_keeps_the_structure(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    apart = Converter.named(CONVERTER, canonical=True)
    layout = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2)
    apart.hf_to_mm(hf, tmp_path / "a", layout)
    apart.hf_to_mm(hf, tmp_path / "b", WHOLE)
    Converter.named(CONVERTER).resplit(tmp_path / "a", tmp_path / "c", WHOLE)
    assert (tmp_path / "c" / RELEASE).read_bytes() == (tmp_path / "b" / RELEASE).read_bytes()


def test_the_structure_is_checked_where_it_is_given(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm, back = make_model(), tmp_path / "mm", tmp_path / "back"
    assert main(hf_to_mm(hf, mm, "[5]", "[3]", 1)) == 0
    refused([*mm_to_hf(mm, hf, back), *STRUCTURE], back, capsys, "given: enable_canonical_hf_struct", str(mm))


def test_the_ends_on_the_first_pipeline_rank(make_model: MakeModel, tmp_path: Path) -> None:
    """The published U-shape: embedding, final norm and output layer on rank 0, whose own stages hold no layer."""
    hf, mm, back = make_model(), tmp_path / "mm", tmp_path / "back"
    line = hf_to_mm(hf, mm, "[[0,0],[0,5],[0,0]]", "[[1,1],[1,0],[0,0]]", 1)
    assert main([word if word != "hf_to_mm" else "hf_to_mm_ldt" for word in line]) == 0
    first = torch.load(mm / "release/mp_rank_00_000/model_optim_rng.pt", weights_only=True)
    assert "text_decoder.embedding.word_embeddings.weight" in first["model1"]
    assert {"text_decoder.decoder.final_layernorm.weight", "text_decoder.output_layer.weight"} == first["model2"].keys()
    assert main(mm_to_hf(mm, hf, back)) == 0
    assert same(load_hf(back), tensors())
