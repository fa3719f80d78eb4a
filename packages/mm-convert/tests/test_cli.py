"""The command line itself: menus, help, options from files and from the environment."""

from __future__ import annotations

import json
from importlib.metadata import version
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
    for name in ("plan", *reports.COMMANDS, *CONVERTERS, "GenericDCPConverter"):
        assert f"\n    {name}" in everything
    for words in (["Qwen2_5_VLConverter"], ["plan", "Qwen2_5_VLConverter"], ["WanConverter"], ["GenericDCPConverter"]):
        menu = said([*words, "--help"], 0, capsys)
        assert all(f"\n    {command}" in menu for command in published.commands(words[-1]))
    assert "hf_to_mm_ldt" not in said(["WanConverter", "--help"], 0, capsys)
    assert "hf_to_mm" not in said(["GenericDCPConverter", "--help"], 0, capsys)
    assert "hf_to_mm" not in said(["plan", "--help"], 0, capsys)


def test_every_published_option_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    lists = ("llm_pp_layers", "vit_pp_layers", "audio_pp_layers", "tp_size", "ep_size")
    own = [f"parallel_config.{x}" for x in ("vit_tp_size", "audio_tp_size")]
    structure = "common_model_config.enable_canonical_hf_struct"
    from_hf = [
        "mm_dir", "hf_config.hf_dir", *(f"parallel_config.{x}" for x in lists), *own, structure,
        "common_model_config.llm_hf_dir", "llm_hf_config.hf_dir", "save_vit_only", "trust_remote_code",
    ]  # fmt: skip
    options = {
        "hf_to_mm": from_hf,
        "hf_to_mm_ldt": from_hf,
        "mm_to_hf": ["save_hf_dir", "mm_dir", "hf_config.hf_dir", *(f"parallel_config.{x}" for x in lists),
                     structure, "trust_remote_code"],
        "resplit": ["source_dir", "target_dir", "hf_config.hf_dir", *(f"target_{x}" for x in own),
                    *(f"{side}_parallel_config.{x}" for side in ("source", "target") for x in lists)],
    }  # fmt: skip
    target = [f"target_parallel_config.{x}" for x in ("pp_layers", "tp_size", "ep_size")]
    generative = {
        "hf_to_mm": ["source_path", "target_path", *target],
        "mm_to_hf": ["source_path", "target_path", "hf_dir"],
        "resplit": ["source_path", "target_path", *target],
    }
    for converter, of in (("Qwen2_5_VLConverter", options), ("WanConverter", generative)):
        for command, keys in of.items():
            text = said([converter, command, "--help"], 0, capsys)
            for key in [*(f"cfg.{key}" for key in keys), *OURS, *OURS_OF.get(command, ())]:
                assert f"--{key} " in text or f"--{key}\n" in text, key


OURS = ("overwrite", "resume", "workers", "ram-cap", "fsync", "plan", "json", "config")
OURS_OF = {"hf_to_mm": ["allow-unused"], "mm_to_hf": ["allow-unused", "hf_naming"]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "COMMAND"),
        (["Qwen"], "Qwen2_5_VLConverter"),
        (["inspct", "a"], "did you mean inspect?"),
        (["Qwen25VLConverter", "hf_to_mm"], "did you mean Qwen2"),
        (["Qwen2_5_VLConverter", "mm2hf"], "did you mean mm_to_hf?"),
        (["Qwen2_5_VLConverter", "resplit", "--cfg.source_dri", "a"], "did you mean --cfg.source_dir?"),
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


def test_an_option_of_a_file_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.yaml").write_text('{"cfg": {"mm_dir": "a", "hf_config": {"hf_dri": "b"}}}')
    words = ["Qwen2_5_VLConverter", "hf_to_mm", "--config", str(tmp_path / "options.yaml")]
    assert "did you mean --cfg.hf_config.hf_dir?" in said(words, 2, capsys)


