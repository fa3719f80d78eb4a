"""Generations that do not go as planned: given up, of another shape or length, of branches, from two threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from agent_rules import Block, changed, configs, latents, naive, run, stack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dit_cache.agent import CacheAgent, CacheConfig
from dit_cache.errors import CacheWarning, GenerationError

BLOCKS = CacheConfig("dit_block_cache", 4, 8, step_interval=2, block_start=1, block_end=3)
ATTENTION = CacheConfig("attention_cache", 4, 8, step_interval=3)
BOTH = pytest.mark.parametrize("config", [BLOCKS, ATTENTION])


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def clean(agent: CacheAgent, config: CacheConfig) -> bool:
    """Whether a generation equals that of a fresh agent bit for bit."""
    blocks, inputs = stack(config), latents(config.steps_count)
    return equal(run(agent, config, blocks, inputs), naive(config, blocks, inputs))


def executed(agent: CacheAgent) -> int:
    return sum(calls.computed for calls in agent.calls)


class Broken(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise KeyboardInterrupt


@settings(max_examples=60, deadline=None)
@given(config=configs(), data=st.data())
def test_after_an_exception_in_a_block_a_generation_is_a_fresh_one(config: CacheConfig, data: st.DataObject) -> None:
    agent = CacheAgent(config)
    blocks, inputs = stack(config), latents(config.steps_count, seed=5)
    step, index = data.draw(st.integers(0, config.steps_count - 1)), data.draw(st.integers(0, config.blocks_count - 1))
    run(agent, config, blocks, inputs[:step])
    run(agent, config, blocks[:index], inputs[:1])
    broken = Broken()
    for _ in range(config.steps_count):  # where the block would be reused, until it is called
        try:
            run(agent, config, [broken], inputs[:1])
        except KeyboardInterrupt:
            break
    else:
        agent.reset()
    assert agent.bytes_held == 0
    assert clean(agent, config)


@BOTH
@pytest.mark.parametrize("done", [1, 5, 9, 17, 31])
def test_a_generation_that_is_given_up_leaves_nothing(config: CacheConfig, done: int) -> None:
    agent = CacheAgent(config)
    blocks, inputs = stack(config), latents(8, seed=5)

    def begin() -> None:
        run(agent, config, blocks, inputs[: done // 4])
        run(agent, config, blocks[: done % 4], inputs[:1])

    begin()
    agent.reset()
    assert agent.bytes_held == 0
    assert clean(agent, config)

    def given_up() -> None:
        with agent.generation():
            begin()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        given_up()
    assert agent.bytes_held == 0
    assert clean(agent, config)

    begin()
    with agent.generation():
        assert clean(agent, config)

    with (
        pytest.warns(CacheWarning, match=rf"before its 8 steps of 4 block calls: step .* and block {done % 4} "),
        agent.generation(),
    ):
        begin()
    assert clean(agent, config)


def test_a_generation_without_a_call_is_told_of_unless_nothing_is_cached() -> None:
    with pytest.warns(CacheWarning, match="no call came last"), CacheAgent(BLOCKS).generation():
        pass
    with CacheAgent(changed(BLOCKS, step_interval=1)).generation():
        pass


def test_after_an_exception_the_rest_of_the_generation_is_refused() -> None:
    agent = CacheAgent(BLOCKS)
    with agent.generation():
        with pytest.raises(KeyboardInterrupt):
            agent.apply(Broken(), hidden_states=torch.ones(1))
        for _ in range(2):
            with pytest.raises(GenerationError, match="An exception ended this generation"):
                agent.apply(torch.cos, hidden_states=torch.ones(1))
        agent.reset()
        assert clean(agent, BLOCKS)
    assert clean(agent, BLOCKS)


@BOTH
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 3, 6), (4, 3, 6), (2, 1, 6)])
def test_another_shape_begins_a_generation(config: CacheConfig, steps: int, shape: tuple[int, int, int]) -> None:
    agent = CacheAgent(config)
    blocks = stack(config)
    run(agent, config, blocks, latents(steps))
    inputs = latents(8, seed=3, shape=shape)
    with pytest.warns(CacheWarning, match=rf"changed from \[2, 3, 6\] to \[{shape[0]}, .* taken for the first block"):
        results = run(agent, config, blocks, inputs)
    assert equal(results, naive(config, blocks, inputs))
    assert clean(agent, config)  # a shape that changes between generations is nothing to speak of


def test_another_shape_in_mid_pass_begins_a_generation() -> None:
    agent, blocks = CacheAgent(BLOCKS), stack(BLOCKS)
    run(agent, BLOCKS, blocks, latents(3))
    run(agent, BLOCKS, blocks[:2], latents(1))
    inputs = latents(8, seed=3, shape=(1, 2, 6))
    with pytest.warns(CacheWarning, match="in step 3 of 8, block 2 of 4"):
        results = run(agent, BLOCKS, blocks, inputs)
    assert equal(results, naive(BLOCKS, blocks, inputs))


def test_calls_of_one_step_that_differ_in_shape_are_cached_and_not_guessed_about() -> None:
    agent = CacheAgent(changed(ATTENTION, blocks_count=2))
    shapes = [(2, 6), (3, 6)]
    for _ in range(8):
        for shape in shapes:
            assert agent.apply(torch.cos, torch.ones(shape)).shape == shape
    assert executed(agent) == 6
    for shape in shapes:
        agent.apply(torch.cos, torch.ones(shape))
    with pytest.raises(GenerationError, match=r"from \[2, 6\] to \[3, 6\].*call reset\(\)"):
        agent.apply(torch.cos, torch.ones(3, 6))
    assert agent.apply(torch.cos, torch.ones(5)).shape == (5,)


def test_another_shape_inside_a_declared_generation_is_refused() -> None:
    agent = CacheAgent(BLOCKS)
    with agent.generation():
        agent.apply(torch.cos, hidden_states=torch.ones(2))
        with pytest.raises(GenerationError, match="The shape of hidden_states changed"):
            agent.apply(torch.cos, hidden_states=torch.ones(3))
    assert clean(agent, BLOCKS)


def test_a_text_of_another_length_in_the_second_pass_is_not_cached_silently() -> None:
    agent = CacheAgent(BLOCKS)

    def step(value: float) -> None:
        for length in (3, 5):
            e = torch.full((length,), value)
            for _ in range(4):
                h, _ = agent.apply(
                    lambda h, e: (h * 0 + e.sum(), e), hidden_states=torch.zeros(1), encoder_hidden_states=e
                )
                assert h == length * value

    with pytest.warns(CacheWarning, match=r"encoder_hidden_states changed .* branches=\('cond', 'uncond'\)"):
        step(0.0)
    for value in (1.0, 2.0):
        with pytest.warns(CacheWarning):
            step(value)


@settings(max_examples=80, deadline=None)
@given(config=configs(), steps=st.integers(1, 24))
def test_another_number_of_steps_keeps_the_share_that_is_cached(config: CacheConfig, steps: int) -> None:
    agent = CacheAgent(config)
    blocks, inputs = stack(config), latents(steps)
    start = next(step for step in range(10**4) if step / steps >= config.step_start / config.steps_count)
    after_end = max(step for step in range(10**4) if step / steps <= (config.step_end + 1) / config.steps_count)
    with agent.generation(steps=steps):
        results = run(agent, config, blocks, inputs)
        table = agent.calls
    if start >= after_end or agent.calls == ():
        assert all(calls.skipped == 0 for calls in table)
        scaled = changed(config, step_interval=1, steps_count=steps)
    else:
        scaled = changed(config, steps_count=steps, step_start=start, step_end=max(start, after_end - 1))
    assert equal(results, naive(scaled, blocks, inputs))
    assert clean(agent, config)  # and only this one was


def test_a_generation_may_begin_at_a_later_step() -> None:
    agent = CacheAgent(changed(BLOCKS, step_interval=3))
    with agent.generation(first_step=4):
        run(agent, BLOCKS, stack(BLOCKS), latents(4))
    assert [(calls.step, calls.skipped) for calls in agent.calls] == [(4, 0), (5, 0), (6, 0), (7, 2)]


@pytest.mark.parametrize(("steps", "first_step"), [(0, 0), (-1, 0), (4, 4), (4, -1), (None, 8)])
def test_a_generation_of_no_steps_is_refused(steps: int | None, first_step: int) -> None:
    agent = CacheAgent(BLOCKS)
    with pytest.raises(GenerationError, match="legal are 0 <= first_step < steps"):
        agent.generation(steps=steps, first_step=first_step).__enter__()
    assert clean(agent, BLOCKS)


def test_generations_are_not_nested() -> None:
    agent = CacheAgent(BLOCKS)
    with agent.generation():
        with pytest.raises(GenerationError, match="cannot be nested"):
            agent.generation().__enter__()
        assert clean(agent, BLOCKS)


def passes(agent: CacheAgent, config: CacheConfig, named: bool) -> dict[str, list[Tensor]]:
    """One generation of two branches, each with its own inputs."""
    blocks = stack(config)
    results: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    inputs = {"cond": latents(8, seed=1), "uncond": latents(8, seed=2, shape=(2, 5, 6))}
    for step in range(8):
        for name in results:
            if named:
                with agent.branch(name):
                    results[name] += run(agent, config, blocks, inputs[name][step : step + 1])
            else:
                results[name] += run(agent, config, blocks, inputs[name][step : step + 1])
    return results


@BOTH
@pytest.mark.parametrize("named", [False, True])
def test_branches_do_not_mix(config: CacheConfig, named: bool) -> None:
    agent = CacheAgent(config, branches=("cond", "uncond"))
    for _ in range(2):
        with agent.generation():
            inside = passes(agent, config, named)
        for results in (inside, passes(agent, config, named)):
            assert equal(results["cond"], naive(config, stack(config), latents(8, seed=1)))
            assert equal(results["uncond"], naive(config, stack(config), latents(8, seed=2, shape=(2, 5, 6))))
        assert len(agent.calls) == 16
        assert {calls.branch for calls in agent.calls} == {"cond", "uncond"}
        assert agent.bytes_held == 0


def test_branches_may_take_turns_block_by_block() -> None:
    agent, blocks = CacheAgent(BLOCKS, branches=("cond", "uncond")), stack(BLOCKS)
    inputs = {"cond": latents(8, seed=1), "uncond": latents(8, seed=2)}
    for step in range(8):
        x = {name: each[step] for name, each in inputs.items()}
        for block in blocks:
            for name in x:
                with agent.branch(name):
                    x[name] = agent.apply(block, hidden_states=x[name])
        for name, each in inputs.items():
            assert torch.equal(x[name], naive(BLOCKS, blocks, each)[step])


@BOTH
def test_a_branch_that_is_left_out_in_some_steps_stays_in_step(config: CacheConfig) -> None:
    """Guidance in steps 2 to 5 only: what the branch kept before the latest refresh is not used."""
    agent, blocks, inputs = CacheAgent(config, branches=("cond", "uncond")), stack(config), latents(8)
    reused = set()
    for step in range(8):
        with agent.branch("cond"):
            run(agent, config, blocks, inputs[step : step + 1])
        if 2 <= step <= 5:
            with agent.branch("uncond"):
                run(agent, config, blocks, inputs[step : step + 1])
    for calls in agent.calls:
        reused |= {(calls.branch, calls.step)} if calls.skipped else set()
    kept = {3, 5} if config is BLOCKS else {4, 5}
    assert {step for branch, step in reused if branch == "uncond"} == kept
    assert {step for branch, step in reused if branch == "cond"} == (
        {1, 3, 5, 7} if config is BLOCKS else {1, 2, 4, 5, 7}
    )
    assert agent.bytes_held == 0


def test_a_branch_that_falls_silent_holds_nothing() -> None:
    agent, blocks = CacheAgent(BLOCKS, branches=2), stack(BLOCKS)
    for name in "01":
        with agent.branch(name):
            run(agent, BLOCKS, blocks, latents(1))
    assert agent.bytes_held == agent.bytes_for((2, 3, 6), torch.float32)
    with agent.branch("0"):
        run(agent, BLOCKS, blocks, latents(2))
    assert agent.bytes_held == agent.bytes_for((2, 3, 6), torch.float32) / 2


@BOTH
def test_guidance_may_be_off(config: CacheConfig) -> None:
    agent = CacheAgent(config, branches=("cond", "uncond"))
    with agent.generation(), agent.branch("cond"):
        assert clean(agent, config)


@BOTH
def test_one_undeclared_agent_for_two_branches_is_refused_in_a_generation(config: CacheConfig) -> None:
    agent, blocks, inputs = CacheAgent(config), stack(config), latents(8)

    def generate() -> None:
        with agent.generation():
            for step in range(8):
                for _ in range(2):
                    run(agent, config, blocks, inputs[step : step + 1])

    with pytest.raises(
        GenerationError, match=r"8 steps of 4 block calls, and one more .*branches=\('cond', 'uncond'\)"
    ):
        generate()
    assert clean(agent, config)


def test_branches_that_are_not_declared_or_mixed_are_refused() -> None:
    agent = CacheAgent(BLOCKS, branches=("cond", "uncond"))
    with pytest.raises(GenerationError, match="'neg' was not declared; declared are 'cond', 'uncond'"):
        agent.branch("neg").__enter__()
    with agent.branch("cond"):
        calls_of_blocks(agent, 4)
    with pytest.raises(GenerationError, match="are mixed"):
        calls_of_blocks(agent, 1)


def calls_of_blocks(agent: CacheAgent, count: int) -> None:
    for _ in range(count):
        agent.apply(torch.cos, hidden_states=torch.ones(2))


def in_a_thread(work: Callable[[], object]) -> BaseException | None:
    """Run it in another thread and return what it raised."""
    raised: list[BaseException] = []

    def target() -> None:
        try:
            work()
        except GenerationError as error:
            raised.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@BOTH
@pytest.mark.parametrize("done", [1, 3])
def test_another_thread_is_refused_and_does_no_harm(config: CacheConfig, done: int) -> None:
    agent, blocks, inputs = CacheAgent(config, branches=("a",)), stack(config), latents(8)
    results = run(agent, config, blocks, inputs[:done])
    for work in (
        lambda: run(agent, config, blocks, inputs[:1]),
        lambda: agent.generation().__enter__(),
        lambda: agent.branch("a").__enter__(),
    ):
        error = in_a_thread(work)
        assert error is not None
        assert "agent of its own" in str(error)
    results += run(agent, config, blocks, inputs[done:])
    assert equal(results, naive(config, blocks, inputs))


@BOTH
def test_threads_may_take_turns(config: CacheConfig) -> None:
    agent = CacheAgent(config)
    for _ in range(2):
        assert clean(agent, config)
        assert in_a_thread(lambda: run(agent, config, stack(config), latents(8))) is None
        run(agent, config, stack(config), latents(2))
        agent.reset()


def test_a_warning_that_is_an_error_leaves_a_clean_agent() -> None:
    agent = CacheAgent(BLOCKS)
    agent.apply(torch.cos, hidden_states=torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CacheWarning):
            agent.apply(torch.cos, hidden_states=torch.ones(3))
    assert clean(agent, BLOCKS)


def test_a_training_graph_goes_through_what_is_reused() -> None:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(4)]
    agent = CacheAgent(BLOCKS)
    x, y = (x.requires_grad_() for x in latents(2))
    expected = naive(BLOCKS, list(blocks), [x, y])[1].sum()
    result = run(agent, BLOCKS, list(blocks), [x, y])[1].sum()
    leaves = [x, y, *(parameter for block in blocks for parameter in block.parameters())]
    for ours, theirs in zip(torch.autograd.grad(result, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
