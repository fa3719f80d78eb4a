"""The layouts that a plan lists and chooses against brute force, and the command that prints them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate, pairwise, product
from math import inf, prod
from pathlib import Path
from typing import Any

import pytest
from planned import LOAD, SEVEN, TWO, trained

from mm_finetune.cli import main
from mm_finetune.config import TrainConfig, load_config
from mm_finetune.errors import ConfigError
from mm_finetune.planning.activations import KERNELS
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.dealing import dealt, vision_tp_size, work
from mm_finetune.planning.layouts import RECOMPUTE, Candidate, candidates, chosen, fits
from mm_finetune.planning.memory import Layout, predict
from mm_finetune.planning.weights import Training

YAML = """
model: {hf_dir: hf, load: mm}
data: {path: none.json, seq_length: 2048}
train: {steps: 4, global_batch_size: 64, dtype: bf16}
output: {dir: run}
"""


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
    seen = {}
    for candidate in found:
        layout = candidate.layout
        (first, *others), llm = sum(layout.vit_pp_layers, ()), sum(layout.llm_pp_layers, ())
        spread = any(others) or 0 in llm
        kind = (layout.tp_size, layout.pp_size, layout.vpp_size, layout.sequence_parallel, candidate.recompute)
        assert (kind, spread) not in seen
        seen[kind, spread] = candidate.cost["uneven stages"]
        assert layout.devices == 8
        assert (sum(llm), first + sum(others)) == (28, 32)
        assert layout.tower_tp_size == layout.tp_size
    assert {kind for kind, spread in seen if not spread} == expected
    for kind, spread in seen:
        if spread:
            assert seen[kind, True] < seen[kind, False], "or it is there for nothing"


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
    full = trained(architecture)
    frozen = replace(full, rates={name: float(not name.startswith("visual.")) for name in full.rates})
    trained_tower, frozen_tower = (dealt(architecture, one, LOAD, 4, 1, 1)[0][0][0] for one in (full, frozen))
    assert trained_tower[0] < frozen_tower[0] <= max(frozen_tower)
    assert trained_tower[-1] <= trained_tower[1]
    assert sum(trained_tower) == sum(frozen_tower) == 28


@pytest.mark.parametrize(
    ("stages", "parts", "copies", "spreads"),
    [(2, 1, 1, False), (4, 1, 1, True), (4, 2, 1, True), (8, 1, 1, True), (2, 1, 4, True), (16, 1, 1, True)],
)
def test_a_tower_is_dealt_out_where_that_is_faster(stages: int, parts: int, copies: int, spreads: bool) -> None:
    """The slowest stage then works as short as in the best of all cuts of the layers in a row."""
    architecture = Architecture.of(SEVEN)
    load = replace(LOAD, length=1024, loss_tokens=1024)
    whole, *others = dealt(architecture, trained(architecture), load, stages, parts, copies)
    assert sum(whole[1], ()) == (32, *[0] * (stages * parts - 1))
    assert bool(others) == spreads
    done = work(architecture, trained(architecture), load, copies)
    row = [done.vision] * 32 + [done.layer] * 28
    row[0], row[31], row[-1] = row[0] + done.patches, row[31] + done.merger, row[-1] + done.output
    for llm, vit in others:
        flat = list(zip(sum(vit, ()), sum(llm, ()), strict=True))
        ends = [0, *accumulate(map(sum, flat))]
        assert ends[-1] == len(row)
        assert [kind for stage in flat for kind, count in enumerate(stage) for _ in range(count)] == [0] * 32 + [1] * 28
        loads = [sum(row[start:stop]) for start, stop in pairwise(ends)]
        assert min(loads) > 0, "a stage has nothing to do"
        assert max(loads) == pytest.approx(least_of_the_slowest(row, stages * parts))


def least_of_the_slowest(row: list[float], stages: int) -> float:
    """Over all ways to cut a row into stages, by what is best for its beginnings."""
    best = [0.0] + [inf] * len(row)
    for _ in range(stages):
        best = [inf] + [
            min(max(best[start], sum(row[start:stop])) for start in range(stop)) for stop in range(1, len(row) + 1)
        ]
    return best[-1]


@pytest.mark.parametrize(("sizes", "tp_size", "expected"), [(SEVEN, 4, 4), (SEVEN, 8, 1), (TWO, 8, 8)])
def test_a_tower_whose_sizes_can_not_be_divided_is_whole(sizes: dict[str, Any], tp_size: int, expected: int) -> None:
    """3420 inner units on eight ranks."""
    assert vision_tp_size(Architecture.of(sizes), tp_size) == expected


def test_what_each_means_saves(world: Path) -> None:
    """Each of them takes memory away from the fullest device; a second data-parallel rank, optimizer state alone."""
    architecture = Architecture.of(SEVEN)
    training = Training.of(load_config(world / "train.yaml"), architecture)
    usual = Layout(
        tp_size=2, sequence_parallel=False, llm_pp_layers=((28,),), vit_pp_layers=((32,),), dp_size=1
    )  # fmt: skip

    long = replace(LOAD, length=16384, loss_tokens=16384, patches=32768)

    def total(training: Training = training, layout: Layout = usual, **load: Any) -> float:
        (stage,) = predict(architecture, training, layout, replace(long, **load), KERNELS["npu"])
        return stage.total

    assert total(replace(training, recompute="full")) < total(replace(training, recompute="selective")) < total()
    assert total(layout=replace(usual, sequence_parallel=True)) < total()
    assert total(length=8192, loss_tokens=8192, patches=16384) < total()
    assert total() < total(layout=replace(usual, vit_tp_size=1))
    parameters = sum(prod(shape) for shape in architecture.shapes().values())
    saved = total() - total(layout=replace(usual, dp_size=2))
    # Half of 12 bytes for each number of a rank, which has half of the model.
    assert saved == pytest.approx(6 * parameters / 2, rel=0.01)


def test_the_plan_of_the_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(world / "train.yaml"), "parallel.tp_size=2", "--world_size", "8"]) == 0
    said = capsys.readouterr().out
    for words in (
        "qwen2_5_vl: 8,292,166,656 weights, all train", "assumed: 50% of the tokens stand for pictures",
        "configured: tp 2, pp 1, dp 4, recompute none", "chosen: tp ", "64.00 GiB less 8%", "too large",
        "for mm-convert: --cfg.parallel_config.llm_pp_layers [[",
    ):  # fmt: skip
        assert words in said
    assert main(["plan", str(world / "train.yaml"), "--json", "--device_memory", "1000", "--world_size", "8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["chosen"]["dp_size"], told["chosen"]["vit_pp_layers"]) == (8, [[32]])
    assert told["configured"]["stages"][0]["weights"] == pytest.approx(2 * 8_292_166_656, rel=1e-3)
    assert main(["plan", str(world / "train.yaml"), "--device_memory", "5"]) == 0
    assert "nothing fits 5.00 GiB" in capsys.readouterr().out


def test_faults_of_the_command_are_one_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["parallel.tp_size=3", "--world_size", "4"], "needs a multiple of 3"),
        (["--picture_share", "2"], "must lie between 0 and 1"),
        (["parallel.pp_size=32"], "too many for 28 layers"),
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
