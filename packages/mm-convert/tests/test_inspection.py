"""What a folder is: said from names and headers; what can't be known is said to be unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_bad_input import hf_to_mm
from test_streaming import child
from tiny_checkpoint import MakeModel, tensors

from mm_convert import Converter, Layout, verify
from mm_convert.cli import main
from mm_convert.inspection import inspect

QWEN = Converter.named("Qwen2_5_VLConverter")
PIPELINE = Layout(llm_pp_layers=((0, 1), (2, 2)), vit_pp_layers=((3, 0), (0, 0)), tp_size=2)
ONE = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),))


@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_folder(tied: bool, make_model: MakeModel) -> None:
    found = inspect(make_model(tied=tied))
    held = tensors(tied=tied)
    assert (found.kind, found.converters, found.model_type) == ("huggingface", ("Qwen2_5_VLConverter",), "qwen2_5_vl")
    assert (found.dtypes, found.tensors, found.files) == ({"F32": len(held)}, len(held), 2)
    assert found.nbytes == sum(t.nbytes for t in held.values())
    assert (found.tied, found.layout, found.manifest) == (tied, None, None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", [ONE, PIPELINE], ids=["one", "pipeline"])
def test_a_megatron_folder(layout: Layout, tied: bool, make_model: MakeModel, tmp_path: Path) -> None:
    QWEN.hf_to_mm(make_model(tied=tied), tmp_path / "mm", layout)
    found = inspect(tmp_path / "mm")
    assert (found.kind, found.converters, found.model_type) == ("megatron", ("Qwen2_5_VLConverter",), "qwen2_5_vl")
    assert (found.layout, found.iteration, found.files) == (layout, "release", layout.tp_size * layout.pp_size)
    assert found.tied is tied
    assert found.manifest is not None
    assert found.manifest["options"]["command"] == "hf_to_mm"


def test_a_trained_folder_has_no_manifest_and_its_tie_shows_in_the_bytes_only(
    make_model: MakeModel, tmp_path: Path
) -> None:
    QWEN.hf_to_mm(make_model(tied=True), tmp_path / "mm", PIPELINE)
    (tmp_path / "mm" / "manifest.json").unlink()
    (tmp_path / "mm" / "release").rename(tmp_path / "mm" / "iter_0001000")
    (tmp_path / "mm" / "latest_checkpointed_iteration.txt").write_text("1000\n")
    found = inspect(tmp_path / "mm")
    assert (found.iteration, found.tied, found.manifest) == ("iter_0001000", None, None)
    assert "verify" in found.tied_reason


@pytest.mark.parametrize("change", ["touched", "hostile", "broken"])
def test_a_manifest_that_says_nothing_of_the_files_any_more(change: str, make_model: MakeModel, tmp_path: Path) -> None:
    QWEN.hf_to_mm(make_model(tied=True), tmp_path / "mm", PIPELINE)
    manifest = tmp_path / "mm" / "manifest.json"
    if change == "touched":
        (tmp_path / "mm/release/mp_rank_00_001/model_optim_rng.pt").touch()
    else:
        manifest.write_text({"hostile": '{"outputs": {"/etc/passwd": 3}}', "broken": "{"}[change])
    assert inspect(tmp_path / "mm").tied is None
    assert verify(tmp_path / "mm", tmp_path / "mm").how == "bytes"


def test_words_and_json(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(hf_to_mm(make_model(), tmp_path / "mm", tp=2)) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "mm")]) == 0
    out = capsys.readouterr().out
    for words in (
        "Megatron folder, release",
        "qwen2_5_vl",
        "F32 (148 tensors)",
        "tp 2, pp 2, vpp 1",
        "[[2,3]]",
        "4 files",
    ):
        assert words in out
    assert main(["inspect", str(tmp_path / "mm"), "--json"]) == 0
    layout = json.loads(capsys.readouterr().out)["layout"]
    assert {"llm_pp_layers": [[2, 3]], "vit_pp_layers": [[3, 0]], "tp_size": 2, "ep_size": 1}.items() <= layout.items()


def test_a_model_that_no_converter_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "something"}')
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("unknown") == 3  # converter, tied, made by
    assert "something" in out
    (tmp_path / "config.json").write_text("{}")
    assert inspect(tmp_path).model_type is None


def touch(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("notes.txt", "neither config.json nor latest_checkpointed_iteration.txt"),
        ("config.json", "no *.safetensors"),
        ("model_index.json", "a diffusers pipeline"),
        ("adapter_config.json", "a PEFT adapter"),
        ("release/.metadata", "a torch distributed checkpoint"),
        ("release/mp_rank_00/model_optim_rng.pt", "no latest_checkpointed_iteration.txt: an interrupted run?"),
    ],
)
def test_other_folders_are_named(name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, name)
    assert main(["inspect", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_paths_that_are_no_checkpoint_folder(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", ONE)
    for path, words in (
        (tmp_path / "nothing", "does not exist"),
        (hf / "config.json", "is a file"),
        (tmp_path / "mm" / "release", f"give the folder above it, {tmp_path / 'mm'}"),
    ):
        assert main(["inspect", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_torch_stays_out(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", ONE)
    for path in (hf, tmp_path / "mm"):
        code, _, heavy = child(["inspect", str(path)])
        assert (code, heavy) == (0, [])
