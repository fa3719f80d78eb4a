"""What the agent computes and what it reuses, compared with the rules restated as plain loops."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agent_rules import WIDTH, Block, changed, configs, latents, naive, nothing_cached, reused, run, stack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dit_cache.agent import CacheAgent, CacheConfig
from dit_cache.errors import ConfigError, ModelExecError, ParametersInvalid

BLOCKS = CacheConfig("dit_block_cache", 4, 6, step_interval=2, block_start=1, block_end=3)
ATTENTION = CacheConfig("attention_cache", 4, 6, step_interval=2)
WALK_THROUGH = CacheConfig("dit_block_cache", 40, 50, 20, 2, 47, 10, 30)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@settings(max_examples=300, deadline=None)
@given(config=configs(), legacy=st.booleans())
def test_decisions_and_results_are_the_rules(config: CacheConfig, legacy: bool) -> None:
    if legacy and config.method == "dit_block_cache" and config.block_end == 10_000:
        config = changed(config, block_end=config.blocks_count)
        if config.block_end < config.block_start:
            return
    blocks, inputs = stack(config), latents(config.steps_count)
    agent = CacheAgent(config, legacy=legacy)
    for _ in range(2):  # the second generation meets nothing of the first
        assert equal(run(agent, config, blocks, inputs), naive(config, blocks, inputs, legacy))
        assert agent.bytes_held == 0
        if nothing_cached(config):
            assert agent.calls == ()
            continue
        for calls in agent.calls:
            skipped = sum(reused(config, calls.step, block, legacy) for block in range(config.blocks_count))
            assert (calls.skipped, calls.computed) == (skipped, config.blocks_count - skipped)
        assert [calls.step for calls in agent.calls] == list(range(config.steps_count))


@settings(max_examples=60, deadline=None)
@given(config=configs(), interval=st.booleans())
def test_what_is_all_computed_is_the_model_bit_for_bit(config: CacheConfig, interval: bool) -> None:
    config = changed(config, **({"step_interval": 1} if interval else {"step_start": 50, "step_end": 60}))
    blocks, inputs = stack(config), latents(config.steps_count)
    none = changed(config, step_interval=1)
    assert equal(run(CacheAgent(config), config, blocks, inputs), naive(none, blocks, inputs))


@pytest.mark.parametrize(("legacy", "executed"), [(True, 1700), (False, 1720)])
def test_the_walk_through_executes_what_is_documented(legacy: bool, executed: int) -> None:
    blocks = stack(WALK_THROUGH)
    agent = CacheAgent(WALK_THROUGH, legacy=legacy)
    run(agent, WALK_THROUGH, blocks, latents(50))
    assert sum(block.called for block in blocks if isinstance(block, Block)) == executed
    assert sum(calls.computed for calls in agent.calls) == executed
    assert sum(calls.skipped for calls in agent.calls) == 2000 - executed
    skipping = [calls.step for calls in agent.calls if calls.skipped]
    assert skipping == list(range(21, 50 if legacy else 48, 2))


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        out: Tensor = x + vec * self.linear(self.norm(x))
        return out


@pytest.mark.parametrize("compiled", [False, True])
def test_the_call_of_the_walk_through(compiled: bool) -> None:
    """The block's first parameter is not named hidden_states; computed and bypassed steps call it all the same."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Modulated() for _ in range(4)).requires_grad_(False)
    called = [torch.compile(block, backend="eager") if compiled else block for block in blocks]
    vec = torch.randn(2, 1, WIDTH)
    for config in (BLOCKS, changed(BLOCKS, step_interval=1)):
        cache = CacheAgent(config)
        delta = entry = torch.empty(0)
        for step, x in enumerate(latents(6)):
            expected = x
            for index, block in enumerate(called):
                first, last = index == config.block_start, index == config.block_end - 1
                if reused(config, step, index):
                    expected = expected + delta if first else expected
                else:
                    entry = expected if first else entry
                    expected = blocks[index](expected, vec)
                    delta = expected - entry if last else delta
                x = cache.apply(block, hidden_states=x, vec=vec)
            assert torch.equal(x, expected)


def by_name(hidden_states: Tensor, vec: Tensor) -> Tensor:
    return hidden_states + vec


def keyword_only(*, vec: Tensor, hidden_states: Tensor) -> Tensor:
    return hidden_states + vec


