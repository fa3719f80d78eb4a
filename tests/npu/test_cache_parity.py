"""dit-cache decides, computes and refuses as MindIE SD's cache does, save where that one is known to be wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_cache import CacheAgent, CacheConfig
from npu import peer

ATTENTION, BLOCKS = "attention_cache", "dit_block_cache"
LEGAL: dict[str, Any] = asdict(CacheConfig(BLOCKS, 4, 6, step_interval=2, block_end=4))
Outcome = tuple[list[Tensor], list[int]]


@pytest.fixture(autouse=True, scope="module")
def silence() -> Iterator[None]:
    with peer.quiet():
        yield


def theirs(**values: Any) -> Any:
    """Their agent for a configuration."""
    return peer.module().CacheAgent(peer.module().CacheConfig(**values))


def ours(*, legacy: bool = True, **values: Any) -> CacheAgent:
    return CacheAgent(CacheConfig(**values), legacy=legacy)


def outcome(
    agent: Any, values: dict[str, Any], *, dtype: torch.dtype = torch.float32, encoder: bool = False, runs: int = 2
) -> Outcome:
    """The result of every call of some generations, and which calls were computed."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(values["blocks_count"], 5, generator=generator).to(dtype)
    results: list[Tensor] = []
    computed: list[int] = []
    for call in range(runs * values["steps_count"] * values["blocks_count"]):
        block = call % values["blocks_count"]
        if block == 0:
            hidden = torch.randn(2, 3, 5, generator=generator).to(dtype)
            text = torch.randn(2, 4, 5, generator=generator).to(dtype)

        def function(
            hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *, call: int = call, block: int = block
        ) -> Any:
            computed.append(call)
            out = hidden_states * weights[block] + call
            return (out, encoder_hidden_states.sin()) if encoder and encoder_hidden_states is not None else out

        streams = {"hidden_states": hidden, **({"encoder_hidden_states": text} if encoder else {})}
        result = agent.apply(function, **streams)
        if values["method"] == BLOCKS:
            hidden, text = result if encoder else (result, text)
        results += result if isinstance(result, tuple) else [result]
    return results, computed


def same(one: Outcome, other: Outcome) -> bool:
    return one[1] == other[1] and len(one[0]) == len(other[0]) and all(map(torch.equal, one[0], other[0]))


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """What they accept and compute rightly: no range of a single block."""
    blocks, steps = draw(st.integers(1, 5)), draw(st.integers(1, 11))
    start, first = draw(st.integers(0, steps + 1)), draw(st.integers(0, blocks))
    method = draw(st.sampled_from([ATTENTION, BLOCKS]))
    lengths = [length for length in range(blocks - first + 1) if length != 1 or method == ATTENTION]
    return {
        "method": method,
        "blocks_count": blocks,
        "steps_count": steps,
        "step_start": start,
        "step_interval": draw(st.integers(1, 5)),
        "step_end": draw(st.one_of(st.integers(start, steps + 2), st.just(10_000))),
        "block_start": first,
        "block_end": first + draw(st.sampled_from(lengths)),
    }


@settings(max_examples=250, deadline=None)
@given(values=configurations(), encoder=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_decisions_and_results_are_theirs(values: dict[str, Any], encoder: bool, dtype: torch.dtype) -> None:
    expected = outcome(theirs(**values), values, dtype=dtype, encoder=encoder)
    assert same(outcome(ours(**values), values, dtype=dtype, encoder=encoder), expected)
    if values["method"] == ATTENTION or values["step_end"] >= values["steps_count"] - 1:
        assert same(outcome(ours(legacy=False, **values), values, dtype=dtype, encoder=encoder), expected)


@pytest.mark.parametrize("blocks", [40, 30])
def test_the_walk_through_is_executed_as_often(blocks: int) -> None:
    values = asdict(CacheConfig(BLOCKS, blocks, 50, 20, 2, 47, 10, 30))
    expected = outcome(theirs(**values), values, runs=1)
    assert len(expected[1]) == 50 * blocks - 15 * 20
    assert same(outcome(ours(**values), values, runs=1), expected)
    assert len(outcome(ours(legacy=False, **values), values, runs=1)[1]) == 50 * blocks - 14 * 20


def test_the_configuration_has_their_arguments_and_defaults() -> None:
    parameters = [
        [(each.name, each.default) for each in inspect.signature(kind).parameters.values()]
        for kind in (CacheConfig, peer.module().CacheConfig)
    ]
    assert parameters[0] == parameters[1]


def raised(work: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as error:  # which one it is, the tests say
        work()
    return error.value


def assert_same_error(work: Callable[[Callable[..., Any]], object], *, words: bool = True) -> None:
    expected, found = raised(lambda: work(theirs)), raised(lambda: work(ours))
    assert type(found).__name__ == type(expected).__name__
    begin = str(expected).rstrip(".") if words else str(expected)[:40]
    assert str(found).startswith(begin), f"{found} does not begin as {expected}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "x"},
        {"method": None},
        {"blocks_count": 0},
        {"blocks_count": -1, "steps_count": 0},
        {"steps_count": 0},
        {"step_start": -1},
        {"step_interval": 0},
        {"block_start": -1},
        {"block_start": -1, "step_interval": 0},
        {"step_start": 3, "step_end": 2},
        {"block_start": 3, "block_end": 2},
        {"block_start": 3, "block_end": 2, "step_start": 3, "step_end": 2},
        {"block_end": 5},
        {"block_end": 10_000},
        {"method": ATTENTION, "step_start": 7, "step_end": 6},
    ],
)
def test_a_configuration_is_refused_in_their_words(wrong: dict[str, Any]) -> None:
    assert_same_error(lambda make: make(**{**LEGAL, **wrong}), words=wrong.keys() != {"method"})


