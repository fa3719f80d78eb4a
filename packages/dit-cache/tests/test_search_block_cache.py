"""The searcher for a `CacheConfig`, on generations that take no time, against trying everything."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import InPlaceToy, TextFirstToy, Toy, TupleToy, counting, inputs, make

from dit_cache import BlockCache, CacheAgent, CacheConfig, Interval, Progress, SearchError, Static, attach
from dit_cache.searcher.block_cache import BlockCacheFound, search_block_cache
from dit_cache.searcher.block_planning import BlockRecorder

STEPS, DEPTH, SIDES = 8, 5, ("cond", "uncond")
CALIBRATION, VALIDATION = (1, 2), (11, 12, 13)
# Sketches hold float32, and so do the streams here: relative, of sums of squares of differences.
FLOAT32 = 1e-5
# A batch rounds otherwise than its samples one by one, by 1e-7 beside errors of 1e-1 to 1e-3.
ROUNDING_DB = 1e-3
# The relative standard deviation of a mean of k squares of normal numbers is √(2/k); five of them.
POSITIONS = 512
UNLUCKY = 5 * (2 / POSITIONS) ** 0.5


def loop(samples: Sequence[int], velocity: Callable[[Tensor, Tensor, int, int], Tensor]) -> Tensor:
    """A generation with guidance: noise [B, 6, 3] to latents; `velocity` is given latents, time, step, side."""
    noise = [torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)) for seed in samples]
    latents = torch.stack(noise)
    for step in range(STEPS):
        time = torch.tensor(1 - step / STEPS)
        cond, uncond = (velocity(latents * (1 + side), time, step, side) for side in range(2))
        latents = latents + (2 * cond - uncond) / (4 * STEPS)
    return latents


class Flow:
    """The run that is searched for; counts samples."""

    def __init__(self, kind: type[Toy] = Toy, *, counted: bool = False) -> None:
        self.model = make(kind, DEPTH)
        self.counted = counted
        self.generations = 0

    def run(self, samples: Sequence[int], cache: BlockCache) -> Tensor:
        self.generations += len(samples)

        def velocity(latents: Tensor, time: Tensor, step: int, side: int) -> Tensor:
            if self.counted:
                return self.model(latents, time)  # type: ignore[no-any-return]
            with cache.at(step, SIDES[side]):
                return self.model(latents, time)  # type: ignore[no-any-return]

        with cache.generation(STEPS):
            return loop(samples, velocity)

    def search(self, **changes: Any) -> BlockCacheFound:
        given: dict[str, Any] = {
            "steps": STEPS, "speedup": 1.4, "calibration": CALIBRATION, "validation": VALIDATION, "branches": SIDES,
        }  # fmt: skip
        return search_block_cache(self.run, self.model, **{**given, **changes})

    def plain(self, samples: Sequence[int]) -> Tensor:
        return loop(samples, lambda latents, time, *_: self.model(latents, time))


def decibels(final: Tensor, reference: Tensor) -> float:
    errors = (final - reference).flatten(1).double().norm(dim=1) / reference.flatten(1).double().norm(dim=1)
    return float((-20 * errors.log10()).mean())


def attached(model: nn.Module, config: CacheConfig) -> BlockCache:
    policy = Interval(start=config.step_start, interval=config.step_interval, end=config.step_end)
    if config.method == "attention_cache":
        return attach(model, policy, what="attention", branches=SIDES)
    return attach(model, policy, what="range", between=(config.block_start, config.block_end), branches=SIDES)


@pytest.mark.parametrize("kind", [Toy, InPlaceToy, TupleToy, TextFirstToy])
def test_predicted_errors_are_those_of_the_whole_tensors(kind: type[Toy]) -> None:
    model, calls = make(kind, DEPTH), inputs(STEPS)
    before: list[list[list[Tensor]]] = []
    after: list[list[list[Tensor]]] = []
    for latents, time in calls:
        streams = model.enter(latents)
        for kept in (before, after):
            kept.append([])
        for index in range(DEPTH):
            before[-1].append([stream.double().clone() for stream in streams])
            streams = model.block(index, streams, time)
            after[-1].append([stream.double().clone() for stream in streams])
    recorder = recorded(model, calls, positions=10**6)
    errors = recorder.errors(5)
    assert errors.shape == (6, STEPS, len(recorder.ranges())) == (6, STEPS, DEPTH * (DEPTH + 1) // 2)
    for back, step in itertools.product(range(1, 6), range(STEPS)):
        for place, (start, end) in enumerate(recorder.ranges()):
            naive = 0.0
            for stream in range(len(before[0][0]) if step >= back else 0):
                change, earlier = (after[s][end - 1][stream] - before[s][start][stream] for s in (step, step - back))
                naive += float((change - earlier).square().sum())
            assert float(errors[back, step, place]) == pytest.approx(naive, rel=FLOAT32)


def test_predicted_errors_of_attentions_are_those_of_the_whole_outputs() -> None:
    model, calls = make(depth=DEPTH), inputs(STEPS)
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: outputs.append(output.double().clone()))
        for name, module in model.named_modules()
        if name.endswith("attn1")
    ]
    recorder = recorded(model, calls, positions=10**6, attention=True)
    for handle in handles:
        handle.remove()
    by_step = torch.stack(outputs).view(STEPS, -1)
    assert recorder.ranges() == [(0, DEPTH)]
    for back in range(1, 6):
        naive = (by_step[back:] - by_step[:-back]).square().sum(1)
        torch.testing.assert_close(recorder.errors(5)[back, back:, 0], naive, rtol=FLOAT32, atol=0)


def test_a_sketch_estimates_the_whole() -> None:
    model, calls = make(depth=DEPTH), inputs(STEPS, batch=64, length=32)
    whole, sketch = (recorded(model, calls, positions=k).errors(2)[1:, 2:] for k in (10**6, POSITIONS))
    assert float((sketch / whole - 1).abs().max()) < UNLUCKY


def recorded(
    model: Toy, calls: Sequence[tuple[Tensor, Tensor]], *, positions: int, attention: bool = False
) -> BlockRecorder:
    recorder = BlockRecorder(model, attention=attention, blocks=None, module=None, branches=("",), positions=positions)
    with recorder, recorder.generation(len(calls)):
        for latents, time in calls:
            model(latents, time)
    return recorder


@pytest.mark.parametrize(
    ("method", "part", "counted"), [("dit_block_cache", "ff", False), ("attention_cache", "mix", True)]
)
@pytest.mark.parametrize("speedup", [1.2, 2.0, STEPS / 2])
def test_what_is_found_is_executed_as_often_as_it_says(method: str, part: str, speedup: float, counted: bool) -> None:
    flow = Flow(counted=counted)
    found = flow.search(method=method, speedup=speedup, verify=2)
    with counting(flow.model) as counts, attached(flow.model, found.config) as cache:
        final = flow.run(VALIDATION, cache)
    assert STEPS * DEPTH * len(SIDES) / counts[part] == pytest.approx(found.speedup)
    assert found.speedup >= speedup - 1e-9
    assert found.score == pytest.approx(decibels(final, flow.plain(VALIDATION)), abs=ROUNDING_DB)
    assert not any("forward" in vars(module) for module in flow.model.modules())


def test_an_agent_does_with_the_config_what_was_scored() -> None:
    flow = Flow()
    found = flow.search()
    agent, model = CacheAgent(found.config, branches=SIDES), flow.model

    def velocity(latents: Tensor, time: Tensor, step: int, side: int) -> Tensor:
        (hidden,) = model.enter(latents)
        with agent.branch(SIDES[side]):
            for block in model.blocks:
                hidden = agent.apply(block, hidden_states=hidden, time=time)
        return model.leave((hidden,))

    with agent.generation():
        final = loop(VALIDATION, velocity)
    assert found.score == pytest.approx(decibels(final, flow.plain(VALIDATION)), abs=ROUNDING_DB)


def configs(speedup: float) -> Iterator[tuple[frozenset[int], tuple[int, int]]]:
    """Every set of holes and every range that reach a speed-up."""
    grids = itertools.product(range(STEPS), range(STEPS), range(2, 7))
    holes = {frozenset(s for s in range(start + 1, end + 1) if (s - start) % every) for start, end, every in grids}
    for left_out, (first, end) in itertools.product(holes, itertools.combinations(range(DEPTH + 1), 2)):
        if speedup * (STEPS * DEPTH - len(left_out) * (end - first)) <= STEPS * DEPTH:
            yield left_out, (first, end)


def test_what_is_found_is_among_the_best_of_all() -> None:
    flow = Flow()
    found, reference, scores = flow.search(), flow.plain(VALIDATION), []
    for holes, between in configs(1.4):
        policy = Static(set(range(STEPS)) - holes)
        with attach(flow.model, policy, what="range", between=between, branches=SIDES) as cache:
            scores.append(decibels(flow.run(VALIDATION, cache), reference))
    assert len(scores) > 100
    best, median = max(scores), statistics.median(scores)
    assert median <= found.score <= best + ROUNDING_DB
    assert found.score > statistics.quantiles(scores, n=10)[-1]


@pytest.mark.parametrize("method", ["dit_block_cache", "attention_cache"])
def test_what_was_tried_is_told_the_best_first_and_nothing_twice(method: str) -> None:
    found = Flow().search(method=method, verify=20)
    scores = [each.score for each in found.tried]
    effects = set()
    for each in found.tried:
        start, every, end = each.config.step_start, each.config.step_interval, each.config.step_end
        holes = tuple(step for step in range(start, end + 1) if (step - start) % every)
        effects.add((holes, each.config.block_start, each.config.block_end))
    assert len(effects) == len(found.tried) > 10
    assert scores == sorted(scores, reverse=True)
    assert (found.config, found.speedup) == (found.tried[0].config, found.tried[0].speedup)


def test_a_batch_gives_what_single_samples_give() -> None:
    one, both = Flow().search(batch=1), Flow().search(batch=2)
    assert one.config == both.config
    assert one.score == pytest.approx(both.score, abs=ROUNDING_DB)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_cost_is_announced_before_anything_runs(batch: int) -> None:
    flow, told = Flow(), list[tuple[int, Progress]]()
    flow.search(watch=lambda progress: told.append((flow.generations, progress)), batch=batch)
    assert told[0][0] == 0
    assert told[0][1].total >= flow.generations == told[-1][1].done > 0


@pytest.mark.parametrize("speedup", [1.0, 0.5, 4.01, float("nan")])
def test_an_impossible_speed_up_is_refused_and_the_largest_is_named(speedup: float) -> None:
    flow = Flow()
    with pytest.raises(SearchError, match=r"4\.00"):
        flow.search(speedup=speedup)
    assert flow.generations == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "blocks"}, "dit_block_cache and attention_cache"),
        ({"steps": 1}, "steps is 1"),
        ({"verify": 0}, "verify is 0"),
        ({"sketch": 0}, "sketch is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"calibration": ()}, "samples are missing"),
        ({"validation": (2, 11)}, "in calibration and in validation: 2"),
        ({"steps": STEPS + 1}, "called the model 16 times .* 18 are expected"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SearchError, match=words):
        Flow().search(**changes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda final: final[0], "latents .1, …. are expected"),
        (lambda final: None, "returned NoneType"),
        (lambda final: final * float("nan"), "not finite"),
    ],
)
def test_a_run_that_is_none_is_refused_and_the_model_left_as_it_was(spoil: Any, words: str) -> None:
    flow = Flow()
    run = flow.run
    flow.run = lambda samples, cache: spoil(run(samples, cache))  # type: ignore[method-assign]
    with pytest.raises(SearchError, match=words):
        flow.search()
    assert not any("forward" in vars(module) for module in flow.model.modules())
