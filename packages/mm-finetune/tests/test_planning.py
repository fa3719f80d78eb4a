"""Plans against what torch really allocates, layouts against brute force."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
from layouts import ask

from mm_finetune.cli import main
from mm_finetune.config import TrainConfig, load_config
from mm_finetune.errors import ConfigError
from mm_finetune.planning.activations import KERNELS
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.layouts import RECOMPUTE, Candidate, balanced, candidates, chosen, fits
from mm_finetune.planning.load import Load
from mm_finetune.planning.memory import Layout, predict
from mm_finetune.planning.schedule import events
from mm_finetune.planning.weights import Training

# The published config.json of Qwen2.5-VL-7B-Instruct and Qwen2-VL-2B-Instruct: what decides on sizes.
SEVEN = {
    "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064, "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}  # fmt: skip
TWO = {
    "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_key_value_heads": 2, "num_hidden_layers": 28, "vocab_size": 151936, "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
YAML = """
model: {hf_dir: hf, load: mm}
data: {path: none.json, seq_length: 2048}
train: {steps: 4, global_batch_size: 64, dtype: bf16}
output: {dir: run}
"""
LOAD = Load(rows=1, length=2048, loss_tokens=2048, patches=4096, micro_batches=8)

CASES: list[dict[str, Any]] = [
    {"micro_batches": 1, "tp": 2, "saves": True},
    {"micro_batches": 1, "tp": 2, "sp": True, "recompute": "selective", "packed": False, "rows": 4, "length": 256},
    {"pp": 2, "llm": [[1, 1], [1, 1]], "micro_batches": 4, "dtype": "fp32", "tied": True},
    {"pp": 2, "llm": [[2, 2]], "micro_batches": 3, "recompute": "full", "family": "qwen2_vl"},
    {"micro_batches": 1, "tp": 2, "sp": True, "lora": ["o_proj", "gate_proj", "visual.blocks.*.qkv"], "dropout": 0.1},
    {"pp": 2, "llm": [[1, 3]], "micro_batches": 4},
    {"micro_batches": 2, "tp": 2, "sp": True, "length": 1536, "tied": True},
    {"micro_batches": 1, "tp": 2, "recompute": "full", "dist_opt": False},
    {"micro_batches": 1, "dtype": "fp32", "freeze": ["visual.*", "lm_head*"], "saves": True},
    {"micro_batches": 1, "middle": False, "family": "qwen2_vl", "saves": True},
    {"micro_batches": 2, "lora": ["q_proj", "v_proj", "down_proj"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each case with what each of two processes found."""
    found = ask("planning_worker.py", 2, tmp_path_factory.mktemp("planning"), CASES)
    return list(zip(CASES, found, strict=True))


@pytest.mark.long
def test_weights_and_gradients_are_counted_to_the_byte(measured: list[tuple[Any, Any]]) -> None:
    for case, ranks in measured:
        for rank in ranks:
            assert rank["planned"]["weights"] == rank["weights"], case
            assert rank["planned"]["gradients"] == rank["gradients"], case


@pytest.mark.long
def test_optimizer_state_is_counted_to_the_byte_but_for_padding(measured: list[tuple[Any, Any]]) -> None:
    """Of all data-parallel ranks together: two moments, and the float32 weights of a bfloat16 run."""
    for case, ranks in measured:
        sharded = case.get("tp", 1) * case.get("pp", 1) == 1 and case.get("dist_opt", True)
        bytes_each = 8 if case.get("dtype") == "fp32" else 12
        states = [rank["main"] + rank["moments"] for rank in ranks]
        if sharded:
            assert sum(states) == bytes_each * ranks[0]["trained"], case
        else:
            assert states == [bytes_each * rank["trained"] for rank in ranks], case
        for state, rank in zip(states, ranks, strict=True):
            # What a weight or a bucket is padded by has no state.
            assert state <= rank["planned"]["optimizer"] <= max(1.01 * state, state + 16384), case


@pytest.mark.long
def test_what_is_kept_and_the_fullest_moment_are_within_a_tenth(measured: list[tuple[Any, Any]]) -> None:
    for case, ranks in measured:
        for rank in ranks:
            planned = rank["planned"]
            most = max(planned["activations"] + planned["moment"], planned["step"])
            assert most == pytest.approx(rank["peak"], rel=0.1), (case, rank)
            if case.get("saves"):
                assert planned["activations"] == pytest.approx(rank["saved"], rel=0.1), (case, rank)


