from __future__ import annotations

from pathlib import Path

import pytest

from mm_finetune import ConfigError, load_config

GOOD = """
model: {hf_dir: hf, load: mm}
data: {path: data/train.json}
train: {steps: 4, global_batch_size: 8, micro_batch_size: 2, lr: 1e-3}
parallel: {tp_size: 1, pp_size: 2}
output: {dir: run}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(GOOD)
    return path


def test_paths_are_relative_to_the_file_and_1e_3_is_a_number(good: Path) -> None:
    config = load_config(good)
    assert config.model.hf_dir == good.parent / "hf"
    assert config.train.lr == 0.001
    assert config.data.dataset_dir is None
    assert config.as_dict()["output"]["dir"] == str(good.parent / "run")


def test_overrides_come_last(good: Path) -> None:
    config = load_config(good, ["train.steps=9", "parallel.pp_size=1", "data.max_samples=3", "output.overwrite=true"])
    assert (config.train.steps, config.parallel.pp_size, config.data.max_samples) == (9, 1, 3)
    assert config.output.overwrite is True


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", "unknown key train.stpes; did you mean train.steps?"),
        ("trian.steps=3", "unknown key trian; did you mean train?"),
        ("train.zzz=3", "unknown key train.zzz; known: steps, "),
        ("train.steps=0", "train.steps is 0; it must be 1 or more"),
        ("train.steps=many", "train.steps is 'many'; it must be a whole number"),
        ("train.steps=true", "train.steps is True; it must be a whole number"),
        ("train.lr=fast", "train.lr is 'fast'; it must be a number"),
        ("train.lr=0", "train.lr is 0.0; it must be above 0"),
        ("train.lr=.nan", "train.lr is nan"),
        ("train.min_lr=1", "train.min_lr is 1.0; it must lie between 0 and train.lr"),
        ("train.warmup_fraction=2", "train.warmup_fraction is 2.0"),
        ("train.clip_grad=-1", "must be 0 or more"),
        ("output.overwrite=1", "output.overwrite is 1; it must be true or false"),
        ("model.hf_dir=3", "model.hf_dir is 3; it must be a path"),
        ("steps", "write section.key=value"),
        ("model=x", "write section.key=value"),
    ],
)
def test_faults_say_what_is_legal(override: str, words: str, good: Path) -> None:
    with pytest.raises(ConfigError) as fault:
        load_config(good, [override])
    assert words in str(fault.value)


def test_all_faults_at_once(good: Path) -> None:
    good.write_text("model: {hf_dir: hf, lod: mm}\ntrain: 3\n")
    with pytest.raises(ConfigError) as fault:
        load_config(good)
    for words in ("model.lod; did you mean model.load?", "missing key model.load", "missing key data", "train is 3"):
        assert words in str(fault.value)


@pytest.mark.parametrize(
    ("text", "words"), [("- 1\n", "must hold sections"), ("a: [\n", "not valid YAML"), (None, "can't be read")]
)
def test_files_that_are_none(text: str | None, words: str, good: Path) -> None:
    good.unlink() if text is None else good.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(good)


def test_processes_must_fit_the_parallel_sizes(good: Path) -> None:
    config = load_config(good)
    assert config.data_parallel_size(4) == 2
    with pytest.raises(ConfigError, match=r"3 process\(es\).*multiple of 2.*--nproc_per_node=2"):
        config.data_parallel_size(3)
    with pytest.raises(
        ConfigError, match="global_batch_size 8 is not a multiple of micro_batch_size 2 x data-parallel size 3"
    ):
        config.data_parallel_size(6)
