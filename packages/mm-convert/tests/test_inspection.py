"""What a folder is: said from names and headers; what can't be known is said to be unknown."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from in_memory_plans import recorded
from lora_folders import LANGUAGE, adapter, save_adapter
from recorded_models import Recorded
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
        ("adapter_config.json", "a PEFT adapter; lora_hf_to_mm and merge_lora_to_base read it"),
        ("release/mp_rank_00/model_optim_rng.pt", "no latest_checkpointed_iteration.txt: an interrupted run?"),
    ],
)
def test_other_folders_are_named(name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, name)
    assert main(["inspect", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("command", "kind"), [("hf_to_dcp", "dcp"), ("hf_to_torch_dist", "torch_dist")])
def test_distributed_checkpoints(
    command: str, kind: str, make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, target = str(make_model()), str(tmp_path / "out")
    dcp = ["--hf_dir", hf, "--dcp_dir", target]
    line = dcp if kind == "dcp" else ["--cfg.hf_config.hf_dir", hf, "--cfg.dist_dir", target]
    assert main(["Qwen2_5_VLConverter", command, *line]) == 0
    for path in (tmp_path / "out", tmp_path / "out" / "release"):
        found = inspect(path)
        assert (found.kind, found.iteration, found.tied, list(found.dtypes)) == (kind, "release", None, ["F32"])
        assert found.nbytes == sum(t.nbytes for t in tensors().values())
    assert main(["inspect", target]) == 0
    assert "distributed checkpoint" in capsys.readouterr().out
    for both in ([target, hf], [hf, target]):
        assert main(["verify", *both]) == 2
        assert "is a distributed checkpoint; verify and diff compare" in capsys.readouterr().err


def test_an_adapter_beside_its_models_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_adapter(tmp_path / "adapter", adapter(LANGUAGE))
    assert (folder / "config.json").is_file()
    for command in (["inspect"], ["auto", "--pp", "2"], ["verify", str(folder)]):
        assert main([*command, str(folder)]) == 2
        assert "is a PEFT adapter, without the weights of its model" in capsys.readouterr().err


def test_a_model_without_words_has_no_output_layer_to_tie(tmp_path: Path) -> None:
    wan = recorded("wan_t2v")
    hf = Recorded(wan["config"], wan["saved"], wan["saved"]).write(tmp_path / "hf")
    Converter.named("WanConverter").hf_to_mm(hf, tmp_path / "mm", None)
    for path in (hf, tmp_path / "mm"):
        found = inspect(path)
        assert (found.converters, found.tied) == (("WanConverter",), None)
        assert "no embedding of words" in found.tied_reason
    assert inspect(hf).model_type == wan["config"]["_class_name"]


def test_ranks_of_experts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = Recorded.named("qwen3_moe").write(tmp_path / "hf")
    Converter.named("Qwen3Converter").hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((5,),), ep_size=2))
    assert main(["inspect", str(tmp_path / "mm")]) == 0
    assert "tp 1, pp 1, vpp 1, ep 2" in capsys.readouterr().out


def test_a_pipeline_rank_alone(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single pipeline rank's folder has no number of a pipeline rank in its name."""
    hf = make_model()
    QWEN.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),)))
    rmtree(tmp_path / "mm" / "release" / "mp_rank_00_001")
    for command in (["inspect"], ["verify", str(hf)], ["diff", str(hf)]):
        assert main([*command, str(tmp_path / "mm")]) == 2
        err = capsys.readouterr().err
        assert "is incomplete: mp_rank_00_000 is the name of one of several" in err


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
