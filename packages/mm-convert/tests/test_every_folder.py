"""Models with more parts, other folders or single files, on disk: there, to another layout, and back.

What each tensor of each rank must be is tested in memory, model by model; here it is that folders carry it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory_plans import recorded
from recorded_models import Recorded, load_hf, random_tensors
from test_hunyuan_video import models as hunyuan_models
from test_resplit import weights
from tiny_checkpoint import Tensors

from mm_convert import CheckpointError, Converter, Layout, LayoutError, inspect, verify
from mm_convert.cli import main

Given = dict[str, Any]
MODELS: dict[str, tuple[str, Given, Given]] = {
    "qwen2_5_omni": (
        "Qwen2_5_OmniConverter",
        {"llm_pp_layers": [[2, 3]], "vit_pp_layers": [[3, 0]], "audio_pp_layers": [[1, 2]], "tp_size": 2},
        {"llm_pp_layers": [[5]], "vit_pp_layers": [[3]], "audio_pp_layers": [[3]], "tp_size": 4, "audio_tp_size": 1},
    ),
    "internvl": (
        "InternVLConverter",
        {"llm_pp_layers": [[2, 3]], "vit_pp_layers": [[3, 0]], "tp_size": 4},
        {"llm_pp_layers": [[1, 1], [0, 3]], "vit_pp_layers": [[3, 0], [0, 0]], "tp_size": 2},
    ),
    "internvl_6b": (
        "InternVLConverter",
        {"llm_pp_layers": [[0, 5]], "vit_pp_layers": [[2, 1]], "tp_size": 2},
        {"llm_pp_layers": [[5]], "vit_pp_layers": [[3]], "tp_size": 1},
    ),
    "hunyuan_video": (
        "HunyuanVideoConverter",
        {"llm_pp_layers": [[2]], "vit_pp_layers": [[3]], "tp_size": 2},
        {"llm_pp_layers": [[2]], "vit_pp_layers": [[3]], "tp_size": 4},
    ),
    "cogvideox": (
        "CogVideoConverter",
        {"llm_pp_layers": [[2, 3]], "tp_size": 2},
        {"llm_pp_layers": [[5]], "tp_size": 4},
    ),
}


def folder(model: str, directory: Path) -> Path:
    found = recorded(model)
    return Recorded(found["config"], found["saved"], found["saved"]).write(directory)


@pytest.mark.parametrize("model", MODELS)
def test_there_to_another_layout_and_back(model: str, tmp_path: Path) -> None:
    hf = folder(model, tmp_path / "hf")
    converter, *given = MODELS[model]
    chosen, (a, b) = Converter.named(converter), (Layout(**layout) for layout in given)
    chosen.hf_to_mm(hf, tmp_path / "a", a)
    chosen.hf_to_mm(hf, tmp_path / "b", b)
    chosen.resplit(tmp_path / "a", tmp_path / "ab", b, hf_dir=hf)
    chosen.resplit(tmp_path / "b", tmp_path / "ba", a, hf_dir=hf)
    assert weights(tmp_path / "ab") == weights(tmp_path / "b")
    assert weights(tmp_path / "ba") == weights(tmp_path / "a")
    chosen.mm_to_hf(tmp_path / "ab", hf, tmp_path / "back")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    for name in ("hf", "a", "ba"):
        assert converter in inspect(tmp_path / name).converters
    assert inspect(tmp_path / "a").layout == a
    assert verify(tmp_path / "a", tmp_path / "b", full=True).same
    assert verify(hf, tmp_path / "ba", full=True).same


def test_a_generative_models_layout_is_said_in_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its option is called pp_layers; there is no language model."""
    hf, mm = folder("wan_t2v", tmp_path / "hf"), tmp_path / "mm"
    line = ["WanConverter", "hf_to_mm", "--cfg.source_path", str(hf), "--cfg.target_path", str(mm)]
    line += ["--cfg.target_parallel_config.pp_layers", "[2,3]"]
    assert main(["plan", *line]) == 0
    assert "(pp_layers [[2,3]], tp_size 1)" in capsys.readouterr().out
    assert main(line) == 0
    again = ["WanConverter", "resplit", "--cfg.source_path", str(mm), "--cfg.target_path", str(tmp_path / "one")]
    assert main(again) == 0
    assert main(["inspect", str(tmp_path / "one")]) == 0
    assert "layers    pp_layers [[5]], tp_size 1" in capsys.readouterr().out
    for made in (mm, tmp_path / "one"):
        assert "llm_pp_layers" not in (made / "manifest.json").read_text()


def original(directory: Path, extra: Any = None) -> tuple[Path, Tensors]:
    """A HunyuanVideo file of the original release."""
    _, _, source = hunyuan_models("hunyuan_video")
    file = directory / "mp_rank_00_model_states.pt"
    torch.save({"module": source, **(extra or {})}, file)
    return file, source


