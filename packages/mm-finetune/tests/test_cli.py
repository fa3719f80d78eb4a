"""What is typed wrongly is answered in one line that says what was meant; nothing heavy is needed for that."""

from __future__ import annotations

import errno
import os
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from mm_finetune import ConfigError, load_config
from mm_finetune.cli import COMMANDS, main
from mm_finetune.commands.train import notes
from mm_finetune.errors import OutputExistsError
from mm_finetune.launch import process_rank
from mm_finetune.output import require_free_folder, require_room

GOOD = """
model: {hf_dir: hf, load: mm}
data: {path: data/train.json}
train: {steps: 4, global_batch_size: 8, lr: 1e-3}
output: {dir: run}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tarin", "x.yaml"], "there is no command 'tarin'; did you mean train?"),
        (["zzz"], "there is no command 'zzz'; known: check, eval, export, "),
        ([], "the following arguments are required: COMMAND"),
        (["plan", "x.yaml", "--devise", "npu"], "unrecognized arguments: --devise; did you mean --device?"),
        (["export", "run", "--output", "x", "--hf-dir=hf"], "--hf-dir=hf; did you mean --hf_dir?"),
        (["export", "run", "--output", "x", "more"], "unrecognized arguments: more"),
        (["train", "x.yaml", "--zzz"], "unrecognized arguments: --zzz; known: --help, "),
        # A beginning of --save-interval, but --save is another flag of Megatron's.
        (["train", "x.yaml", "--save", "out"], "unrecognized arguments: --save"),
    ],
)
def test_words_that_are_none(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    if words and words[0] in COMMANDS:
        assert error.startswith(f"usage: mm-finetune {words[0]} "), "that of the command"


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"mm-finetune {version('mm-finetune')}\n"


def test_what_the_system_says_of_a_file_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", "/mnt/run")

    monkeypatch.setitem(COMMANDS, "mini", (SimpleNamespace(run=run, add_arguments=lambda parser: None), "text"))
    assert main(["mini"]) == 2
    assert capsys.readouterr().err == "mm-finetune: error: /mnt/run: Read-only file system\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # YAML takes the last one, and what was meant by the first is lost.
        ("train: {steps: 1, lr: 1.0e-5, lr: 2.0e-5}\n", "line 1, column 31: lr is there twice; keep one"),
        (f"{GOOD}train: {{steps: 5}}\n", "line 6, column 1: train is there twice; keep one"),
        ("model: {hf_dir: [\n", "line 2, column 1: expected the node content"),
        ("lora: !!python/object:os.system {}\n", "line 1, column 7: could not determine a constructor"),
        ("a: \x00", "is not valid YAML"),
    ],
)
def test_a_fault_of_the_file_has_a_place_and_is_one_line(text: str, said: str, good: Path) -> None:
    good.write_text(text)
    with pytest.raises(ConfigError) as fault:
        load_config(good)
    assert said in str(fault.value)
    assert str(good) in str(fault.value)
    assert "\n" not in str(fault.value)


def test_anchors_and_merges_are_yaml_as_ever(good: Path) -> None:
    text = GOOD.replace("train: {", "train: &base {") + "lora: {r: 4, target_modules: &t [q_proj]}\n"
    good.write_text(text + "preference: {<<: {beta: 0.3}, beta: 0.5}\n? [1, 2]\n: 3\n")
    with pytest.raises(ConfigError, match=r"line 8, column 3: found unhashable key"):
        load_config(good)
    good.write_text(text + "preference: {<<: {beta: 0.3}, beta: 0.5}\n")
    config = load_config(good)
    assert config.preference is not None
    assert config.preference.beta == 0.5


def test_overrides_that_are_none_are_told_together(good: Path) -> None:
    with pytest.raises(ConfigError) as fault:
        load_config(good, ["train.freeze=[a", "steps", "train.lr=fast"])
    for said in ("'train.freeze=[a' is not valid YAML: line 1", "'steps' is no override", "train.lr is 'fast'"):
        assert said in str(fault.value)


def test_preference_is_a_word_on_the_command_line_too(good: Path) -> None:
    good.write_text(GOOD + "preference: {loss: ipo, beta: 0.3}\n")
    config = load_config(good, ["preference=dpo"])
    assert config.preference is not None
    assert (config.preference.loss, config.preference.beta) == ("dpo", 0.3)
    assert load_config(good, ["preference=null"]).preference is None
    with pytest.raises(ConfigError, match=r"preference\.loss is .ppo.; it must be dpo or ipo or hinge"):
        load_config(good, ["preference=ppo"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=.inf", "train.lr is inf; it must be above 0, and a number such as 1.0e-5"),
        ("train.adam_beta1=1", "train.adam_beta1 is 1.0; it must lie between 0 and 1, and below 1"),
        ("train.adam_beta2=-0.5", "train.adam_beta2 is -0.5; it must lie between 0 and 1"),
        ("train.adam_eps=-1", "train.adam_eps is -1.0; it must be 0 or more"),
        ("parallel.vpp_size=0", "parallel.vpp_size is 0; it must be 1 or more"),
    ],
)
def test_numbers_that_cannot_be(override: str, said: str, good: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(good, [override])
    assert load_config(good, ["train.adam_beta1=0", "train.adam_beta2=0.999"]).train.adam_beta1 == 0


@pytest.mark.parametrize("size", [0, -2])
def test_a_plan_needs_a_device(size: int, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(good), "--world_size", str(size)]) == 2
    assert f"--world_size is {size}; it must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "records", "said"), [(1, 8, []), (5, 8, ["all 4 steps"]), (5, 3, ["all 4", "above the 3"])]
)
def test_what_is_no_fault_and_may_not_be_meant(first: int, records: int, said: list[str], good: Path) -> None:
    index = SimpleNamespace(usable=range(records))
    run = SimpleNamespace(config=load_config(good), first_step=first, dataset=SimpleNamespace(index=index))
    found = notes(run)  # type: ignore[arg-type]
    assert len(found) == len(said)
    for text, words in zip(found, said, strict=True):
        assert words in text


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "zero"}, "RANK is zero and WORLD_SIZE is 2; a launcher sets both"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": None, "RANK": "0"}, "RANK is set, WORLD_SIZE not; a launcher sets all of them"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "RANK is set, MASTER_ADDR and MASTER_PORT not"),
    ],
)
def test_a_launcher_that_is_none(change: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert process_rank() == (1, 2)
    for name, new in change.items():
        monkeypatch.delenv(name) if new is None else monkeypatch.setenv(name, new)
    with pytest.raises(ConfigError, match=said):
        process_rank()
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert process_rank() == (0, 1), "nobody started it"


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match=r"run can't be a folder, for .*file is a file; name another one"):
        require_room(tmp_path / "file/deep/run")
    require_room(tmp_path / "new/deep/run")
    assert not (tmp_path / "new").exists()
    # The superuser of a test may write everywhere, a file system that is read-only excepted.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"can't be written to, so .*run can't be there; name another folder"):
        require_free_folder(tmp_path / "run", overwrite=False, ours=lambda path: True)
