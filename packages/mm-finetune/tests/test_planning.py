"""Plans against what torch really allocates, against mm-convert's files, and by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from layouts import ask
from planned import LOAD, SEVEN, TWO, trained

from mm_convert import Converter, Ref, relate
from mm_convert import Layout as MegatronLayout
from mm_convert.plans import Spec
from mm_finetune.families import family_of
from mm_finetune.planning.activations import KERNELS
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.memory import Layout, layout_states, predict
from mm_finetune.planning.schedule import events

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
    {"micro_batches": 2, "lora": ["q_proj", "v_proj", "down_proj"], "saved": ["lm_head", "visual.merger"]},
    {"pp": 2, "llm": [[0, 4]], "vit": [[2, 2]], "micro_batches": 4, "grids": [[1, 32, 32]]},
    {"micro_batches": 1, "tp": 2, "vit_tp": 1, "recompute": "full", "grids": [[1, 32, 32]]},
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


@pytest.mark.parametrize("content", [SEVEN, TWO], ids=["7B", "2B"])
@pytest.mark.parametrize(
    ("tp", "llm", "vit", "more"),
    [
        (1, [[28]], [[32]], {}),
        (2, [[28]], [[32]], {}),
        (2, [[28]], [[32]], {"vit_tp_size": 1}),
        (1, [[0, 28]], [[32, 0]], {}),
        (2, [[12, 16]], [[32, 0]], {}),
        (2, [[4, 8, 8, 8]], [[32, 0, 0, 0]], {"vit_tp_size": 1}),
        (1, [[0, 2, 13, 13]], [[20, 12, 0, 0]], {}),
        (2, [[0, 0, 14, 14]], [[16, 16, 0, 0]], {}),
        (2, [[0, 7], [7, 14]], [[31, 1], [0, 0]], {}),
        (4, [[28]], [[32]], {}),
        (4, [[0, 10, 10, 8]], [[17, 15, 0, 0]], {}),
    ],
)
def test_weights_are_those_of_the_files_that_mm_convert_would_make(
    content: dict[str, Any], tp: int, llm: list[list[int]], vit: list[list[int]], more: dict[str, int]
) -> None:
    """To the byte, rank by rank, by the rules of mm-convert, which know nothing of ours."""
    architecture = Architecture.of(content)
    if architecture.kv_heads % tp or (architecture.tied and len(llm[0]) == 2 and not llm[0][0] and len(llm) == 1):
        # No such layout; or both ends stand on one stage: the file then holds the embedding twice, the model once.
        tp, llm = 1, [[1, 27]] if len(llm[0]) == 2 else llm
    layout = MegatronLayout(llm_pp_layers=llm, vit_pp_layers=vit, tp_size=tp, **more)  # type: ignore[arg-type]
    converter = Converter.named(family_of(architecture.model_type).converter)
    tensors = {Ref("model.safetensors", "", name): Spec("BF16", shape) for name, shape in architecture.shapes().items()}
    files, _ = relate(converter.family, converter.sizes_of(content, Path()), layout, tensors)
    held: Counter[tuple[int, int]] = Counter()
    for place, tensor in files.items():
        held[layout.ranks(place).pp, layout.ranks(place).tp] += tensor.nbytes
    ours = Layout(
        tp_size=tp, sequence_parallel=False, llm_pp_layers=layout.llm_pp_layers, vit_pp_layers=layout.vit_pp_layers,
        vit_tp_size=layout.vit_tp_size, dp_size=1,
    )  # fmt: skip
    stages = layout_states(architecture, trained(architecture), ours, KERNELS["npu"])
    assert held == {(stage, rank): each.weights for stage, each in enumerate(stages) for rank in range(tp)}
    assert all(each.gradients == 2 * each.weights for each in stages)


def test_a_cut_tower_by_hand() -> None:
    """7B on four tensor-parallel ranks: the shapes of its vision layers, of which norms, the patch embedding and what
    is added behind the sum over ranks are whole on each."""
    architecture = Architecture.of(SEVEN)
    block = 2 * 1280 + (3 * 1280 * 1280 + 3 * 1280) / 4 + 1280 * 1280 / 4 + 1280
    block += 2 * (3420 * 1280 + 3420) / 4 + 1280 * 3420 / 4 + 1280
    merger = 1280 + (5120 * 5120 + 5120) / 4 + 3584 * 5120 / 4 + 3584
    layout = Layout(
        tp_size=4, sequence_parallel=False, llm_pp_layers=((0, 0, 28),), vit_pp_layers=((20, 12, 0),), dp_size=1
    )
    first, second, _ = layout_states(architecture, trained(architecture), layout, KERNELS["npu"])
    assert first.weights == 2 * (1280 * 3 * 2 * 14 * 14 + 20 * block)
    assert second.weights == 2 * (12 * block + merger)


@pytest.mark.parametrize(
    ("recompute", "tp", "vit_tp"), [("none", 2, 0), ("none", 4, 1), ("full", 4, 0), ("selective", 2, 0)]
)
def test_what_a_stage_of_vision_layers_keeps_by_hand(recompute: str, tp: int, vit_tp: int) -> None:
    """16 layers between others, three micro-batches under way; selective recomputation is the language model's."""
    architecture = Architecture.of(SEVEN)
    layout = Layout(
        tp_size=tp, sequence_parallel=True, llm_pp_layers=((0, 0, 14, 14),), vit_pp_layers=((8, 16, 8, 0),),
        vit_tp_size=vit_tp, dp_size=1,
    )  # fmt: skip
    stage = predict(architecture, trained(architecture, recompute=recompute), layout, LOAD, KERNELS["npu"])[1]
    patches, cut = LOAD.patches, vit_tp or tp
    row, inner = patches * 1280 * 2, patches * 3420 * 2 / cut
    norm = row + patches * 4
    # Input of the fused product; queries and keys turned, the fused product's output, the result; 16 floats a head.
    attention = norm + row + (2 + 3 + 1) * row / cut + patches * 16 / cut * 16 * 4
    # Input, both halves, their product.
    kept = row if recompute == "full" else attention + norm + row + 3 * inner
    # Cosines and sines of 80 places, in float32; what is sent on. 1F1B: one for this stage and each behind it.
    assert stage.activations == pytest.approx(3 * (16 * kept + 2 * patches * 80 * 4 + row))


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