def test_a_single_file_of_an_original_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = original(tmp_path)
    line = ["--cfg.source_path", str(file), "--cfg.target_path", str(tmp_path / "mm")]
    line += ["--cfg.target_parallel_config.tp_size", "2"]
    assert main(["HunyuanVideoConverter", "--version", "t2v", "source_to_mm", *line]) == 0
    assert f"tensors of {file} (original release)" in capsys.readouterr().out
    hf = folder("hunyuan_video", tmp_path / "hf")
    Converter.named("HunyuanVideoConverter").hf_to_mm(hf, tmp_path / "expected", None, tp_size=2)
    names = [sorted(read(tmp_path / made, t)) for made in ("mm", "expected") for t in (0, 1)]
    assert names[0] == names[2]
    assert names[1] == names[3]
    assert main(["HunyuanVideoConverter", "--version=t2i", "source_to_mm", *line]) == 2
    assert "--version 't2i'; HunyuanVideoConverter has: t2v, i2v" in capsys.readouterr().err


def read(directory: Path, tp_rank: int) -> Tensors:
    file = directory / f"release/mp_rank_{tp_rank:02d}/model_optim_rng.pt"
    return torch.load(file, weights_only=True)["model"]  # type: ignore[no-any-return]


class RunsCode:
    """Unpickled, it would print."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code was run",)


def test_a_file_that_asks_to_run_code_is_refused(tmp_path: Path) -> None:
    file, _ = original(tmp_path, {"optimizer": RunsCode()})
    with pytest.raises(CheckpointError, match=r"__builtin__\.print, which no checkpoint needs"):
        Converter.named("HunyuanVideoConverter").hf_to_mm(file, tmp_path / "mm", None)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name in ("HunyuanVideoConverter", "CogVideoConverter"):
        with pytest.raises(CheckpointError, match="original release"):
            Converter.named(name).hf_to_mm(tmp_path / "other.pt", tmp_path / "mm", None)


def test_what_a_family_does_not_have_is_refused(tmp_path: Path) -> None:
    hf = folder("cogvideox", tmp_path / "cog")
    with pytest.raises(LayoutError, match="2 virtual stages: this model's pipeline has none"):
        Converter.named("CogVideoConverter").hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((2,), (3,))))
    hf = folder("hunyuan_video", tmp_path / "hunyuan")
    pipeline = Layout(llm_pp_layers=((1, 1),), vit_pp_layers=((1, 2),))
    with pytest.raises(LayoutError, match="this model has no pipeline"):
        Converter.named("HunyuanVideoConverter").hf_to_mm(hf, tmp_path / "mm", pipeline)


def whole_omni(directory: Path) -> tuple[Path, dict[str, list[int]]]:
    """A whole Qwen2.5-Omni: the thinker under its prefix, and parts that are not converted."""
    thinker = Recorded.named("qwen2_5_omni")
    shapes = {f"thinker.{name}": shape for name, shape in thinker.saved.items()}
    others = {"talker.model.norm.weight": [4], "token2wav.code2wav_dit_model.proj.weight": [4, 2]}
    config = {"model_type": "qwen2_5_omni", "thinker_config": thinker.config}
    return Recorded(config, shapes | others, {}).write(directory), others


def test_parts_that_are_not_converted_stay_in_the_template(tmp_path: Path) -> None:
    hf, others = whole_omni(tmp_path / "hf")
    chosen, layout = Converter.named("Qwen2_5_OmniConverter"), Layout(**MODELS["qwen2_5_omni"][1])
    chosen.hf_to_mm(hf, tmp_path / "mm", layout)
    thinker = Recorded.named("qwen2_5_omni").write(tmp_path / "thinker")
    chosen.hf_to_mm(thinker, tmp_path / "alone", layout)
    assert [len(read_all(tmp_path / made)) for made in ("mm", "alone")] == [len(read_all(tmp_path / "mm"))] * 2
    chosen.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert others.keys() <= load_hf(tmp_path / "back").keys()
    assert verify(hf, tmp_path / "mm", full=True).same


def read_all(directory: Path) -> dict[str, Any]:
    files = directory.glob("release/*/model_optim_rng.pt")
    return {f"{f.parent.name} {n}": t for f in files for n, t in torch.load(f, weights_only=True)["model"].items()}


def test_a_trained_bias_that_changes_nothing_is_left_out(tmp_path: Path) -> None:
    """A key's bias adds the same to all logits of a query; the layout has one, the Hugging Face side has none."""
    hf, chosen = folder("qwen2_5_omni", tmp_path / "hf"), Converter.named("Qwen2_5_OmniConverter")
    one = {"llm_pp_layers": [[5]], "vit_pp_layers": [[3]], "audio_pp_layers": [[3]]}
    chosen.hf_to_mm(hf, tmp_path / "mm", Layout(**one))  # type: ignore[arg-type]
    file = tmp_path / "mm/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=True)
    heads = json.loads((hf / "config.json").read_text())["audio_config"]["encoder_attention_heads"]
    bias = content["model"]["audio_encoder.encoder.blocks.layers.1.self_attention.linear_qkv.bias"]
    bias.view(heads, 3, -1)[:, 1] += 1
    torch.save(content, file)
    chosen.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    before, after = load_hf(hf), load_hf(tmp_path / "back")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    two = Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), audio_pp_layers=((1, 2),))
    chosen.resplit(tmp_path / "mm", tmp_path / "two", two)
    moved = torch.load(tmp_path / "two/release/mp_rank_00_001/model_optim_rng.pt", weights_only=True)["model"]
    assert torch.equal(moved["audio_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.bias"], bias)


def test_random_tensors_tell_one_from_another() -> None:
    """Else a test that compares bytes could pass by chance."""
    tensors = random_tensors({"a": [3], "b": [3]})
    assert not torch.equal(tensors["a"], tensors["b"])