@pytest.mark.parametrize("step_start", [0, 3])
@pytest.mark.parametrize("arguments", [{}, {"hidden_states": None}])
def test_a_call_without_its_tensor_is_refused_in_their_words(arguments: dict[str, Any], step_start: int) -> None:
    assert_same_error(lambda make: make(**{**LEGAL, "step_start": step_start}).apply(torch.cos, **arguments))


@pytest.mark.parametrize("interval", [1, 2])
def test_what_cannot_be_called_is_refused_in_their_words(interval: int) -> None:
    assert_same_error(
        lambda make: make(**{**LEGAL, "step_interval": interval}).apply(None, hidden_states=torch.ones(2))
    )


X = torch.ones(2)


@pytest.mark.parametrize("output", [(), (X, X, X), None, (X, None), (None, X), (X, X), [X, X]])
@pytest.mark.parametrize("block", [0, 1, 2, 3])
@pytest.mark.parametrize("step_start", [0, 1])
def test_an_output_is_refused_where_they_refuse_it(output: Any, block: int, step_start: int) -> None:
    """The range is blocks 1 and 2 of 4, in the first step: without `step_start` it is one whose results are kept."""

    def work(make: Callable[..., Any]) -> Any:
        agent = make(**{**LEGAL, "step_start": step_start, "block_start": 1, "block_end": 3})
        for index in range(4):
            given = output if index == block else X
            assert agent.apply(lambda hidden_states, given=given: given, hidden_states=X) is given

    try:
        work(theirs)
    except Exception:  # noqa: BLE001 - whatever it is, ours raises the same
        assert_same_error(work)
    else:
        work(ours)


@pytest.mark.parametrize("values", [{"block_start": 1, "block_end": 2}, {"block_start": 0, "block_end": 1}])
def test_a_range_of_one_block_is_their_error_and_not_ours(values: dict[str, Any]) -> None:
    agents = [make(**{**LEGAL, **values}) for make in (theirs, ours)]
    results = [
        [agent.apply(lambda h: h + 3, hidden_states=torch.full((1,), 10.0)).item() for _ in range(8)]
        for agent in agents
    ]
    reused = 4 + values["block_start"]
    assert results[0][reused] == 20.0  # the input once more instead of its change
    assert results[1] == [13.0] * 8


def test_blocks_that_overwrite_their_input_are_their_error_and_not_ours() -> None:
    results = []
    for agent in (theirs(**LEGAL), ours(**LEGAL)):
        for _ in range(2):
            x = torch.zeros(1)
            for _ in range(4):
                x = agent.apply(lambda h: h.add_(1), hidden_states=x)
            results.append(x.item())
    assert results == [4, 0, 4, 4]


def test_after_an_exception_theirs_is_out_of_step_and_ours_is_not() -> None:
    def broken(hidden_states: Tensor) -> Tensor:
        raise ZeroDivisionError

    found = []
    for make in (theirs, ours):
        agent = make(**LEGAL)
        agent.apply(torch.cos, hidden_states=torch.ones(2, 3, 5))
        with pytest.raises(ZeroDivisionError):
            agent.apply(broken, hidden_states=torch.ones(2, 3, 5))
        found.append(same(outcome(agent, LEGAL, runs=1), outcome(make(**LEGAL), LEGAL, runs=1)))
    assert found == [False, True]


@pytest.mark.parametrize("interval", [1, 2])
def test_blocks_that_they_can_call_are_called(interval: int) -> None:
    """By position with an interval of 2, by keyword with one of 1: ours takes both with either."""

    def other_name(x: Tensor, vec: float) -> Tensor:
        return x + vec

    def keyword(*, hidden_states: Tensor, vec: float) -> Tensor:
        return hidden_states + vec

    works = {1: keyword, 2: other_name}[interval]
    values = {**LEGAL, "step_interval": interval}
    expected = theirs(**values).apply(works, hidden_states=X, vec=2.0)
    for function in (keyword, other_name):
        assert torch.equal(ours(**values).apply(function, hidden_states=X, vec=2.0), expected)
    with pytest.raises(TypeError):
        theirs(**values).apply({1: other_name, 2: keyword}[interval], hidden_states=X, vec=2.0)
