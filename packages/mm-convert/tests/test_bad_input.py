"""Each fault: one message with names in it, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import MakeModel

from mm_convert import Converter
from mm_convert.cli import main

CONVERTER = "Qwen2_5_VLConverter"


def hf_to_mm(hf: Path, mm: Path, llm: str = "[[2,3]]", vit: str = "[[3,0]]", tp: int = 1, *more: str) -> list[str]:
    return [
        CONVERTER, "hf_to_mm", "--cfg.mm_dir", str(mm), "--cfg.hf_config.hf_dir", str(hf),
        "--cfg.parallel_config.llm_pp_layers", llm, "--cfg.parallel_config.vit_pp_layers", vit,
        "--cfg.parallel_config.tp_size", str(tp), *more,
    ]  # fmt: skip


def mm_to_hf(mm: Path, hf: Path, save: Path, *more: str) -> list[str]:
    return [CONVERTER, "mm_to_hf", "--cfg.save_hf_dir", str(save), "--cfg.mm_dir", str(mm),
            "--cfg.hf_config.hf_dir", str(hf), *more]  # fmt: skip


def refused(arguments: list[str], target: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    before = sorted(target.parent.iterdir())
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("mm-convert: error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert sorted(target.parent.iterdir()) == before


def test_the_walk_through_lines_work(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, mm, back = make_model(), tmp_path / "mm", tmp_path / "back"
    assert main(hf_to_mm(hf, mm)) == 0
    flat = ["--cfg.parallel_config.llm_pp_layers", "[2,3]", "--cfg.parallel_config.vit_pp_layers", "[3,0]"]
    assert main(mm_to_hf(mm, hf, back, *flat, "--cfg.parallel_config.tp_size", "1")) == 0
    assert "every source byte used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("llm", "vit", "tp", "words"),
    [
        ("[[2,2]]", "[[3,0]]", 1, ["sum to 4", "5 llm layers", "[[2,3]] would fit"]),
        ("[[2,3]]", "[[2,0]]", 1, ["sum to 2", "3 vit layers"]),
        ("[[2,3]]", "[[3,0]]", 8, ["tp_size 8", "num_key_value_heads, 4", "cannot be split", "[1, 2, 4]"]),
        ("[[2,3]]", "[[3,0]]", 3, ["tp_size 3", "num_key_value_heads, 4"]),
        ("[[1,1],[1,2]]", "[[3,0]]", 1, ["different shapes"]),
        ("[[2,3],[1]]", "[[3,0]]", 1, ["one row for each virtual stage"]),
    ],
)
def test_layouts(llm: str, vit: str, tp: int, words: list[str], make_model: MakeModel, tmp_path: Path,
                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    refused(hf_to_mm(make_model(), tmp_path / "mm", llm, vit, tp), tmp_path / "mm", capsys, *words)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        config = json.loads((hf / "config.json").read_text()) | changes
        (hf / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def edit_shard(change: Callable[[dict[str, torch.Tensor]], object], number: int = 1) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        path = hf / f"model-{number:05d}-of-00002.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)
        index = hf / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        kept = {n: f for n, f in weight_map.items() if f != path.name} | dict.fromkeys(held, path.name)
        index.write_text(json.dumps({"weight_map": kept}))

    return edit


NORM = "model.layers.0.input_layernorm.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda hf: (hf / "config.json").unlink(), ["no Hugging Face folder", "config.json"]),
        (lambda hf: (hf / "config.json").write_text("{"), ["config.json is not valid JSON"]),
        (lambda hf: (hf / "config.json").write_text("[]"), ["holds list, not an object"]),
        (edit_config(model_type="llama"), ["model_type 'llama'", "qwen2_5_vl"]),
        (edit_config(num_key_value_heads=None), ["no 'num_key_value_heads'"]),
        (lambda hf: (hf / SHARD).unlink(), [SHARD, "is missing"]),
        (lambda hf: (hf / SHARD).write_bytes((hf / SHARD).read_bytes()[:-5]), [SHARD, "truncated"]),
        (lambda hf: (hf / SHARD).write_bytes(b"\x10"), ["not a safetensors file"]),
        (lambda hf: (hf / SHARD).write_bytes(b"\x04" + 7 * b"\0" + b"{}x}"), ["no valid safetensors header"]),
        (lambda hf: (hf / INDEX).write_text('{"weight_map": {"a": "' + SHARD + '"}}'), ["disagree about"]),
        (lambda hf: (hf / INDEX).write_text('{"weight_map": {"a": "../x"}}'), ["is missing"]),
        (lambda hf: (hf / INDEX).unlink(), ["there is no model.safetensors.index.json"]),
        (edit_shard(lambda t: t.pop(NORM)), ["missing 1", NORM]),
        (edit_shard(lambda t: t.update(surprise=torch.ones(1))), ["unknown 1", "surprise"]),
        (edit_shard(lambda t: t.update({"model.language_model.norm.weight": torch.ones(16)})), ["stands twice"]),
        (edit_shard(lambda t: t.update({KEY: t[KEY].half()})), ["dtypes", "F16", "k_proj"]),
        (edit_shard(lambda t: t.update({KEY: torch.ones(8, 17)})), ["have shapes", "[8, 17]", "k_proj"]),
        (edit_shard(lambda t: t.update({KEY: torch.ones(9, 16)})), ["k_proj.weight of shape [9, 16]: only 8 of 9"]),
    ],
)  # fmt: skip
def test_sources(damage: Callable[[Path], object], words: list[str], make_model: MakeModel, tmp_path: Path,
                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    hf = make_model()
    damage(hf)
    refused(hf_to_mm(hf, tmp_path / "mm"), tmp_path / "mm", capsys, *words)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("must-not-appear",)


def edit_rank(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(mm: Path) -> None:
        path = mm / "release/mp_rank_00_000/model_optim_rng.pt"
        content = torch.load(path, weights_only=True)
        change(content["model"])
        torch.save(content, path)

    return edit


RANK0 = "release/mp_rank_00_000/model_optim_rng.pt"
FC2 = "text_decoder.decoder.layers.0.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda mm: (mm / "latest_checkpointed_iteration.txt").unlink(), ["no Megatron checkpoint"]),
        (lambda mm: (mm / "latest_checkpointed_iteration.txt").write_text("12"), ["says '12'"]),
        (lambda mm: (mm / "latest_checkpointed_iteration.txt").write_text("soon"), ["says 'soon'"]),
        (lambda mm: (mm / "release/mp_rank_00_000").rename(mm / "release/mp_rank_00_002"), ["incomplete", "(0, 0)"]),
        (lambda mm: (mm / RANK0).unlink(), ["incomplete", "model_optim_rng.pt", "(0, 0)"]),
        (lambda mm: (mm / "release/mp_rank_00_000").rename(mm / "release/mp_rank_x"), ["mp_rank_TT"]),
        (lambda mm: (mm / RANK0).write_bytes((mm / RANK0).read_bytes()[:99]), ["can't be read"]),
        (lambda mm: torch.save({"weights": {}}, mm / RANK0), ["no entry 'model'"]),
        (lambda mm: (mm / RANK0).write_bytes(pickle.dumps(Hostile())), ["can't be read"]),
        (edit_rank(lambda t: t.pop(FC2)), ["missing 1", FC2]),
        (edit_rank(lambda t: t.update(surprise=torch.ones(1))), ["unknown 1", "surprise"]),
        (edit_rank(lambda t: t.update({FC2: torch.ones(3, 3)})), ["wrong shape", FC2, "[3, 3]", "[16, 24]"]),
    ],
)
def test_megatron_folders(damage: Callable[[Path], object], words: list[str], make_model: MakeModel, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    hf, mm = make_model(), tmp_path / "mm"
    assert main(hf_to_mm(hf, mm)) == 0
    damage(mm)
    monkeypatch.chdir(tmp_path)
    refused(mm_to_hf(mm, hf, tmp_path / "back"), tmp_path / "back", capsys, *words)
    assert not (tmp_path / "must-not-appear").exists()


def test_lists_that_disagree_with_the_disk(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm = make_model(), tmp_path / "mm"
    assert main(hf_to_mm(hf, mm)) == 0
    wrong = ["--cfg.parallel_config.llm_pp_layers", "[3,2]", "--cfg.parallel_config.vit_pp_layers", "[3,0]"]
    refused(
        mm_to_hf(mm, hf, tmp_path / "back", *wrong),
        tmp_path / "back",
        capsys,
        "given: llm_pp_layers [[3,2]]",
        "holds: llm_pp_layers [[2,3]]",
    )


def test_a_checkpoint_of_other_layers_is_named(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm, back = make_model(), tmp_path / "mm", tmp_path / "back"
    assert main(hf_to_mm(hf, mm)) == 0
    config = json.loads((hf / "config.json").read_text()) | {"num_hidden_layers": 6}
    (hf / "config.json").write_text(json.dumps(config))
    refused(mm_to_hf(mm, hf, back), back, capsys, "holds 5 llm, 3 vit layers", "the model has 6 llm, 3 vit")


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(hf_to_mm(tmp_path / "no", tmp_path / "mm"), tmp_path / "mm", capsys, f"{tmp_path / 'no'} does not exist")


def test_an_existing_folder_is_kept_unless_told(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mm = make_model(), tmp_path / "mm"
    mm.mkdir()
    assert main(hf_to_mm(hf, mm)) == 0, "an empty folder is free"
    (mm / "mine").write_text("kept")
    refused(hf_to_mm(hf, mm), mm, capsys, str(mm), "--overwrite")
    assert (mm / "mine").read_text() == "kept"
    assert main(hf_to_mm(hf, mm, "[[5]]", "[[3]]", 1, "--overwrite")) == 0
    assert sorted(p.name for p in mm.iterdir()) == ["latest_checkpointed_iteration.txt", "manifest.json", "release"]
    assert [p.name for p in (mm / "release").iterdir()] == ["mp_rank_00"], "no rank of the old layout stays"


def test_overwrite_replaces_checkpoints_only_and_never_a_source(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mine = make_model(), tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("kept")
    refused(hf_to_mm(hf, mine, "[[2,3]]", "[[3,0]]", 1, "--overwrite"), mine, capsys, "is no checkpoint")
    refused(hf_to_mm(hf, hf, "[[2,3]]", "[[3,0]]", 1, "--overwrite"), hf, capsys, "which is read, stands in it")
    refused(hf_to_mm(hf, hf / "mm"), hf / "mm", capsys, f"it would stand in {hf}", "hf-converted for example")
    (tmp_path / "link").symlink_to(hf)
    refused(hf_to_mm(hf, tmp_path / "link/a/mm"), hf / "mm", capsys, f"it would stand in {hf}")
    (mine / "config.json").write_text("{}")  # a project's, not a model's
    refused(hf_to_mm(hf, mine, "[[2,3]]", "[[3,0]]", 1, "--overwrite"), mine, capsys, "is no checkpoint")
    hf.rename(mine / "hf")
    (mine / "model.safetensors").touch()
    refused(hf_to_mm(mine / "hf", mine, "[[2,3]]", "[[3,0]]", 1, "--overwrite"), mine, capsys, "stands in it")
    assert (mine / "letter.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments",
    [[], ["NoConverter"], [CONVERTER], [CONVERTER, "hf_to_mm"], [CONVERTER, "hf_to_mm", "--cfg.mmdir", "x"]],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["prepare_hf_to_mm", "plan_hf_to_mm"])
def test_ctrl_c_before_copying_says_that_nothing_was_written(
    where: str,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Converter, where, interrupted)
    hf = make_model()
    for line in (hf_to_mm(hf, tmp_path / "mm"), ["plan", *hf_to_mm(hf, tmp_path / "mm")]):
        assert main(line) == 130
        assert capsys.readouterr().err == "mm-convert: interrupted; nothing was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_ctrl_c_leaves_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    """A real process, interrupted while it copies tensors a byte at a time."""
    hf = make_model()
    assert main(hf_to_mm(hf, tmp_path / "mm")) == 0
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whatever was inherited
        "from mm_convert import copying\n"
        "from mm_convert.cli import main\n"
        "def slow(*_):\n    os.write(1, b'writing\\n')\n    time.sleep(0.1)\n"
        "copying.read_all, copying.CHUNK = slow, 1\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 130
    assert message == "mm-convert: interrupted; nothing was written\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mm"]