@pytest.mark.parametrize("content", [SEVEN, TWO], ids=["7B", "2B"])
def test_names_and_shapes_are_those_of_transformers(content: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(**content)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    theirs = {
        name.removeprefix("model.") if ".visual." in name else name.replace("model.language_model.", "model."): shape
        for name, shape in ((name, tuple(p.shape)) for name, p in model.named_parameters())
    }
    assert Architecture.of(content).shapes() == theirs
    nested = json.loads(config.to_json_string(use_diff=False))
    assert Architecture.of(nested) == Architecture.of(content), "the nested form that transformers 5 writes"


@pytest.mark.parametrize(("stages", "count"), [(1, 3), (2, 5), (4, 8), (4, 2)])
def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_ahead(stages: int, count: int) -> None:
    for stage in range(stages):
        assert most_under_way(stage, stages, 1, count) == min(stages - stage, count)


@pytest.mark.parametrize(("stages", "parts"), [(2, 2), (4, 2), (4, 4)])
def test_interleaved_stages_keep_what_their_warm_up_is_and_one_more(stages: int, parts: int) -> None:
    """arXiv 2104.04473, 2.2; the warm-up as in Megatron's get_pp_rank_microbatches."""
    count = 4 * stages
    for stage in range(stages):
        warm_up = 2 * (stages - stage - 1) + (parts - 1) * stages
        assert most_under_way(stage, stages, parts, count) == warm_up + 1
        ran = Counter(events(stage, stages, parts, count))
        assert ran == {(part, forwards): count for part in range(parts) for forwards in (True, False)}


def most_under_way(stage: int, stages: int, parts: int, count: int) -> int:
    held = [0] * parts
    most = 0
    for part, forwards in events(stage, stages, parts, count):
        held[part] += 1 if forwards else -1
        assert held[part] >= 0, "nothing goes backwards before it went forwards"
        most = max(most, sum(held))
    return most


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(SEVEN))
    (tmp_path / "train.yaml").write_text(YAML)
    return tmp_path


def candidates_of(config: TrainConfig, devices: int) -> list[Candidate]:
    architecture = Architecture.read(config.model.hf_dir)
    training = Training.of(config, architecture)
    return candidates(config, architecture, training, LOAD, KERNELS["npu"], devices)


def test_every_legal_layout_is_there_once(world: Path) -> None:
    """28 heads, 4 key-value heads, 28 layers; 64 samples are dealt to 1, 2, 4 or 8 ranks."""
    found = candidates_of(load_config(world / "train.yaml"), 8)
    expected = {
        (tp, pp, vpp, sp, recompute)
        for tp, pp, vpp, sp, recompute in product((1, 2, 4), (1, 2, 4, 8), (1, 2, 4), (False, True), RECOMPUTE)
        if tp * pp <= 8 and (vpp == 1 or pp > 1) and pp * vpp <= 28 and (tp > 1 or not sp)
    }
    seen = [
        (c.layout.tp_size, c.layout.pp_size, c.layout.vpp_size, c.layout.sequence_parallel, c.recompute) for c in found
    ]
    assert len(seen) == len(set(seen))
    assert set(seen) == expected
    for candidate in found:
        assert candidate.layout.devices == 8
        assert sum(map(sum, candidate.layout.llm_pp_layers)) == 28
        assert min(map(min, candidate.layout.llm_pp_layers)) >= 1


def test_a_batch_that_can_not_be_dealt_leaves_layouts_out(world: Path) -> None:
    config = load_config(world / "train.yaml", ["train.global_batch_size=6"])
    assert {candidate.layout.dp_size for candidate in candidates_of(config, 8)} == {1, 2}


@pytest.mark.parametrize("gib", [40, 64, 80, 140])
def test_the_cheapest_that_fits_is_chosen(gib: int, world: Path) -> None:
    found = candidates_of(load_config(world / "train.yaml"), 8)
    best = chosen(found, gib * 2**30)
    room = [candidate for candidate in found if candidate.largest <= 0.92 * gib * 2**30]
    assert best is not None
    assert best.added == pytest.approx(min(candidate.added for candidate in room), abs=1e-3)
    assert fits(best, gib * 2**30)