def test_every_published_key_is_understood(make_model: MakeModel, tmp_path: Path) -> None:
    """What the published tool's --print_config writes may come back as --config, with its defaults."""
    numbers = dict.fromkeys(("num_key_value_heads", "llm_num_layers", "vit_num_layers", "audio_num_layers"))
    structure = {
        "enable_canonical_hf_struct": False, "new_transformers_weight_key": False, "model_prefix": None,
        "llm_hf_dir": None, "num_experts": 0, "tie_word_embeddings": False, **numbers,
    }  # fmt: skip
    parallel = {
        "llm_pp_layers": [[2, 3]], "vit_pp_layers": [[3, 0]], "audio_pp_layers": None,
        "tp_size": 2, "vit_tp_size": 0, "audio_tp_size": 0, "ep_size": 1,
    }  # fmt: skip
    both = {
        "mm_dir": str(tmp_path / "mm"), "hf_config": {"hf_dir": str(make_model())}, "llm_hf_config": {"hf_dir": None},
        "parallel_config": parallel, "common_model_config": structure, "trust_remote_code": False,
    }  # fmt: skip
    for command, cfg in (
        ("hf_to_mm", both | {"save_vit_only": False}),
        ("mm_to_hf", both | {"save_hf_dir": str(tmp_path / "back")}),
    ):
        (tmp_path / "options.yaml").write_text(json.dumps({"cfg": cfg}))
        assert main(["Qwen2_5_VLConverter", command, "--config", str(tmp_path / "options.yaml")]) == 0
    sides = {f"{side}_parallel_config": parallel for side in ("source", "target")}
    cfg = {"source_dir": str(tmp_path / "mm"), "target_dir": str(tmp_path / "mm2"), **sides}
    (tmp_path / "options.yaml").write_text(json.dumps({"cfg": cfg}))
    assert main(["Qwen2_5_VLConverter", "resplit", "--config", str(tmp_path / "options.yaml")]) == 0


def test_a_vision_part_that_is_cut_otherwise_than_given(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_model()
    line = hf_to_mm(hf, tmp_path / "mm", "[[2,3]]", "[[3,0]]", 2, "--cfg.parallel_config.vit_tp_size", "1")
    assert main(line) == 0
    back = ["--cfg.mm_dir", str(tmp_path / "mm"), "--cfg.hf_config.hf_dir", str(hf)]
    for size, code in ((2, 2), (0, 2), (1, 0)):
        given = ["--cfg.save_hf_dir", str(tmp_path / "back"), "--cfg.parallel_config.vit_tp_size", str(size)]
        assert main(["Qwen2_5_VLConverter", "mm_to_hf", *back, *given]) == code
    assert capsys.readouterr().err.count("vit_tp_size 1") == 2, "what is on disk is said"


def test_a_text_model_needs_no_vision_list_and_a_vision_model_does(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = hf_to_mm(make_model(), tmp_path / "mm")
    at = line.index("--cfg.parallel_config.vit_pp_layers")
    assert main([*line[:at], *line[at + 2 :]]) == 2
    assert "vit_pp_layers [[0,0]] sum to 0, but the model has 3 vit layers" in capsys.readouterr().err


def test_the_memory_of_buffers(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = hf_to_mm(make_model(), tmp_path / "mm")
    assert "512MiB" in said([*line, "--ram-cap", "much"], 2, capsys)
    assert main([*line, "--ram-cap", "1000"]) == 2
    assert "--ram-cap 1000: too small" in capsys.readouterr().err
    assert main([*line, "--plan", "--json", "--ram-cap", "1000"]) == 2
    for number, size in enumerate(("64MiB", str(64 << 20))):
        at = line.index("--cfg.mm_dir") + 1
        named = [*line[:at], str(tmp_path / f"mm{number}"), *line[at + 1 :]]
        assert main([*named, "--ram-cap", size, "--fsync"]) == 0


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mm-convert {version('mm-convert')}\n"
    assert "--version" in said(["--help"], 0, capsys)


def test_an_ldt_layout_is_said_in_words(make_model: MakeModel, tmp_path: Path) -> None:
    line = hf_to_mm(make_model(), tmp_path / "mm")
    assert main([line[0], "hf_to_mm_ldt", *line[2:]]) == 0
    told = json.loads((tmp_path / "mm/manifest.json").read_text())["options"]["layout"]
    assert told.endswith("tp_size 1, embedding and output layer on pipeline rank 0 (LDT)")


def test_only_what_was_typed_is_built() -> None:
    for words in ([], ["verify"]):
        code, _, heavy = child([*words, "--help"])
        assert (code, heavy) == (0, [])
