"""Wan2.1's table, on tensors in memory: diffusers' and the original names, to the published layout and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_models import random_tensors
from tiny_checkpoint import Tensors

from mm_convert import CheckpointError, Layout, LayoutError, Plan, Ref, Segment, Spec, assemble, relate
from mm_convert.families.wan import WAN

Ranks = dict[tuple[int, int], Tensors]

# The published renaming, part by part.
OUTSIDE = {
    "condition_embedder.text_embedder.": "text_embedding.",
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "condition_embedder.image_embedder.norm1.": "img_emb.proj.0.",
    "condition_embedder.image_embedder.ff.net.0.proj.": "img_emb.proj.1.",
    "condition_embedder.image_embedder.ff.net.2.": "img_emb.proj.3.",
    "condition_embedder.image_embedder.norm2.": "img_emb.proj.4.",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
}
INSIDE = {
    "scale_shift_table": "modulation",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "to_q.": "proj_q.",
    "to_k.": "proj_k.",
    "to_v.": "proj_v.",
    "to_out.0.": "proj_out.",
    "add_k_proj.": "k_img.",
    "add_v_proj.": "v_img.",
    "norm_added_k.": "k_norm_img.",
    "norm_q.": "q_norm.",
    "norm_k.": "k_norm.",
    "norm2.": "norm3.",
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
}


def recorded(kind: str) -> dict[str, Any]:
    text = (Path(__file__).parent / "recorded" / f"wan_{kind}.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def published(hf: Tensors, lists: list[list[int]]) -> Ranks:
    """What each (pipeline rank, virtual stage) holds of a model under diffusers' names."""
    counts, pp = [n for row in lists for n in row], len(lists[0])
    made: Ranks = {(s % pp, s // pp): {} for s in range(len(counts))}
    for name, tensor in hf.items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            number, _, inner = rest.partition(".")
            stage = next(s for s in range(len(counts)) if int(number) < sum(counts[: s + 1]))
            new = f"blocks.{int(number) - sum(counts[:stage])}.{renamed(inner, INSIDE)}"
        elif part in ("proj_out", "scale_shift_table"):
            stage, new = len(counts) - 1, f"head.head.{rest}" if rest else "head.modulation"
        else:
            stage, new = 0, renamed(name, OUTSIDE)
        made[stage % pp, stage // pp][new] = tensor
    return made


def renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def planned(config: dict[str, Any], held: Tensors, layout: Layout) -> tuple[dict[Ref, Spec], list[Segment], Plan]:
    sources = {Ref("", "", name): Spec("BF16", tuple(t.shape)) for name, t in held.items()}
    targets, segments = relate(WAN, WAN.sizes(config), layout, sources)
    return sources, segments, Plan.build(sources, targets, segments)


def slices(held: dict[Ref, torch.Tensor], segment: Segment) -> torch.Tensor:
    return held[segment.source].narrow(segment.dim, segment.source_start, segment.length)


@pytest.mark.parametrize("names", ["diffusers", "original"])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
@pytest.mark.parametrize(
    "lists",
    [
        [[5]],
        [[2, 3]],
        [[0, 5]],
        [[5, 0]],
        [[1, 2, 0, 2]],
        [[2, 0, 1, 2]],
        [[2], [3]],
        [[1, 1], [0, 3]],
        [[0, 2], [3, 0]],
    ],
)
def test_published_layout_and_back(kind: str, names: str, lists: list[list[int]]) -> None:
    model = recorded(kind)
    diffusers = random_tensors(model["saved"])
    config, shapes = (
        (model["config"], model["saved"]) if names == "diffusers" else (model["original_config"], model["original"])
    )
    assert WAN.accepts(config)
    held = {name: diffusers[WAN.canonical(name)] for name in shapes}
    layout = Layout(llm_pp_layers=lists)  # type: ignore[arg-type]
    sources, segments, plan = planned(config, held, layout)
    tensors = {ref: held[ref.name] for ref in sources}
    made = {ref: assemble(plan, ref, lambda segment: slices(tensors, segment)) for ref in plan.targets}
    ranks: Ranks = {(p, v): {} for p in range(layout.pp_size) for v in range(layout.vpp_size)}
    for ref, tensor in made.items():
        pp_rank, virtual = layout.place(layout.stage(ref))
        ranks[pp_rank, virtual][ref.name] = tensor
    expected = published(diffusers, lists)
    assert {place: sorted(held) for place, held in ranks.items()} == {p: sorted(held) for p, held in expected.items()}
    assert all(torch.equal(ranks[place][name], t) for place, held in expected.items() for name, t in held.items())
    back = Plan.build(plan.targets, sources, [segment.reversed() for segment in segments])
    for ref in sources:
        assert torch.equal(assemble(back, ref, lambda segment: slices(made, segment)), held[ref.name])


def test_original_names_are_diffusers_names_spelt_otherwise() -> None:
    # pos_embed of flf2v aside, diffusers' own loader of original files says the same of these records.
    for kind in ("t2v", "i2v", "flf2v"):
        model = recorded(kind)
        assert {WAN.canonical(n): shape for n, shape in model["original"].items()} == model["saved"]
        assert all(WAN.canonical(name) == name for name in model["saved"])
        assert {WAN.spellings["original"].name(n): shape for n, shape in model["saved"].items()} == model["original"]


def test_tensor_parallel_is_refused() -> None:
    model = recorded("t2v")
    with pytest.raises(LayoutError, match=r"tp_size 2: .* does not divide tensors .* legal for this model: \[1\]"):
        planned(model["config"], random_tensors(model["saved"]), Layout(llm_pp_layers=((5,),), tp_size=2))


def test_a_list_that_does_not_sum_to_the_blocks_is_refused() -> None:
    model = recorded("t2v")
    with pytest.raises(LayoutError, match=r"sum to 4, but the model has 5"):
        planned(model["config"], random_tensors(model["saved"]), Layout(llm_pp_layers=((2, 2),)))


def test_an_image_branch_that_the_configuration_lacks_is_unknown() -> None:
    with pytest.raises(CheckpointError, match=r"unknown 33: blocks\.0\.cross_attn\.k_img\.bias"):
        planned(
            recorded("t2v")["original_config"],
            random_tensors(recorded("i2v")["original"]),
            Layout(llm_pp_layers=((5,),)),
        )