def test_with_room_enough_nothing_is_cut_and_nothing_computed_again(world: Path) -> None:
    best = chosen(candidates_of(load_config(world / "train.yaml"), 8), 10**13)
    assert best is not None
    assert (best.layout.tp_size, best.layout.pp_size, best.layout.dp_size, best.recompute) == (1, 1, 8, "none")


def test_layers_are_dealt_out_by_work() -> None:
    """The first stage has the tower as well, the last one the output layer; a frozen tower is a third of the work."""
    architecture = Architecture.of(SEVEN)
    rates = dict.fromkeys(architecture.shapes(), 1.0)
    full = Training(element=2, distributed=True, recompute="none", rates=rates)
    frozen = replace(full, rates=rates | {name: 0.0 for name in rates if name.startswith("visual.")})
    trained_tower, frozen_tower = (balanced(architecture, one, LOAD, 4, 1)[0] for one in (full, frozen))
    assert trained_tower[0] < frozen_tower[0] <= max(frozen_tower)
    assert trained_tower[-1] <= trained_tower[1]
    assert sum(trained_tower) == sum(frozen_tower) == 28


def test_what_each_means_saves(world: Path) -> None:
    """Each of them takes memory away from the fullest device; a second data-parallel rank, optimizer state alone."""
    architecture = Architecture.of(SEVEN)
    training = Training.of(load_config(world / "train.yaml"), architecture)
    usual = Layout(tp_size=2, sequence_parallel=False, llm_pp_layers=((28,),), dp_size=1)

    long = replace(LOAD, length=16384, loss_tokens=16384, patches=32768)

    def total(training: Training = training, layout: Layout = usual, **load: Any) -> float:
        (stage,) = predict(architecture, training, layout, replace(long, **load), KERNELS["npu"])
        return stage.total

    assert total(replace(training, recompute="full")) < total(replace(training, recompute="selective")) < total()
    assert total(layout=replace(usual, sequence_parallel=True)) < total()
    assert total(length=8192, loss_tokens=8192, patches=16384) < total()
    parameters = sum(prod(shape) for shape in architecture.shapes().values())
    tower = sum(prod(shape) for name, shape in architecture.shapes().items() if name.startswith("visual."))
    saved = total() - total(layout=replace(usual, dp_size=2))
    # Half of 12 bytes for each number of a rank: half of the decoder, all of the tower.
    assert saved == pytest.approx(6 * (tower + (parameters - tower) / 2), rel=0.01)


def test_the_plan_of_the_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(world / "train.yaml"), "parallel.tp_size=2", "--world_size", "8"]) == 0
    said = capsys.readouterr().out
    for words in (
        "qwen2_5_vl: 8,292,166,656 weights, all train", "assumed: 50% of the tokens stand for pictures",
        "configured: tp 2, pp 1, dp 4, recompute none", "chosen: tp ", "64.00 GiB less 8%", "too large",
    ):  # fmt: skip
        assert words in said
    assert main(["plan", str(world / "train.yaml"), "--json", "--device_memory", "1000", "--world_size", "8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"]["dp_size"] == 8
    assert told["configured"]["stages"][0]["weights"] == pytest.approx(2 * 8_292_166_656, rel=1e-3)
    assert main(["plan", str(world / "train.yaml"), "--device_memory", "5"]) == 0
    assert "nothing fits 5.00 GiB" in capsys.readouterr().out


def test_faults_of_the_command_are_one_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["parallel.tp_size=3", "--world_size", "4"], "needs a multiple of 3"),
        (["--picture_share", "2"], "must lie between 0 and 1"),
        (["--device_memory", "0"], "must be above 0"),
        (["train.freeze=[vizual.*]"], "did you mean visual"),
        (["model.hf_dir=nowhere"], "is model.hf_dir right?"),
    ):
        assert main(["plan", str(world / "train.yaml"), *arguments]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="trained here are qwen2_5_vl, qwen2_vl"):
        Architecture.of({"model_type": "llava"})


def test_the_command_needs_no_torch(world: Path) -> None:
    script = (
        "import sys; from mm_finetune.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'transformers', 'megatron')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", str(world / "train.yaml"), "--world_size", "16"],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
