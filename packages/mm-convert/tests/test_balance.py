"""Proposed layer lists: legal, no worse than any other, and explained."""

from __future__ import annotations

import json
import shlex
from itertools import combinations, pairwise
from math import prod
from pathlib import Path

import published_models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_memory_plans import recorded
from recorded_models import Recorded
from test_bad_input import refused
from tiny_checkpoint import MakeModel

from mm_convert import Converter, LayoutError, ModelError
from mm_convert.balance import _cut, propose
from mm_convert.cli import main

QWEN = Converter.named("Qwen2_5_VLConverter")


@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    stages=st.integers(1, 4),
    factor=st.lists(st.integers(1, 3), min_size=4, max_size=4),
)
def test_no_cut_is_better(weights: list[int], stages: int, factor: list[int]) -> None:
    """Beside all cuts there are."""
    stages = min(stages, len(weights))

    def cost(stage: int, start: int, stop: int) -> float:
        return sum(weights[start:stop]) * factor[stage]

    def worst(bounds: list[tuple[int, int]]) -> float:
        return max(cost(s, *b) for s, b in enumerate(bounds))

    every = [list(pairwise((0, *inner, len(weights)))) for inner in combinations(range(1, len(weights)), stages - 1)]
    found = _cut(len(weights), stages, cost, max)
    assert found in every
    assert worst(found) == min(map(worst, every))


@pytest.mark.parametrize("name", ["3B", "7B"])
@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_published_models(name: str, pp: int, vpp: int, tmp_path: Path) -> None:
    hf = published_models.save(tmp_path / "hf", name)
    found = propose(hf, pp_size=pp, vpp_size=vpp, tp_size=2)
    layout = found.layout
    assert (layout.pp_size, layout.vpp_size, layout.tp_size) == (pp, vpp, 2)
    layout.check_sums(llm_layers=published_models.MODELS[name].layers, vit_layers=published_models.DEPTH)
    # No vision layer behind a language layer, and no stage without a layer.
    stages = [*zip(*(map(len, layout.stages(part)) for part in ("llm", "vit")), strict=True)]
    assert all(llm + vit for llm, vit in stages)
    assert layout.last_stages("vit") <= layout.first_stages("llm")
    assert sum(rank.work for rank in found.ranks) == pytest.approx(1)
    model = published_models.MODELS[name]
    # A tied output layer is a copy of the embedding wherever there is a pipeline.
    copied = model.vocabulary * model.hidden if model.tied and pp > 1 else 0
    assert sum(rank.parameters for rank in found.ranks) == copied + sum(
        map(prod, published_models.shapes(model).values())
    )


def test_more_images_mean_fewer_vision_layers_beside_language_layers(tmp_path: Path) -> None:
    hf = published_models.save(tmp_path / "hf", "7B")
    first = [propose(hf, pp_size=2, image_share=share).ranks[0].llm_layers for share in (0.0, 0.5, 1.0)]
    assert first == sorted(first, reverse=True)
    assert first[0] > first[-1]


def test_the_line_works(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make_model("a model")
    assert main(["auto", str(hf), "--pp", "2", "--vpp", "2", "--tp", "2"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    words = [str(tmp_path / "mm") if word == "MM" else word for word in shlex.split(line)]
    assert words[0] == "mm-convert"
    assert main(words[1:]) == 0
    capsys.readouterr()
    assert main(["auto", str(hf), "--pp", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["tp_size"] == 1


def test_why(make_model: MakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["auto", str(make_model()), "--pp", "2"]) == 0
    out = capsys.readouterr().out
    for words in ("works longest", "even would be 50.0%", "is fullest", "18 bytes a parameter"):
        assert words in out


def test_what_cannot_be(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make_model()
    refused(["auto", str(hf), "--pp", "5", "--vpp", "2"], hf, capsys, "5 x 2 stages for 8 layers")
    refused(["auto", str(hf), "--pp", "2", "--tp", "3"], hf, capsys, "tp_size 3", "[1, 2, 4]")
    with pytest.raises(LayoutError):
        propose(hf, pp_size=9)
    config = json.loads((hf / "config.json").read_text()) | {"model_type": "something"}
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"'something'; known: .*qwen2_5_vl"):
        propose(hf, pp_size=2)


def test_blocks_that_are_all_alike_are_not_weighed(tmp_path: Path) -> None:
    wan = recorded("wan_t2v")
    hf = Recorded(wan["config"], wan["saved"], wan["saved"]).write(tmp_path / "hf")
    with pytest.raises(ModelError, match="generative model, whose blocks are alike"):
        propose(hf, pp_size=2)


@pytest.mark.parametrize(
    "words",
    [["--pp", "0"], ["--pp", "x"], ["--pp", "2", "--image-share", "2"], ["--pp", "1", "--image-share", "y"], []],
)
def test_numbers_that_are_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["auto", "hf", *words])
    assert stop.value.code == 2
    assert "usage: mm-convert auto" in capsys.readouterr().err
