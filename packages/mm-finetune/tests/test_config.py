from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mm_finetune import ConfigError, load_config
from mm_finetune.cli import main
from mm_finetune.selection import common_rate, rates_of, trainable_table

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


def test_a_real_run_fits_into_fifteen_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(
        """
model: {hf_dir: Qwen2.5-VL-7B-Instruct, load: mm}
data: {path: data/train.json, seq_length: 4096, packing: true, pixel_cap: 262144, max_samples: 1000}
train:
  epochs: 2
  global_batch_size: 32
  lr: 1e-5
  dtype: bf16
  freeze: ["visual.blocks.*", "visual.patch_embed.*"]
  lr_scale: {"visual.merger.*": 0.1}
lora: {r: 16, alpha: 32}
parallel: {tp_size: 1, pp_size: 2}
output: {dir: run, save_every: 500, keep_last: 3, trackers: [tensorboard], peak_tflops: 300}
"""
    )
    config = load_config(path)
    assert config.train.lr_scale == {"visual.merger.*": 0.1}
    assert config.train.freeze[1] == "visual.patch_embed.*"
    assert config.lora is not None
    assert (config.lora.r, config.lora.dropout, config.output.keep_last) == (16, 0.0, 3)


def test_overrides_of_any_depth(good: Path) -> None:
    config = load_config(
        good,
        [
            "lora.r=4", "lora.target_modules=[q_proj]", "train.freeze=['visual.*']",
            "train.lr_scale.visual.merger.*=0.1", "train.lr_scale.lm_head.weight=1e-2", "parallel={pp_size: 4}",
        ],
    )  # fmt: skip
    assert config.lora is not None
    assert (config.lora.r, config.lora.target_modules) == (4, ("q_proj",))
    assert config.train.lr_scale == {"visual.merger.*": 0.1, "lm_head.weight": 0.01}
    assert (config.parallel.tp_size, config.parallel.pp_size) == (1, 4), "the whole section was replaced"
    assert load_config(good, ["lora.r=4", "lora=null"]).lora is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.rank=3"], "unknown key lora.rank; known: r, alpha"),
        (["lora.alpah=3"], "did you mean lora.alpha?"),
        (["lora=3"], "write section.key=value"),
        (["lora.r=0"], "lora.r is 0; it must be 1 or more"),
        (["train.dtype=bf17"], "train.dtype is 'bf17'; it must be fp32 or bf16; did you mean bf16?"),
        (["train.freeze=visual.*"], "train.freeze is 'visual.*'; it must be a list, each a text"),
        (["train.lr_scale=3"], "train.lr_scale is 3; it must be a mapping, each value a number"),
        (["train.lr_scale.visual.*=-1"], "train.lr_scale is {'visual.*': -1.0}; factors must be 0 or more"),
        (["train.lr_scale.visual.*=fast"], "it must be a mapping, each value a number"),
        (["output.trackers=[wand]"], "output.trackers is ['wand']; it must be a list, each tensorboard or wandb"),
        (["train.lr.peak=3"], "can't be set: lr is '1e-3', not a section"),
        (["train.epochs=1"], "train.steps and train.epochs are both given; keep one"),
        (["train.steps=0", "train.epochs=0"], "train.epochs is 0.0; it must be above 0"),
        (["train.spike_factor=0.5"], "train.spike_factor is 0.5; it must be above 1"),
        (["output.peak_tflops=0"], "output.peak_tflops is 0.0; it must be above 0"),
        (["train.on_nan=ignore"], "it must be stop or skip"),
    ],
)
def test_faults_of_newer_keys(overrides: list[str], words: str, good: Path) -> None:
    with pytest.raises(ConfigError) as fault:
        load_config(good, overrides)
    assert words in str(fault.value)


@pytest.mark.parametrize(("epochs", "records", "steps"), [(1, 80, 10), (1, 81, 11), (2.5, 80, 25), (0.1, 8, 1)])
def test_epochs_become_whole_steps(epochs: float, records: int, steps: int, good: Path) -> None:
    config = load_config(good, ["train.steps=0", f"train.epochs={epochs}"])
    resolved = config.resolved(records)
    assert (resolved.train.steps, resolved.train.epochs) == (steps, None), "8 records a step"
    assert load_config(good).resolved(records).train.steps == 4


