"""The options of the command: all of the official one's, with its defaults, and ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wan_infer.cli import build_parsers, main
from wan_infer.commands import generate
from wan_infer.tasks import TASKS

# Those of the official generate.py for what exists, with its defaults. Where it has none, it takes one from the task.
OFFICIAL: dict[str, Any] = {
    "task": None,  # t2v-14B with --ckpt_dir, which the official command demands
    "size": None,  # 1280*720 where it is offered
    "frame_num": None,
    "ckpt_dir": None,
    "offload_model": None,
    "t5_cpu": False,
    "save_file": None,
    "src_video": None,
    "src_mask": None,
    "src_ref_images": None,
    "prompt": None,
    "base_seed": -1,
    "image": None,
    "first_frame": None,
    "last_frame": None,
    "sample_solver": "unipc",
    "sample_steps": None,
    "sample_shift": None,
    "sample_guide_scale": 5.0,
}
# Of the Ascend port; its numbers are 12, 4 and 37 where none are given.
PORT: dict[str, Any] = {
    "use_attentioncache": False,
    "start_step": None,
    "attentioncache_interval": None,
    "end_step": None,
}
OURS: dict[str, Any] = {
    "cache": None,
    "ulysses_size": None,
    "ring_size": None,
    "cfg_size": None,
    "negative_prompt": None,
    "prompt_file": None,
    "fps": 16.0,
    "json": False,
    "device": None,
    "dtype": None,
    "sigma_grid": "official",
    "embedding_cache": None,
    "vae_tiling": False,
    "contact_sheet": False,
    "overwrite": False,
}


pytestmark = pytest.mark.usefixtures("folder")  # each test works in an empty one


def test_all_options_and_their_defaults() -> None:
    """A new option is a decision: it has to be entered here."""
    parser, _ = build_parsers()
    assert vars(parser.parse_args([])) == OFFICIAL | PORT | OURS
    spelled = {option for action in parser._actions for option in action.option_strings}
    assert spelled == {f"--{name}" for name in OFFICIAL | PORT | OURS} | {"-h", "--help"}
    assert all(action.help for action in parser._actions)


def test_options_of_convert() -> None:
    _, converter = build_parsers()
    assert vars(converter.parse_args(["a", "b", "--to", "original"])) == {
        "source": Path("a"),
        "target": Path("b"),
        "to": "original",
        "overwrite": False,
        "shard_size": 5.0,
        "json": False,
    }


@pytest.mark.parametrize("task", [name for name in TASKS if name != "t2v-mini"])
def test_effective_defaults_are_the_official_ones(task: str) -> None:
    options = build_parsers()[0].parse_args(["--task", task, "--ckpt_dir", "x"])
    settings = generate._settings(TASKS[task], options)
    assert settings["size"] == ((832, 480) if task in ("t2v-1.3B", "vace-1.3B") else (1280, 720))
    assert settings["frames"] == (1 if task == "t2i-14B" else 81)
    assert settings["steps"] == (40 if task == "i2v-14B" else 50)
    assert settings["shift"] == (16 if task.startswith(("flf2v", "vace")) else 5)
    assert (settings["guidance"], settings["solver"], settings["sigma_grid"]) == (5.0, "unipc", "official")


def test_choices_are_the_official_ones_and_ours() -> None:
    actions = {action.dest: action.choices for action in build_parsers()[0]._actions if action.choices}
    assert set(actions["task"] or ()) == {*TASKS}
    assert set(actions["sample_solver"] or ()) == {"unipc", "dpm++", "euler"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), ("true", True), ("T", True), ("y", True), ("1", True), ("No", False), ("0", False)],
)
def test_offload_model_reads_what_the_official_command_reads(text: str, value: bool) -> None:
    assert build_parsers()[0].parse_args(["--offload_model", text]).offload_model is value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "large"], "'large' is no size; write width*height, for example 832*480"),
        (["--offload_model", "maybe"], "'maybe' is neither true nor false"),
        (["--task", "t2v"], "invalid choice: 't2v'"),
        (["--sample_steps", "many"], "invalid int value: 'many'"),
        (["--ulysses_size", "two"], "invalid int value: 'two'"),
        (["convert", "a"], "required: target, --to"),
    ],
)
def test_usage_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["convert", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom wan_infer.cli import main\n"
        f"try:\n    main({argv})\nexcept SystemExit as ended:\n    assert ended.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'PIL', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: wan-infer" in done.stdout
