"""The probe: what it measures, and that every rank finds the same."""

from __future__ import annotations

import os
from typing import Any

import pytest
from ranks import run_all, run_ranks

from dit_ulysses import Costs, DisagreementError, GroupError, PlanError
from dit_ulysses.probe import measure

SHORT = 0.05  # seconds; the numbers do not matter here
COMPUTED = {"matmul_flops", "attention_flops", "ranks_per_node"}
INSIDE, BETWEEN = {"latency_inside", "bandwidth_inside"}, {"latency_between", "bandwidth_between"}


def _measure(ranks_per_node: str | None, seconds: float = SHORT) -> tuple[Costs, list[str]]:
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    if ranks_per_node is not None:
        os.environ["LOCAL_WORLD_SIZE"] = ranks_per_node
    stages: list[str] = []
    return measure(seconds=seconds, watch=stages.append), stages


@pytest.mark.parametrize(
    ("size", "node", "measured"),
    [
        (1, "1", COMPUTED),
        (2, None, COMPUTED | INSIDE),
        (4, "2", COMPUTED | INSIDE | BETWEEN),
        (3, "1", COMPUTED | BETWEEN),
    ],
)
def test_all_ranks_find_the_same(size: int, node: str | None, measured: set[str]) -> None:
    results: list[Any] = run_all(size, _measure, node)
    costs, stages = results[0]
    assert all(other == costs for other, _ in results)
    assert set(costs.measured) == measured
    assert costs.ranks_per_node == int(node or size)
    for name in {*INSIDE, *BETWEEN} - measured:
        assert getattr(costs, name) == getattr(Costs(), name), "what cannot be measured stays a guess"
    assert {stage.partition(",")[0] for stage in stages} >= {"matrix products", "attention"}


def _disagree() -> Costs:
    return measure(seconds=1.0 + int(os.environ["RANK"]))


def test_ranks_that_disagree_find_out() -> None:
    for error in run_ranks(2, _disagree):
        assert isinstance(error, DisagreementError)
        assert "seconds: 1.0 on rank 0, 2.0 on rank 1" in str(error)


def test_bad_input() -> None:
    with pytest.raises(PlanError, match="seconds is 0; a number above 0"):
        measure(seconds=0)
    with pytest.raises(GroupError, match="under torchrun"):
        measure()
    (error,) = run_ranks(1, _measure, "two")
    assert isinstance(error, PlanError)
    assert "LOCAL_WORLD_SIZE is 'two'" in str(error)