def test_the_names_of_the_walk_through_mean_what_they_mean(good: Path, tmp_path: Path) -> None:
    text = good.read_text().replace("lr: 1e-3", "lr: 1e-3, save_interval: 5000, no_load_optim: true, log_tps: true")
    good.write_text(text.replace("output: {dir: run}", "output: {dir: run, no_save_rng: true, max_samples: 7}"))
    config = load_config(good, ["train.save_interval=6000"])
    assert (config.output.save_every, config.output.no_load_optim, config.output.log_tps) == (6000, True, True)
    assert (config.output.no_save_rng, config.data.max_samples) == (True, 7)
    good.write_text(GOOD.replace("dir: run", "dir: run, save_every: 3, save_interval: 5"))
    with pytest.raises(ConfigError, match=r"output.save_interval and output.save_every are one setting, given twice"):
        load_config(good)


def test_the_resolved_configuration_is_printed_and_reads_back(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--no-load-optim", "--no-save-rng", "--save-interval", "5000", "--log-tps", "--max-samples", "3"]
    assert main(["train", str(good), *flags, "train.lr_scale.visual.*=0.5", "--print_config"]) == 0
    printed = good.parent / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = load_config(printed)
    assert (config.output.save_every, config.output.no_load_optim, config.output.no_save_rng) == (5000, True, True)
    assert (config.output.log_tps, config.data.max_samples, config.train.lr_scale) == (True, 3, {"visual.*": 0.5})
    assert "warmup_fraction: 0.1" in printed.read_text(), "defaults too"
    with pytest.raises(SystemExit):
        main(["train", str(good), "--save-intervall", "3"])
    assert "unrecognized arguments: --save-intervall" in capsys.readouterr().err


def test_a_saved_configuration_moves_with_its_folder(good: Path) -> None:
    config = load_config(good)
    (good.parent / "run").mkdir()
    (good.parent / "run/config.yaml").write_text(config.as_yaml(good.parent / "run"))
    assert str(good.parent) not in (good.parent / "run/config.yaml").read_text()
    moved = good.parent / "elsewhere/run"
    moved.parent.mkdir()
    (good.parent / "run").rename(moved)
    again = load_config(moved / "config.yaml")
    assert again.model.hf_dir.resolve() == good.parent / "elsewhere/hf"
    assert again.output.dir.resolve() == moved
    assert again.train == config.train


def test_looking_at_the_configuration_needs_nothing_heavy(good: Path) -> None:
    script = (
        "import sys; from mm_finetune.cli import main; main(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'transformers', 'megatron'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script, "train", str(good), "--print_config"]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode == 0


# Which weights train.

NAMES = [
    "visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.blocks.1.attn.qkv.weight",
    "visual.merger.mlp.0.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight",
]  # fmt: skip


def test_patterns_freeze_and_scale() -> None:
    rates = rates_of(
        NAMES, freeze=["visual.blocks.*", "*.embed_tokens.*"], lr_scale={"visual.*": 0.1, "visual.merger.*": 0.5}
    )
    assert list(rates.values()) == [0.1, 0, 0, 0.5, 0, 1, 1, 1, 1]
    assert set(rates_of(NAMES, freeze=[], lr_scale={}).values()) == {1.0}


@pytest.mark.parametrize(
    ("freeze", "lr_scale", "words"),
    [
        (["visul.*"], {}, r"train.freeze: pattern 'visul.\*' matches no weight; did you mean visual"),
        ([], {"zzzz": 1.0}, r"train.lr_scale: pattern 'zzzz' matches no weight; there are visual.patch_embed.\*"),
        (["*"], {}, "nothing is left to train"),
        (["visual.*"], {"model.*": 0.0, "lm_head.*": 0.0}, "nothing is left to train"),
    ],
)
def test_patterns_that_do_nothing_are_errors(freeze: list[str], lr_scale: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rates_of(NAMES, freeze=freeze, lr_scale=lr_scale)


def test_parts_of_one_weight_go_together() -> None:
    q, k = NAMES[5:7]
    rates = rates_of(NAMES, freeze=["*.q_proj.*"], lr_scale={})
    with pytest.raises(ConfigError, match=r"linear_qkv is one weight here.*q_proj.weight: 0, .*k_proj.weight: 1"):
        common_rate("linear_qkv", [q, k], rates)
    assert common_rate("linear_qkv", [q, k], rates_of(NAMES, freeze=["*.self_attn.*"], lr_scale={})) == 0


def test_the_table_says_what_trains() -> None:
    sizes = {name: 100 * (place + 1) for place, name in enumerate(NAMES)}
    lines = trainable_table(
        sizes, rates_of(NAMES, freeze=["visual.blocks.*"], lr_scale={"lm_head.*": 0.5})
    ).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["visual.blocks"] == ["500", "frozen"]
    assert rows["model.layers"] == ["1,300", "trained"]
    assert rows["lm_head"] == ["900", "trained,", "lr", "x", "0.5"]
    assert rows["all"] == ["4,500", "4,000", "trained", "(88.9%)"]
