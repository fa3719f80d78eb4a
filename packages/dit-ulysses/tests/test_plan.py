"""Plans: which there are, what they cost, and whether the bytes are those that are really sent."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_all
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_ulysses import Costs, GroupError, ParallelPlan, PlanError, WireMeter
from dit_ulysses.cfg import cfg_parallel
from dit_ulysses.estimate import Workload, sent_by_rank
from dit_ulysses.plan import plans
from dit_ulysses.sequence import gather_sequence
from dit_ulysses.shares import shares
from dit_ulysses.ulysses import ulysses_attention
from dit_ulysses.usp import usp_attention

# Wan2.1 14B at 720p: 40 heads of 128, 21 × 45 × 80 tokens.
WAN_14B = Workload(heads=40, tokens=75600, layers=40, ffn_dim=13824, guided=True)
WIDE = 75600 * 5120 * 2  # S·C·b

# (ulysses, ring, heads, kv_heads, tokens, text_tokens): even, more ranks than heads, grouped keys that a rank's heads
# share unevenly, lengths that divide nothing, joint text.
METERED = [
    (4, 1, 8, 8, 64, 0),
    (4, 1, 3, 3, 17, 0),
    (4, 1, 6, 2, 10, 0),
    (4, 1, 5, 1, 9, 3),
    (1, 4, 3, 3, 18, 0),
    (1, 4, 4, 2, 9, 0),
    (2, 2, 4, 4, 16, 0),
    (2, 2, 5, 5, 11, 0),
    (2, 2, 6, 3, 7, 0),
    (2, 2, 1, 1, 7, 0),
]
WIDTH, CHANNELS = 4, 3


def test_every_product_is_a_plan_and_nothing_else() -> None:
    for world, tensor in itertools.product((1, 2, 6, 8, 12), (False, True)):
        found = [tuple(plan.as_dict().values()) for plan in plans(world, tensor=tensor)]
        numbers = range(1, world + 1)
        wanted = {
            (cfg, ulysses, ring, shared)
            for cfg in (1, 2)
            for ulysses, ring, shared in itertools.product(numbers, numbers, numbers if tensor else (1,))
            if cfg * ulysses * ring * shared == world
        }
        assert set(found) == wanted
        assert len(found) == len(wanted)


def test_a_plan_that_does_not_fit_says_which_do() -> None:
    plan = ParallelPlan(cfg=2, ulysses=4)
    plan.check(8)
    with pytest.raises(PlanError) as refused:
        plan.check(4)
    assert str(refused.value) == (
        "cfg 2 × ulysses 4 takes 8 ranks (cfg × ulysses × ring × tensor = 2 × 4 × 1 × 1), and there are 4; "
        "what fits 4: ulysses 4, ulysses 2 × ring 2, ring 4, cfg 2 × ulysses 2, cfg 2 × ring 2"
    )
    with pytest.raises(PlanError, match="tensor 2"):
        ParallelPlan(tensor=3).check(4)
    with pytest.raises(PlanError, match="there is 1; what fits 1: one rank"):
        plan.check(1)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"cfg": 3}, "cfg is 3; .* 1 or 2 is expected"),
        ({"ulysses": 0}, "ulysses is 0; a whole number from 1"),
        ({"ring": 2.0}, r"ring is 2\.0"),
        ({"tensor": True}, "tensor is True"),
    ],
)
def test_degrees_that_are_none(degrees: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        ParallelPlan(**degrees)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"tokens": 1.5}, r"tokens is 1\.5"),
        ({"kv_heads": 5}, "kv_heads is 5, heads is 12"),
        ({"text_tokens": -1}, "text_tokens is -1; a whole number from 0"),
        ({"world": 0}, "world is 0"),
    ],
)
def test_sizes_that_are_none(sizes: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        ParallelPlan.auto(**{"world": 4, "heads": 12, "tokens": 100, **sizes})


def test_even_shares_send_what_the_published_formulas_say() -> None:
    calls = 40 * 2  # layers, and both passes
    ulysses = ParallelPlan(ulysses=8).bytes_per_step(WAN_14B)
    to_heads, to_tokens = ulysses["tokens to heads"], ulysses["attention to tokens"]
    assert to_heads + to_tokens == calls * 4 * WIDE // 8 * 7 // 8
    assert (to_heads + to_tokens) // calls == 338_688_000  # 339 MB a layer
    assert ParallelPlan(ring=8).bytes_per_step(WAN_14B)["ring"] == calls * 2 * WIDE // 8 * 7
    assert ParallelPlan(ring=8).bytes_per_step(WAN_14B)["ring"] // calls == 1_354_752_000  # 1.355 GB
    assert ParallelPlan(tensor=8).bytes_per_step(WAN_14B) == {"tensor": calls * 3 * 2 * WIDE * 7 // 8}
    # 16 channels of 21 × 90 × 160 latents in fp32: 19.4 MB
    assert ParallelPlan(cfg=2).bytes_per_step(WAN_14B) == {"guidance": 16 * 21 * 90 * 160 * 4}


def _metered(cases: list[tuple[int, ...]]) -> list[dict[str, int]]:
    """What this rank really sends in each case."""
    found = []
    for ulysses, ring, heads, kv_heads, tokens, text in cases:
        mesh = ParallelPlan(ulysses=ulysses, ring=ring).mesh("cpu")
        lengths = shares(tokens, ulysses * ring)
        here = lengths[dist.get_rank()]
        q, k, v = (torch.randn(2, here, count, WIDTH) for count in (heads, kv_heads, kv_heads))
        with WireMeter() as meter:
            if ring > 1:
                usp_attention(q, k, v, mesh=mesh["ring", "ulysses"], lengths=lengths)
            else:
                joint = tuple(torch.randn(2, text, count, WIDTH) for count in (heads, kv_heads, kv_heads))
                ulysses_attention(
                    *(q, k, v),
                    group=None,
                    attention=_attention,
                    lengths=lengths,
                    joint=joint if text else None,  # type: ignore[arg-type]
                )
            gather_sequence(torch.randn(2, here, CHANNELS), 1, group=None, lengths=lengths)
        found.append({name: sent for name, sent in meter.sent.items() if sent})
    return found


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def test_bytes_are_those_that_a_meter_counts_on_every_rank() -> None:
    by_rank = run_all(4, _metered, METERED)
    for at, (ulysses, ring, heads, kv_heads, tokens, text) in enumerate(METERED):
        work = Workload(
            heads=heads,
            kv_heads=kv_heads,
            tokens=tokens,
            text_tokens=text,
            head_dim=WIDTH,
            batch=2,
            bytes_per_element=4,
            prediction_channels=CHANNELS,
        )
        plan, counted = ParallelPlan(ulysses=ulysses, ring=ring), [found[at] for found in by_rank]
        assert sent_by_rank(plan, work) == counted, plan
        assert sum(plan.bytes_per_step(work).values()) == max(sum(sent.values()) for sent in counted)


def _guidance_metered() -> dict[str, int]:
    def predict() -> Tensor:
        return torch.zeros(2, 7, CHANNELS)

    with WireMeter() as meter:
        cfg_parallel(predict, predict, group=None)
    return meter.sent


def test_bytes_of_guidance_are_those_that_a_meter_counts() -> None:
    work = Workload(heads=2, tokens=7, batch=2, guided=True, prediction_channels=CHANNELS)
    assert run_all(2, _guidance_metered) == [ParallelPlan(cfg=2).bytes_per_step(work)] * 2


def test_the_passes_of_a_guided_step_are_counted_on_the_ranks_that_compute_them() -> None:
    one = Workload(heads=12, tokens=100)
    guided = Workload(heads=12, tokens=100, guided=True, layers=3)
    both, half = ParallelPlan(ulysses=4), ParallelPlan(cfg=2, ulysses=4)
    attention = both.bytes_per_step(one)["tokens to heads"]
    assert both.bytes_per_step(guided)["tokens to heads"] == 6 * attention
    assert half.bytes_per_step(guided)["tokens to heads"] == 3 * attention
    assert both.bytes_per_step(guided)["gather"] == 2 * half.bytes_per_step(guided)["gather"]


def test_twelve_heads_on_eight_ranks_are_shared_out_evenly() -> None:
    assert ParallelPlan.auto(8, heads=12, tokens=32760, guided=True) == ParallelPlan(cfg=2, ulysses=4)
    # The busiest of 8 ranks attends 2 heads, of 4 it attends 3 and half of the queries: 2 : 1.5.
    work = Workload(heads=12, tokens=32760, guided=True)
    uneven, even = (ParallelPlan(**degrees).estimate(work) for degrees in ({"ulysses": 8}, {"cfg": 2, "ulysses": 4}))
    assert (uneven.heads, even.heads) == (2, 3)
    assert uneven.attention / even.attention == pytest.approx(4 / 3)


def test_inside_of_a_node_heads_are_exchanged_and_slow_wires_see_a_ring() -> None:
    assert ParallelPlan.auto(8, heads=40, tokens=75600) == ParallelPlan(ulysses=8)
    slow = Costs(ranks_per_node=8, bandwidth_between=1e9)
    found = ParallelPlan.auto(16, heads=40, tokens=75600, guided=True, costs=slow)
    assert found == ParallelPlan(cfg=2, ulysses=8), "guidance sends least, so it goes between the nodes"
    found = ParallelPlan.auto(16, heads=40, tokens=75600, costs=slow)
    assert (found.ring, found.ulysses) == (2, 8)


def test_the_best_is_the_cheapest_of_all() -> None:
    for world, guided, tensor in itertools.product((1, 4, 6, 16), (False, True), (False, True)):
        work = Workload(heads=12, tokens=1000, guided=guided)
        found = ParallelPlan.explain(world, work, tensor=tensor)
        seconds = {one.plan: one.plan.estimate(work).seconds for one in found.estimates}
        assert seconds[found.best.plan] == pytest.approx(min(seconds.values()), rel=1e-8)
        assert {*seconds, *found.refused} == set(plans(world, tensor=tensor))
        assert all(plan.cfg == 1 for plan in seconds) or guided


def test_seconds_by_hand() -> None:
    costs = Costs(
        latency_inside=1,
        bandwidth_inside=10,
        latency_between=3,
        bandwidth_between=2,
        attention_flops=5,
        matmul_flops=7,
        ring_hidden=0.25,
        ring_pace=0.5,
        ranks_per_node=2,
    )
    work = Workload(heads=4, tokens=8, head_dim=1, bytes_per_element=1, prediction_channels=1)
    # 2 ranks, one node. To heads: 4 tokens × 2 heads × 3. Back: 4 × 2. Gather: 4 tokens × 4 bytes.
    ulysses = ParallelPlan(ulysses=2).estimate(work, costs)
    assert ulysses.sent == {"tokens to heads": 24, "attention to tokens": 8, "gather": 16}
    assert ulysses.wire == pytest.approx(3 * 1 + (24 + 8 + 16) / 10)
    assert ulysses.attention == pytest.approx(4 * 8 * 8 * 2 / 5)
    # Two attentions of 4 × 4 × 4 weights, and a feed-forward of 2 × 4 × 16.
    assert ulysses.matmul == pytest.approx(2 * 4 * (2 * 64 + 128) / 7)
    # A ring sends 4 tokens × 4 heads × 2 once, and hides a quarter; attention in blocks is half as fast.
    ring = ParallelPlan(ring=2).estimate(work, costs)
    assert ring.attention == pytest.approx(4 * 4 * 8 * 4 / (5 * 0.5))
    assert ring.wire == pytest.approx(0.75 * (1 + 32 / 10) + 1 + 16 / 10)
    # 4 ranks, two nodes: two of three others are on the other one. To heads: 2 tokens × 3 heads × 3; back 6 × 1.
    across = ParallelPlan(ulysses=4).estimate(work, costs)
    assert across.sent == {"tokens to heads": 18, "attention to tokens": 6, "gather": 24}
    assert across.wire == pytest.approx(3 * 3 + 48 * 2 / 3 / 2)


def test_tensor_parallelism_is_only_for_memory() -> None:
    weights = 40 * (8 * 5120**2 + 2 * 5120 * 13824) * 2
    found = ParallelPlan.explain(8, WAN_14B, tensor=True, memory=weights // 2)
    assert found.best.plan.tensor > 2
    assert "allowed" in found.refused[ParallelPlan(ulysses=8)]
    assert ParallelPlan.explain(8, WAN_14B, tensor=True).best.plan.tensor == 1
    with pytest.raises(PlanError, match=r"no plan of 8 ranks .* GB are allowed.*; tensor parallelism"):
        ParallelPlan.auto(8, heads=40, tokens=75600, layers=40, memory=10**9)
    assert "does not divide 40 heads" in ParallelPlan.explain(16, WAN_14B, tensor=True).refused[ParallelPlan(tensor=16)]


def test_work_that_a_plan_cannot_do() -> None:
    with pytest.raises(PlanError, match="cfg needs guidance"):
        ParallelPlan(cfg=2).bytes_per_step(Workload(heads=2, tokens=8))
    with pytest.raises(PlanError, match="3 tokens are fewer than the 4 ranks"):
        ParallelPlan.auto(4, heads=2, tokens=3)
    with pytest.raises(PlanError, match="a ring takes no joint tokens"):
        ParallelPlan(ring=2).estimate(Workload(heads=2, tokens=8, text_tokens=1))
    assert ParallelPlan.auto(4, heads=2, tokens=8, text_tokens=1) == ParallelPlan(ulysses=4)


def test_a_comparison_says_why() -> None:
    found = ParallelPlan.explain(8, Workload(heads=12, tokens=32760, guided=True, layers=30))
    table = str(found)
    assert "cfg 2 × ulysses 4: 0." in found.why
    assert found.why in table
    for one in found.estimates:
        assert f"{one.bytes:,}" in table
    assert "Costs that are guesses: latency_inside" in table
    told = json.loads(json.dumps(found.as_dict()))
    assert told["plan"] == {"cfg": 2, "ulysses": 4, "ring": 1, "tensor": 1}
    assert [one["seconds"] for one in told["estimates"]] == sorted(one["seconds"] for one in told["estimates"])
    assert "the only plan" in ParallelPlan.explain(1, Workload(heads=1, tokens=1)).why


def test_of_plans_that_cost_the_same_the_simpler_is_taken() -> None:
    # Attention, which is shared out as evenly by all of them, takes so long that nothing else counts.
    costs = Costs(attention_flops=1e-6, ring_pace=1)
    assert ParallelPlan.auto(8, heads=8, tokens=8, guided=True, costs=costs) == ParallelPlan(ulysses=8)


def _meshes() -> list[Any]:
    found: list[Any] = []
    for plan in (ParallelPlan(ring=2, ulysses=2), ParallelPlan(ulysses=2, tensor=2)):
        mesh = plan.mesh("cpu")
        found.append((mesh.mesh_dim_names, mesh.mesh.tolist(), dist.get_process_group_ranks(mesh.get_group("ulysses"))))
    try:
        ParallelPlan(cfg=2).mesh("cpu")
    except PlanError as error:
        found.append(str(error))
    return found


def test_neighbours_of_a_mesh_exchange_heads() -> None:
    plain, shared, refused = run_all(4, _meshes)[3]
    assert plain == (("cfg", "ring", "ulysses"), [[[0, 1], [2, 3]]], [2, 3])
    assert shared == (("cfg", "ring", "ulysses", "tensor"), [[[[0, 1], [2, 3]]]], [1, 3])
    assert "cfg 2 takes 2 ranks" in refused


def test_a_mesh_needs_a_process_group() -> None:
    with pytest.raises(GroupError, match="init_process_group"):
        ParallelPlan().mesh("cpu")
