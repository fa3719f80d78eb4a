"""Runs that were ended and go on: the same bits in the same layout, the same numbers in another, and every fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import differing, numbers, rows, tensors
from layouts import ask, first

from mm_convert import Converter, Layout
from mm_datafmt import convert
from mm_finetune.mini import make

SMALL = [
    "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=2", "data.max_samples=40",
    "output.save_every=2", "data.cache_dir=cache",
]  # fmt: skip
PACKED, BF16, WHOLE = (
    ["data.packing=true", "data.pack_length=256"],
    ["train.dtype=bf16"],
    ["train.distributed_optimizer=false"],
)
LORA = ["lora.r=4", "lora.dropout=0.1"]
# The folders of converted weights, and the settings that go with them.
LAYOUTS: dict[str, tuple[Layout, list[str]]] = {
    "one": (Layout(llm_pp_layers=((4,),), vit_pp_layers=((4,),)), ["parallel.pp_size=1"]),
    "tp2": (
        Layout(llm_pp_layers=((4,),), vit_pp_layers=((4,),), tp_size=2),
        ["parallel.tp_size=2", "parallel.pp_size=1", "parallel.sequence_parallel=true"],
    ),
    "pp2": (Layout(llm_pp_layers=((1, 3),), vit_pp_layers=((4, 0),)), ["parallel.pp_size=2"]),
    "pp2-tied": (
        Layout(llm_pp_layers=((2, 2),), vit_pp_layers=((4, 0),)),
        ["parallel.pp_size=2", "model.hf_dir=hf-tied"],
    ),
    "one-tied": (Layout(llm_pp_layers=((4,),), vit_pp_layers=((4,),)), ["parallel.pp_size=1", "model.hf_dir=hf-tied"]),
    "vpp2": (
        Layout(llm_pp_layers=((0, 1), (2, 1)), vit_pp_layers=((1, 3), (0, 0))),
        ["parallel.pp_size=2", "parallel.vpp_size=2"],
    ),
    "tp2pp2": (
        Layout(llm_pp_layers=((0, 4),), vit_pp_layers=((2, 2),), tp_size=2),
        ["parallel.tp_size=2", "parallel.pp_size=2"],
    ),
    "tp2-whole-tower": (
        Layout(llm_pp_layers=((4,),), vit_pp_layers=((4,),), tp_size=2, vit_tp_size=1),
        ["parallel.tp_size=2", "parallel.pp_size=1"],
    ),
    "pp2-together-tied": (
        Layout(llm_pp_layers=((0, 4),), vit_pp_layers=((4, 0),)),
        ["parallel.pp_size=2", "model.hf_dir=hf-tied"],
    ),
}  # fmt: skip
# Four processes; what a layout leaves is data parallel.
STRAIGHT: dict[str, tuple[str, list[str]]] = {
    "dp4": ("one", []),
    "vpp2-bf16": ("vpp2", [*PACKED, *BF16]),
    "tp2-lora": ("tp2", LORA),
    "tp2-packed": ("tp2", PACKED),
    "tied": ("pp2-tied", []),
    "tp2-pp2": ("tp2pp2", []),
    "dp4-bf16-whole": ("one", [*BF16, *WHOLE]),
    "pp2-whole-frozen": ("pp2", [*WHOLE, "train.freeze=[visual.*]"]),
    "tp2-tower-on-each": ("tp2-whole-tower", WHOLE),
}
STRAIGHT = first(STRAIGHT, 3)
# From which run, in which layout.
ELSEWHERE: dict[str, tuple[str, str, list[str]]] = {
    "dp4 to tp2": ("dp4", "tp2", PACKED),
    "vpp2 to dp4, bf16": ("vpp2-bf16", "one", BF16),
    "tied, pp2 to dp4": ("tied", "one-tied", []),
    "dp4 to vpp2": ("dp4", "vpp2", WHOLE),
    "tp2-pp2 to dp4": ("tp2-pp2", "one", []),
    "pp2 to tp2, frozen": ("pp2-whole-frozen", "tp2", ["train.freeze=[visual.*]"]),
    "tower whole on each to cut": ("tp2-tower-on-each", "tp2pp2", []),
    "tied, to one stage with both ends": ("tied", "pp2-together-tied", []),
}
ELSEWHERE = first(ELSEWHERE, 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data, converted weights for every layout."""
    folder = make(tmp_path_factory.mktemp("mini") / "world", digits=40, heldout_digits=10)
    convert(folder / "data/train.llava.json", folder / "data/train.json", image_dir=folder / "data/images")
    tie(folder)
    for name, (layout, _) in LAYOUTS.items():
        hf = folder / ("hf-tied" if "tied" in name else "hf")
        Converter.named("Qwen2_5_VLConverter").hf_to_mm(hf, folder / name, layout)
    return folder


def tie(folder: Path) -> None:
    """Such a model with one weight for words going in and out, which two pipeline stages then hold."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(folder / "hf", folder / "hf-tied")
    config = AutoConfig.from_pretrained(folder / "hf", tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "hf-tied")


def overrides(world: Path, layout: str, *more: str) -> list[str]:
    return [*SMALL, f"model.load={world / layout}", *LAYOUTS[layout][1], *more]


@pytest.fixture(scope="module")
def runs(world: Path) -> Path:
    """All runs, straight and resumed, in one set of processes."""
    cases: list[dict[str, Any]] = []
    for name, (layout, more) in STRAIGHT.items():
        cases.append({"name": name, "overrides": overrides(world, layout, *more)})
        cases.append({"name": f"{name} resumed", "overrides": cases[-1]["overrides"], "after": name})
    for name, (before, layout, more) in ELSEWHERE.items():
        cases.append({"name": name, "overrides": overrides(world, layout, *more), "after": before})
    results = ask("checkpoint_worker.py", 4, world, cases)
    assert [result["error"] for result in results] == [""] * len(cases)
    return world


@pytest.mark.parametrize("name", STRAIGHT)
def test_a_run_goes_on_bit_for_bit(name: str, runs: Path) -> None:
    """Two steps, and two more: a step counter that is shared or lost shows in the second (see AdamW's correction)."""
    straight, resumed = runs / name, runs / f"{name} resumed"
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4]
    assert numbers(resumed) == numbers(straight)
    ours, theirs = tensors(resumed, 4), tensors(straight, 4)
    assert differing(ours, theirs) == []
    assert sum(".exp_avg_sq" in key for key in ours) == sum(".param" in key for key in ours) > 0
    assert rows(resumed)[3]["elapsed_s"] > rows(resumed)[1]["elapsed_s"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_run_goes_on_in_another_layout(name: str, runs: Path) -> None:
    """The order of additions differs, nothing else: float32 rounds at 6e-8, bfloat16 at 4e-3."""
    before = runs / ELSEWHERE[name][0]
    bound = 4e-3 if "bf16" in name else 1e-6
    for ours, theirs in zip(rows(runs / name), rows(before), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=bound)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * bound)
        assert ours["tokens"] == theirs["tokens"]


def test_nothing_of_the_frozen_base_is_in_a_run_with_adapters(runs: Path) -> None:
    folder = runs / "tp2-lora/checkpoint/iter_0000004"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "state"]
    held = [name for name in tensors(runs / "tp2-lora", 4) if ".param" in name]
    adapter = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["peft_type"]) == (4, "LORA")
    assert 0 < len(held) < 400, "two matrices for each of 7 x 4 layers, on two tensor- and two data-parallel ranks"