def not_first(vec: Tensor, hidden_states: Tensor) -> Tensor:
    return hidden_states - 2 * hidden_states + hidden_states + (hidden_states + vec)


def other_name(x: Tensor, /, vec: Tensor) -> Tensor:
    return x + vec


def anything(*args: Tensor, **kwargs: Tensor) -> Tensor:
    return args[0] + kwargs["vec"]


def keywords(**kwargs: Tensor) -> Tensor:
    return kwargs["hidden_states"] + kwargs["vec"]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("function", [by_name, keyword_only, not_first, other_name, anything, keywords])
def test_one_way_of_calling_serves_all_blocks(function: Callable[..., Tensor], interval: int) -> None:
    agent = CacheAgent(changed(BLOCKS, step_interval=interval))
    result = agent.apply(function, hidden_states=torch.ones(3), vec=torch.full((3,), 2.0))
    assert torch.equal(result, torch.full((3,), 3.0))


@pytest.mark.parametrize("interval", [1, 2])
def test_two_streams_and_more_arguments_are_called_likewise(interval: int) -> None:
    def streams(x: Tensor, context: Tensor, vec: int) -> tuple[Tensor, Tensor]:
        return x + vec, context - vec

    def mixed(hidden_states: Tensor, context: Tensor, vec: int) -> tuple[Tensor, Tensor]:
        return streams(hidden_states, context, vec)

    def extra(x: Tensor, vec: int, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        return streams(x, kwargs["encoder_hidden_states"], vec)

    x, e = torch.ones(2), torch.zeros(3)
    for function in (streams, mixed):
        agent = CacheAgent(changed(BLOCKS, step_interval=interval))
        hidden, encoder = agent.apply(function, 5, hidden_states=x, encoder_hidden_states=e)
        assert hidden.tolist() == [6, 6]
        assert encoder.tolist() == [-5, -5, -5]
    agent = CacheAgent(changed(BLOCKS, step_interval=interval))
    assert agent.apply(extra, hidden_states=x, encoder_hidden_states=e, vec=5)[0].tolist() == [6, 6]
    assert agent.apply(torch.neg, hidden_states=x).tolist() == [-1, -1]
    with pytest.raises(TypeError, match="vec"):
        agent.apply(streams, hidden_states=x, encoder_hidden_states=e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_range", [(0, 1), (3, 4), (1, 3), (0, 4)])
def test_a_block_may_overwrite_its_input(block_range: tuple[int, int], dtype: torch.dtype) -> None:
    config = changed(BLOCKS, block_start=block_range[0], block_end=block_range[1], step_interval=3)

    def run_steps(block: Callable[[Tensor], Tensor]) -> list[Tensor]:
        agent = CacheAgent(config)
        results = []
        for x in latents(6):
            x = x.to(dtype)
            for _ in range(4):
                x = agent.apply(block, hidden_states=x)
            results.append(x.clone())
        return results

    results = run_steps(lambda h: h.mul(1.5).add(0.25))
    assert equal(run_steps(lambda h: h.mul_(1.5).add_(0.25)), results)
    delta = results[0] - latents(6)[0].to(dtype)
    if block_range == (0, 4):
        assert torch.equal(results[1], latents(6)[1].to(dtype) + delta)
        assert not torch.equal(results[1], results[0])


@pytest.mark.parametrize("pair", ["tuple", "list", "one"])
def test_streams_come_back_in_the_form_in_which_they_went(pair: str) -> None:
    def block(x: Tensor, e: Tensor) -> Any:
        return {"tuple": (x + 1, e + 2), "list": [x + 1, e + 2], "one": (x + 1,)}[pair]

    agent = CacheAgent(BLOCKS)
    x, e = torch.zeros(2), torch.zeros(5)
    for step in range(2):
        for index in range(4):
            result = agent.apply(block, hidden_states=x, encoder_hidden_states=e)
            if step and index == 1:
                assert isinstance(result, tuple)
                assert [part.unique().tolist() for part in result] == ([[1]] if pair == "one" else [[1], [2]])
            if step and index == 2:
                assert result[0] is x


def test_skipped_blocks_return_their_input_itself() -> None:
    agent = CacheAgent(changed(BLOCKS, block_start=0, block_end=4))
    x = torch.ones(3)
    for _ in range(5):
        agent.apply(torch.exp, hidden_states=x)
    assert all(agent.apply(torch.exp, hidden_states=x) is x for _ in range(3))


def test_a_delta_of_another_dtype_is_promoted() -> None:
    agent = CacheAgent(changed(BLOCKS, block_start=0, block_end=4))
    x = torch.tensor([1000.0], dtype=torch.float16)
    results = [agent.apply(lambda h: h.float() + 0.001, hidden_states=x) for _ in range(5)]
    assert results[4].dtype == torch.float32
    assert torch.equal(results[4], x + (results[3] - x))


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_an_attention_output_belongs_to_its_caller(interval: int) -> None:
    agent = CacheAgent(changed(ATTENTION, blocks_count=1, step_interval=interval))

    def attention(x: Tensor) -> dict[str, Any]:
        return {"out": (x * 2, [x + 1, "label"])}

    for step in range(6):
        fresh = step - step % interval
        out, (second, label) = agent.apply(attention, torch.full((2,), float(step)))["out"]
        assert out.tolist() == [2 * fresh] * 2
        assert second.tolist() == [fresh + 1] * 2
        assert label == "label"
        out.zero_()
        second.zero_()


@settings(max_examples=100, deadline=None)
@given(config=configs(), branches=st.integers(1, 3), legacy=st.booleans(), two_streams=st.booleans())
def test_bytes_announced_are_bytes_held(config: CacheConfig, branches: int, legacy: bool, two_streams: bool) -> None:
    if legacy and config.method == "dit_block_cache":
        config = changed(config, block_start=0, block_end=config.blocks_count)
    agent = CacheAgent(config, legacy=legacy, branches=branches)
    x, e = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
    streams = {"hidden_states": x, **({"encoder_hidden_states": e} if two_streams else {})}
    peak = 0

    def block(h: Tensor, e: Tensor | None = None) -> Any:
        nonlocal peak
        peak = max(peak, agent.bytes_held)
        return h + 1 if e is None or config.method == "attention_cache" else (h + 1, e + 1)

    def attention(*, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Any:
        return block(hidden_states)

    for _ in range(config.steps_count * config.blocks_count * branches):
        agent.apply(attention if config.method == "attention_cache" else block, **streams)
        peak = max(peak, agent.bytes_held)
    assert peak == agent.bytes_for(x.shape, x.dtype, e.shape if two_streams else None)
    assert agent.bytes_held == 0


@pytest.mark.parametrize("config", [BLOCKS, ATTENTION])
def test_tensors_are_dropped_at_their_last_use(config: CacheConfig) -> None:
    agent = CacheAgent(changed(config, steps_count=50, step_interval=2, step_end=3))
    held = []
    for _ in range(50 * 4):
        agent.apply(torch.cos, **{"hidden_states" if config is BLOCKS else "input": torch.ones(10)})
        held.append(agent.bytes_held)
    last_use = 3 * 4 + (config.block_start if config is BLOCKS else 3)
    assert held[last_use - 1] == 40
    assert not any(held[last_use:])


def test_nothing_of_the_input_is_held_beyond_its_call() -> None:
    agent = CacheAgent(BLOCKS)
    x = torch.ones(4)
    gone = weakref.ref(x)
    for _ in range(2):
        agent.apply(torch.cos, hidden_states=x)
    del x
    gc.collect()
    assert gone() is None


def test_an_agent_is_copied_with_its_model() -> None:
    blocks, inputs = stack(BLOCKS), latents(6)
    twin = copy.deepcopy(CacheAgent(BLOCKS))
    assert equal(run(twin, BLOCKS, blocks, inputs), naive(BLOCKS, blocks, inputs))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "x"}, "Method 'x' is not supported"),
        ({"method": ["attention_cache"]}, "not supported"),
        ({"blocks_count": 0}, "The 'blocks_count' in config must > 0, but got 0"),
        ({"steps_count": -2}, "The 'steps_count' in config must > 0"),
        ({"step_start": -1}, "The 'step_start' in config must >= 0"),
        ({"step_interval": 0}, "The 'step_interval' in config must > 0"),
        ({"block_start": -1}, "The 'block_start' in config must >= 0"),
        ({"step_start": 3, "step_end": 2}, "The 'step_end' must >= 'step_start', but got 2 and 3"),
        ({"block_start": 3, "block_end": 2}, "The 'block_end' must >= 'block_start', but got 2 and 3"),
        ({"block_end": 5}, "The 'block_end' must <= 'blocks_count', but got 5 and 4"),
        ({"blocks_count": 4.0}, "'blocks_count' in config must be an int, but got 4.0 of float"),
        ({"steps_count": "6"}, "'steps_count' in config must be an int"),
        ({"step_end": None}, "'step_end' in config must be an int"),
        ({"step_interval": True}, "'step_interval' in config must be an int"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_config_that_cannot_be_used_is_refused(values: dict[str, Any], message: str, legacy: bool) -> None:
    config = changed(BLOCKS, **values)  # making it is no error
    with pytest.raises(ConfigError, match=message) as raised:
        CacheAgent(config, legacy=legacy)
    assert str(raised.value).startswith("[MIE06E000002] Config parameter err. ")
    assert isinstance(raised.value, ValueError)


def test_defaults_are_the_documented_ones() -> None:
    config = CacheConfig("dit_block_cache", 4, 6)
    assert config == CacheConfig("dit_block_cache", 4, 6, 0, 1, 10000, 0, 10000)
    CacheAgent(config)
    with pytest.raises(ConfigError, match=r"10000 and 4\. Give block_end=4"):
        CacheAgent(config, legacy=True)
    with pytest.raises(ConfigError, match=r"dit_cache.CacheConfig, but got dict"):
        CacheAgent({"method": "dit_block_cache"})  # type: ignore[arg-type]


@pytest.mark.parametrize("branches", [0, -1, (), ("a", "a"), "cond", (1, 2)])
def test_branches_that_cannot_be_told_apart_are_refused(branches: Any) -> None:
    with pytest.raises(ConfigError, match="legal are a number > 0 and different names"):
        CacheAgent(BLOCKS, branches=branches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Cannot find 'hidden_states' in kwargs"),
        ({"hidden_states": None}, "Input 'hidden_states' is None"),
        ({"hidden_states": [1.0]}, "Input 'hidden_states' must be a Tensor, but got list"),
    ],
)
def test_a_call_without_its_tensors_is_refused(arguments: dict[str, Any], message: str) -> None:
    agent = CacheAgent(BLOCKS)
    with pytest.raises(ParametersInvalid, match=message) as raised:
        agent.apply(torch.cos, **arguments)
    assert str(raised.value).startswith("[MIE06E000001] Parameters invalid. [DiTBlockCache]: ")


@pytest.mark.parametrize("interval", [1, 2])
def test_what_cannot_be_called_is_refused(interval: int) -> None:
    with pytest.raises(ParametersInvalid, match=r"Input function must be callable\."):
        CacheAgent(changed(BLOCKS, step_interval=interval)).apply(3, hidden_states=torch.ones(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ((), ModelExecError, "output count of cache function must be 1 or 2, but got 0"),
        ([torch.ones(2)] * 3, ModelExecError, "must be 1 or 2, but got 3"),
        (None, ModelExecError, "The output of cache function is None"),
        ((torch.ones(2), None), ModelExecError, "The output of cache function is None"),
        ({"a": 1}, ModelExecError, "must be Tensors, but got dict"),
        (torch.ones(3), ModelExecError, r"as \[2\] and came out as \[3\]"),
        ((torch.ones(2), torch.ones(2)), ParametersInvalid, "'encoder_hidden_states' is required"),
    ],
)
def test_an_output_that_cannot_be_kept_is_refused(output: Any, error: type[Exception], message: str) -> None:
    agent = CacheAgent(changed(BLOCKS, block_start=0, block_end=1))
    with pytest.raises(error, match=message):
        agent.apply(lambda h: output, hidden_states=torch.ones(2))
    assert agent.bytes_held == 0


def test_a_second_stream_that_is_not_given_any_more_is_missed() -> None:
    agent = CacheAgent(BLOCKS)
    x = torch.ones(2)
    for _ in range(5):
        agent.apply(lambda h, e: (h, e), hidden_states=x, encoder_hidden_states=x)
    with pytest.raises(ParametersInvalid, match="'encoder_hidden_states' is required"):
        agent.apply(lambda h: h, hidden_states=x)
