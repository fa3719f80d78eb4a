"""The command line itself: menus, help, options from files and from the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_bad_input import hf_to_mm
from test_streaming import child
from tiny_checkpoint import MakeModel

from mm_convert import CONVERTERS, MegatronFolder
from mm_convert.cli import main
from mm_convert.commands import published, reports


def said(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def test_menus_list_everything(capsys: pytest.CaptureFixture[str]) -> None:
    everything = said(["--help"], 0, capsys)
    for name in ("plan", *reports.COMMANDS, *CONVERTERS):
        assert f"\n    {name}" in everything
    for words in (["Qwen2_5_VLConverter"], ["plan", "Qwen2_5_VLConverter"]):
        menu = said([*words, "--help"], 0, capsys)
        assert all(f"\n    {command} " in menu for command in published.COMMANDS)
    assert "hf_to_mm" not in said(["plan", "--help"], 0, capsys)


def test_every_published_option_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    lists = ("llm_pp_layers", "vit_pp_layers", "tp_size")
    options = {
        "hf_to_mm": ["mm_dir", "hf_config.hf_dir", *(f"parallel_config.{x}" for x in lists)],
        "mm_to_hf": ["save_hf_dir", "mm_dir", "hf_config.hf_dir", *(f"parallel_config.{x}" for x in lists)],
        "resplit": ["source_dir", "target_dir", "hf_config.hf_dir",
                    *(f"{side}_parallel_config.{x}" for side in ("source", "target") for x in lists)],
    }  # fmt: skip
    for command, keys in options.items():
        text = said(["Qwen2_5_VLConverter", command, "--help"], 0, capsys)
        for key in [*(f"cfg.{key}" for key in keys), "overwrite", "resume", "workers", "plan", "json", "config"]:
            assert f"--{key} " in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "COMMAND"),
        (["Qwen"], "Qwen2_5_VLConverter"),
        (["plan"], "COMMAND"),
        (["plan", "inspect"], "Qwen2_5_VLConverter"),
        (["Qwen2_5_VLConverter", "hf2mm"], "resplit"),
        (["verify", "a"], "required: b"),
        (["Qwen2_5_VLConverter", "resplit", "--cfg.source_dir", "a"], "target_dir"),
    ],
)
def test_words_that_are_none(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in said(words, 2, capsys)


def test_options_from_a_file_and_from_the_environment(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables are named as the published converter names them."""
    parallel = {"llm_pp_layers": [[2, 3]], "vit_pp_layers": [[3, 0]]}
    cfg = {"mm_dir": str(tmp_path / "mm"), "hf_config": {"hf_dir": str(make_model())}, "parallel_config": parallel}
    (tmp_path / "options.yaml").write_text(json.dumps({"cfg": cfg}))
    line = ["Qwen2_5_VLConverter", "hf_to_mm", "--config", str(tmp_path / "options.yaml")]
    assert main(line) == 0
    assert main([*line, "--cfg.mm_dir", str(tmp_path / "two")]) == 0
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    name = "MM_CONVERT_QWEN2_5_VLCONVERTER__HF_TO_MM__CFG__PARALLEL_CONFIG__TP_SIZE"
    monkeypatch.setenv(name, "2")
    monkeypatch.setenv(name.replace("PARALLEL_CONFIG__TP_SIZE", "MM_DIR"), str(tmp_path / "env"))
    monkeypatch.setenv(name.replace("PARALLEL_CONFIG__TP_SIZE", "HF_CONFIG__HF_DIR"), str(tmp_path / "hf"))
    monkeypatch.setenv(name.replace("TP_SIZE", "LLM_PP_LAYERS"), "[[5]]")
    monkeypatch.setenv(name.replace("TP_SIZE", "VIT_PP_LAYERS"), "[[3]]")
    assert main(["Qwen2_5_VLConverter", "hf_to_mm"]) == 0
    assert MegatronFolder.open(tmp_path / "env").layout.tp_size == 2


def test_a_text_model_needs_no_vision_list_and_a_vision_model_does(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = hf_to_mm(make_model(), tmp_path / "mm")
    at = line.index("--cfg.parallel_config.vit_pp_layers")
    assert main([*line[:at], *line[at + 2 :]]) == 2
    assert "vit_pp_layers [[0,0]] sum to 0, but the model has 3 vit layers" in capsys.readouterr().err


def test_only_what_was_typed_is_built() -> None:
    for words in ([], ["verify"]):
        code, _, heavy = child([*words, "--help"])
        assert (code, heavy) == (0, [])
