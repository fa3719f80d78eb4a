"""Costs from inner products, and the dynamic programme, against the same done with tensors and by trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dit_cache.engine.predictors import lagrange
from dit_cache.schedule import Schedule
from dit_cache.searcher.costs import RIDGE, Recording, hole_weights, segment_costs
from dit_cache.searcher.dynamic import shortest_schedules, total_cost
from dit_cache.searcher.planning import Planner

STEPS, SAMPLES, SIZE = 9, 3, 40
# Everything is float64; what remains is the order of the sums.
CLOSE = 1e-9


@pytest.fixture(scope="module")
def velocities() -> Tensor:
    """[N, T, size]: smooth over the steps, with some noise."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(SAMPLES, 3, SIZE, generator=generator, dtype=torch.float64)
    times = torch.linspace(0, 2, STEPS, dtype=torch.float64)
    curves = torch.stack((torch.ones(STEPS), times.sin(), (2 * times).cos())).double()
    noise = torch.randn(SAMPLES, STEPS, SIZE, generator=generator, dtype=torch.float64)
    return torch.einsum("ct,ncs->nts", curves, basis) + 0.05 * noise


@pytest.fixture(scope="module")
def recording(velocities: Tensor) -> Recording:
    sigmas = torch.tensor([1, 0.97, 0.93, 0.86, 0.77, 0.66, 0.5, 0.3, 0.15, 0.0], dtype=torch.float64)
    gains = torch.linspace(4, 1, STEPS, dtype=torch.float64)
    return Recording(gram=velocities @ velocities.mT, gains=gains, sigmas=sigmas)


def naive_cost(velocities: Tensor, recording: Recording, kind: str, i: int, j: int, k: int) -> float:
    """The definition, with tensors."""
    anchors = [j] if i < 0 else [i, j]
    total = torch.zeros(SAMPLES, SIZE, dtype=torch.float64)
    for hole in range(j + 1, k):
        if kind == "f":
            columns = velocities[:, anchors].transpose(1, 2).reshape(-1, len(anchors))
            ridge = RIDGE * torch.diag((columns**2).sum(0))
            weights = torch.linalg.inv(columns.T @ columns + ridge) @ columns.T @ velocities[:, hole].reshape(-1)
        else:
            used = anchors[-int(kind) - 1 :]
            weights = torch.tensor(lagrange(float(recording.sigmas[hole]), [float(recording.sigmas[a]) for a in used]))
            anchors_used = used
        predicted = torch.einsum("a,nas->ns", weights.double(), velocities[:, anchors if kind == "f" else anchors_used])
        width = abs(float(recording.sigmas[hole + 1] - recording.sigmas[hole]))
        total += float(recording.gains[hole]) * width * (predicted - velocities[:, hole])
    return float((total**2).sum(1).mean())


@pytest.mark.parametrize("kind", ["0", "1", "f"])
def test_segment_costs_are_those_of_the_tensors(velocities: Tensor, recording: Recording, kind: str) -> None:
    costs = segment_costs(recording, [kind], longest=STEPS)
    assert len(costs) > 100
    for (i, j, k), cost in costs.items():
        wanted = naive_cost(velocities, recording, "0" if kind == "1" and i < 0 else kind, i, j, k)
        assert cost == pytest.approx(wanted, rel=1e-6, abs=CLOSE)


def test_the_best_kind_of_each_segment_counts(recording: Recording) -> None:
    both = segment_costs(recording, ["0", "1"], longest=STEPS)
    one, other = (segment_costs(recording, [kind], longest=STEPS) for kind in "01")
    assert all(both[key] == min(one[key], other[key]) for key in both)
    assert any(one[key] < other[key] for key in both)
    assert any(one[key] > other[key] for key in both)


def test_fitted_weights_are_a_least_squares_solution(velocities: Tensor, recording: Recording) -> None:
    anchors, holes = [0, 2, 3, 5], [6, 7]
    columns = velocities[:, anchors].transpose(1, 2).reshape(-1, len(anchors))
    targets = velocities[:, holes].transpose(1, 2).reshape(-1, len(holes))
    wanted = torch.linalg.lstsq(columns, targets).solution.T
    # The ridge moves them by about RIDGE times the condition of the problem.
    torch.testing.assert_close(hole_weights(recording, "f", anchors, holes), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("longest", [3, STEPS])
def test_the_dynamic_programme_finds_what_trying_everything_finds(
    recording: Recording, power: float, longest: int
) -> None:
    costs = segment_costs(recording, ["1"], longest=longest)
    raised = {key: cost**power for key, cost in costs.items()}
    found = shortest_schedules(costs, STEPS, power=power)
    for count in range(1, STEPS + 1):
        everything = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
        best = min(total_cost(raised, computed, STEPS) for computed in everything)
        if math.isinf(best):
            assert count not in found
        else:
            assert len(found[count]) == count
            assert total_cost(raised, found[count], STEPS) == pytest.approx(best, rel=1e-9, abs=1e-15)


def test_a_schedule_fills_each_gap_with_its_best_kind(recording: Recording) -> None:
    sigmas = tuple(recording.sigmas[:-1].tolist())
    planner = Planner(recording, ("0", "1", "2"), Schedule(plan="C" * STEPS, sigmas=sigmas))
    for choices in planner.by_count.values():
        for computed in choices:
            schedule = planner.schedule(computed)
            assert schedule.computed == computed
            assert all(
                int(kind) <= sum(c < hole for c in computed) - 1
                for hole, kind in enumerate(schedule.plan)
                if kind != "C"
            )


def test_moves_keep_the_number_of_computed_steps(recording: Recording) -> None:
    planner = Planner(recording, ("f",), Schedule(plan="C" * STEPS, sigmas=tuple(recording.sigmas[:-1].tolist())))
    computed = planner.by_count[4][0]
    moves = planner.moves(computed)
    assert moves
    for move in moves:
        assert move[0] == 0
        assert len(set(move)) == 4
        assert len(set(move) ^ set(computed)) == 2
