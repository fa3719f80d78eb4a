"""The searcher on a flow whose generations take no time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flow import SHAPE, ToyFlow, samples

from dit_cache import Progress, Schedule, SearchError, Static, Taylor, VelocityCache, search, search_front
from dit_cache.searcher.bench import Bench
from dit_cache.searcher.journal import Journal
from dit_cache.searcher.progress import Counter

CALIBRATION, VALIDATION, TEST = samples(0, 4), samples(100, 4), samples(200, 6)


@pytest.fixture
def flow() -> ToyFlow:
    return ToyFlow()


def arguments(flow: ToyFlow, **changes: Any) -> dict[str, Any]:
    given = {"sigmas": flow.sigmas, "calibration": CALIBRATION, "validation": VALIDATION, "batch": 4, "trials": 6}
    return {"run": flow.run, **given, **changes}


def decibels(final: Tensor, reference: Tensor) -> float:
    errors = (final - reference).flatten(1).double().norm(dim=1) / reference.flatten(1).double().norm(dim=1)
    return float((-20 * errors.log10()).mean())


def test_a_found_schedule_is_within_budget_and_scored_as_it_runs(flow: ToyFlow) -> None:
    schedule = search(**arguments(flow, budget=0.5))
    assert len(schedule.computed) == 6
    flow.evaluations = 0
    final = flow.run(VALIDATION, schedule.cache())
    assert flow.evaluations == 6 * len(VALIDATION)
    assert schedule.score == pytest.approx(decibels(final, flow.plain(VALIDATION)), abs=1e-6)


@pytest.mark.parametrize("budget", [0.34, 0.5, 0.67])
def test_a_found_schedule_beats_equal_steps_on_samples_it_never_saw(flow: ToyFlow, budget: float) -> None:
    reference = flow.plain(TEST)
    schedule = search(**arguments(flow, budget=budget))
    every = round(1 / budget) if budget <= 0.5 else 2
    uniform = [step for step in range(12) if step % every == 0 or (budget > 0.5 and step < 5)]
    even = VelocityCache(Static(uniform), predictor=Taylor(1))
    assert len(uniform) >= len(schedule.computed)
    assert decibels(flow.run(TEST, schedule.cache()), reference) > decibels(flow.run(TEST, even), reference) + 3


def test_a_predictor_that_was_asked_for_is_taken(flow: ToyFlow) -> None:
    kinds = {"fitted": "Cf", "taylor": "C012", "reuse": "C0"}
    found = {kind: search(**arguments(flow, budget=0.5, predictor=kind)) for kind in kinds}
    assert all(set(found[kind].plan) <= set(legal) for kind, legal in kinds.items())
    best = search(**arguments(flow, budget=0.5))
    assert (best.score or 0.0) > (found["reuse"].score or 0.0) + 6


def test_everything_computed_is_bit_exact(flow: ToyFlow) -> None:
    schedule = search(**arguments(flow, budget=1.0))
    assert schedule.plan == "C" * 12
    assert torch.equal(flow.run(TEST, schedule.cache()), flow.plain(TEST))
    assert schedule.score == 200.0  # the most that a score says


def test_a_front_rises_with_the_budget(flow: ToyFlow) -> None:
    front = search_front(**arguments(flow, trials=0))
    points = front.points()
    assert [share for share, _ in points] == sorted({share for share, _ in points})
    assert points[-1][0] == 1.0
    assert points[-1][1] > points[len(points) // 2][1] > points[0][1]
    best = front.best(0.5)
    assert best.flops_share <= 0.5
    assert best.score == max(score for share, score in points if share <= 0.5)
    with pytest.raises(SearchError, match="cheapest"):
        front.best(0.01)


def _replaced(step: int, other: Tensor) -> Callable[[int, Tensor], Tensor]:
    return lambda n, velocity: other if n == step else velocity


def test_gains_are_what_is_left_of_a_disturbance(flow: ToyFlow) -> None:
    bench = Bench(
        run=flow.run, sigmas=flow.sigmas, batch=2, every=1, journal=Journal(None, {}), counter=Counter(watch=None)
    )
    measured = bench.record(CALIBRATION).gains
    velocities: list[Tensor] = []

    def noted(_: int, velocity: Tensor) -> Tensor:
        velocities.append(velocity)
        return velocity

    reference = flow.plain(CALIBRATION, noted)
    for step in range(1, 12):
        disturbed = flow.plain(CALIBRATION, _replaced(step, velocities[step - 1]))
        moved = (disturbed - reference).flatten(1).double().norm(dim=1)
        put = (velocities[step - 1] - velocities[step]).flatten(1).double().norm(dim=1)
        width = flow.sigmas[step] - flow.sigmas[step + 1]
        assert float(measured[step]) == pytest.approx(float((moved / put / width).mean()), rel=1e-4)


def test_the_cost_is_told_before_anything_runs_and_kept(flow: ToyFlow) -> None:
    heard: list[tuple[Progress, int]] = []
    search(**arguments(flow, budget=0.5, watch=lambda progress: heard.append((progress, flow.evaluations))))
    first, before = heard[0]
    assert (first.done, before) == (0.0, 0)
    assert all(one.done <= other.done <= other.total for (one, _), (other, _) in itertools.pairwise(heard))
    assert flow.evaluations / 12 == pytest.approx(heard[-1][0].done)
    assert heard[-1][0].eta is not None


@pytest.mark.parametrize("stop_after", [1, 5, 12, 20])
def test_an_interrupted_search_goes_on_where_it_stopped(flow: ToyFlow, tmp_path: Path, stop_after: int) -> None:
    whole = search(**arguments(flow, budget=0.5, batch=1))
    needed, heard = flow.evaluations, 0

    def watch(progress: Progress) -> None:
        nonlocal heard
        heard += 1
        if heard == stop_after:
            raise KeyboardInterrupt

    flow.evaluations, journal = 0, tmp_path / "search.journal"
    with pytest.raises(KeyboardInterrupt):
        search(**arguments(flow, budget=0.5, batch=1, journal=journal, watch=watch))
    if journal.exists():
        with journal.open("a") as file:
            file.write('["score CCC')  # a line that was being written
    assert search(**arguments(flow, budget=0.5, batch=1, journal=journal)) == whole
    # A recording that was cut, and the references, are made again.
    assert flow.evaluations <= needed + 12 * 12
    flow.evaluations = 0
    assert search(**arguments(flow, budget=0.5, batch=1, journal=journal)) == whole
    assert flow.evaluations == 0


@pytest.mark.parametrize("left", [0, 1, 40, "header", "line"])
def test_a_journal_cut_anywhere_is_gone_on_with(flow: ToyFlow, tmp_path: Path, left: int | str) -> None:
    journal = tmp_path / "search.journal"
    whole = search(**arguments(flow, budget=0.5, journal=journal))
    text = journal.read_bytes()
    header = text.index(b"\n")
    kept = left if isinstance(left, int) else {"header": header, "line": header + 30}[left]
    journal.write_bytes(text[:kept])
    for _ in range(2):
        assert search(**arguments(flow, budget=0.5, journal=journal)) == whole
    assert journal.read_bytes().count(b"\n") == text.count(b"\n")


def test_what_else_decides_belongs_to_the_journal(flow: ToyFlow, tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    search(**arguments(flow, budget=0.5, journal=journal, about={"size": 64}))
    with pytest.raises(SearchError, match="size"):
        search(**arguments(flow, budget=0.5, journal=journal, about={"size": 32}))


def test_nothing_is_left_of_a_search_that_was_refused(flow: ToyFlow, tmp_path: Path) -> None:
    with pytest.raises(SearchError):
        search(**arguments(flow, budget=7.0, journal=tmp_path / "search.journal"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_return_the_tensor_that_it_works_in(flow: ToyFlow) -> None:
    buffer = torch.zeros(4, *SHAPE)

    def run(some: list[tuple[str, int]], cache: VelocityCache) -> Tensor:
        return buffer.copy_(flow.run(some, cache))

    assert search(**arguments(flow, budget=0.5, run=run)) == search(**arguments(flow, budget=0.5))


def test_the_journal_of_another_search_is_refused(flow: ToyFlow, tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    search(**arguments(flow, budget=0.5, journal=journal))
    with pytest.raises(SearchError, match="calibration"):
        search(**arguments(flow, budget=0.5, journal=journal, calibration=samples(7, 4)))
    journal.write_text("something else\n")
    with pytest.raises(SearchError, match="journal"):
        search(**arguments(flow, budget=0.5, journal=journal))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 0.0}, "in \\(0, 1\\]"),
        ({"budget": 1.5}, "in \\(0, 1\\]"),
        ({"budget": 0.01}, "less than one of 12 steps"),
        ({"predictor": "magic"}, "there are best, fitted, taylor, reuse"),
        ({"calibration": []}, "samples are missing"),
        ({"validation": CALIBRATION}, "in calibration and in validation"),
        ({"calibration": [torch.zeros(1)]}, "no JSON value"),
        ({"sigmas": [1.0, 1.0, 0.0]}, "falling levels"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "asked for 12 velocities; 2 are expected"),
        ({"batch": 0}, "batch is 0"),
        ({"run": lambda samples, cache: None}, "asked for 0 velocities"),
    ],
)
def test_what_cannot_be_searched(flow: ToyFlow, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SearchError, match=words):
        search(**arguments(flow, **{"budget": 0.5, **changes}))


def test_runs_that_return_something_else(flow: ToyFlow) -> None:
    for wrong in (None, torch.zeros(3, *SHAPE), torch.full((4, *SHAPE), math.nan)):

        def run(some: Any, cache: VelocityCache, wrong: Any = wrong) -> Any:
            flow.run(some, cache)
            return wrong

        with pytest.raises(SearchError, match="the run returned"):
            search(**arguments(flow, budget=0.5, run=run))


def test_a_guard_computes_more_where_a_sample_is_unlike_the_others(flow: ToyFlow) -> None:
    schedule = search(**arguments(flow, budget=0.5))
    assert isinstance(schedule, Schedule)
    usual = schedule.cache(extra=2)
    flow.run(CALIBRATION[:1], usual)
    assert usual.ledger.computed == 6

    strange = schedule.cache(extra=2)
    latents = torch.zeros(1, *SHAPE)
    with strange.generation(flow.sigmas):
        for step in range(12):
            strange.velocity(functools.partial(torch.full, (1, *SHAPE), (-3.0) ** step), latents)
    assert strange.ledger.computed == 8
