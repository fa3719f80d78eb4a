"""Decisions fall outside of what is compiled: no break in the graph, one graph for computing and one for holes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from toy_blocks import HintToy, InPlaceToy, TextToy, Toy, inputs, make, naive

from dit_cache.engine.attaching import attach
from dit_cache.engine.blocks import BlockCache
from dit_cache.engine.moment import Decision
from dit_cache.engine.policies import Always, Static
from dit_cache.engine.predictors import Taylor
from dit_cache.errors import ModelExecError

STEPS = 7
COMPUTED = (0, 1, 4)
STREAMS: dict[type[Toy], tuple[str, ...]] = {TextToy: ("hidden_states", "encoder_hidden_states")}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generate(cache: BlockCache, model: Callable[..., Tensor]) -> list[Tensor]:
    outputs = []
    with cache.generation(STEPS):
        for step, (latents, time) in enumerate(inputs(STEPS)):
            with cache.at(step):
                outputs.append(model(latents, time))
    return outputs


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def arguments(kind: type[Toy], what: str) -> dict[str, Any]:
    return {"what": what, "between": (1, 3) if what == "range" else None, "streams": STREAMS.get(kind)}


@pytest.mark.parametrize("kind", [Toy, InPlaceToy, HintToy, TextToy])
@pytest.mark.parametrize("what", ["stack", "range", "attention"])
def test_the_whole_model_in_two_graphs(kind: type[Toy], what: str) -> None:
    model = make(kind)
    with attach(model, Static(COMPUTED), predictor=Taylor(1), **arguments(kind, what)) as cache:
        expected = generate(cache, model)
    with attach(model, Static(COMPUTED), predictor=Taylor(1), **arguments(kind, what)) as cache:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(3):
            assert equal(generate(cache, compiled), expected)
    assert graphs() == 2
    assert not counters["graph_break"]


def test_without_a_cache_the_compiled_model_computes_what_it_did() -> None:
    model, calls = make(), inputs(STEPS)
    expected = [model(*call) for call in calls]
    with attach(model, Always()) as cache:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert equal([compiled(*call) for call in calls], expected)
        assert equal(generate(cache, compiled), expected)
    assert equal([compiled(*call) for call in calls], expected)


def test_streams_have_to_be_named_where_no_call_came_before() -> None:
    model = make(TextToy)
    with attach(model, Static(COMPUTED)) as cache:
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(ModelExecError, match=r"streams=\("):
            generate(cache, compiled)
        expected = generate(cache, model)
        assert equal(generate(cache, compiled), expected)


class BySignal(Static):
    needs = frozenset({"signal"})
    dynamic = True

    def decide(self, at: Any, seen: Any) -> Decision:
        decision = super().decide(at, seen)
        return Decision(decision.compute, "signal", float(seen.signal()))


@pytest.mark.parametrize("what", ["stack", "attention"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("policy", [Static(COMPUTED), BySignal(COMPUTED)])
def test_block_by_block_any_policy_will_do(what: Any, before: bool, policy: Static) -> None:
    model, calls = make(depth=12), inputs(STEPS)  # more blocks than the compiler would compile one by one

    def signal(model: Toy, latents: Tensor, time: Tensor) -> Tensor:
        return time

    with attach(model, policy, what=what, signal=signal) as cache:
        expected = generate(cache, model)
    if before:
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    with attach(model, policy, what=what, signal=signal, steps=STEPS) as cache:
        if not before:
            for block in model.blocks:
                block.compile(backend="eager", fullgraph=True)
        assert equal(generate(cache, model), expected)
        assert equal([model(*call) for call in calls], expected)
    assert graphs() == (1 if what == "stack" else 2)
    assert not counters["graph_break"]
    assert equal([model(*call) for call in calls], [make(depth=12)(*call) for call in calls])
    assert not any("forward" in vars(module) for module in model.modules())


def test_counted_calls_of_a_compiled_model_break_the_graph_and_are_right() -> None:
    model, calls = make(), inputs(STEPS)
    expected = naive(model, calls, COMPUTED)
    with attach(model, Static(COMPUTED), steps=STEPS):
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert equal([compiled(*call) for call in calls], expected)
    assert graphs() == 2
