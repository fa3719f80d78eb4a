"""Generations of a cache in a model: how they begin, end, and are cut off; and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import Block, InPlaceToy, TextToy, Toy, counting, inputs, make, naive

from dit_cache.engine.attaching import attach
from dit_cache.engine.blocks import BlockCache
from dit_cache.engine.policies import Always, Static
from dit_cache.engine.predictors import Secant
from dit_cache.errors import CacheWarning, ConfigError, GenerationError, ModelExecError, ParametersInvalid

STEPS = 6
COMPUTED = (0, 2, 3)
Calls = list[tuple[Tensor, Tensor]]


def run(model: Callable[..., Tensor], calls: Calls) -> list[Tensor]:
    return [model(latents.clone(), time) for latents, time in calls]


def said(cache: BlockCache, model: Callable[..., Tensor], calls: Calls) -> list[Tensor]:
    outputs = []
    with cache.generation(len(calls)):
        for step, call in enumerate(calls):
            with cache.at(step):
                outputs += run(model, [call])
    return outputs


def counted(cache: BlockCache, model: Callable[..., Tensor], calls: Calls) -> list[Tensor]:
    with cache.generation(len(calls)):
        return run(model, calls)


def by_itself(cache: BlockCache, model: Callable[..., Tensor], calls: Calls) -> list[Tensor]:
    return run(model, calls)


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


class Trap:
    """Raises in the middle of a block, once it is armed."""

    def __init__(self, model: Toy, error: type[BaseException]) -> None:
        self.armed, self.error = False, error
        model.blocks[2].ff.register_forward_pre_hook(self._spring)  # type: ignore[union-attr]

    def _spring(self, *_: Any) -> None:
        if self.armed:
            self.armed = False
            raise self.error("sprung")


class TestEnds:
    @pytest.mark.parametrize("way", [said, counted, by_itself])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("what", ["stack", "attention"])
    def test_after_an_error_all_is_as_in_a_new_cache(self, way: Any, error: type[BaseException], what: Any) -> None:
        model, calls = make(InPlaceToy), inputs(STEPS)
        with attach(model, Static(COMPUTED), what=what, steps=STEPS) as cache:
            expected = way(cache, model, calls)
        trap = Trap(model, error)
        with attach(model, Static(COMPUTED), what=what, steps=STEPS) as cache:

            def spring(latents: Tensor, time: Tensor) -> Tensor:
                trap.armed = bool(time < 0.6)
                return model(latents, time)  # type: ignore[no-any-return]

            with pytest.raises(error, match="sprung"):
                way(cache, spring, calls)
            trap.armed = False
            if error is ValueError:
                assert cache.bytes_held == 0
            assert equal(way(cache, model, calls), expected)

    def test_it_ends_although_the_error_is_caught_within(self) -> None:
        model, calls = make(), inputs(STEPS)
        trap = Trap(model, ValueError)
        with attach(model, Static(COMPUTED)) as cache, cache.generation(STEPS):
            run(model, calls[:1])
            trap.armed = True
            with pytest.raises(ValueError, match="sprung"):
                run(model, calls[1:3])
            assert cache.bytes_held == 0
            plain = run(model, calls[1:2])
        assert equal(plain, run(model, calls[1:2]))

    def test_counted_generations_begin_and_end_by_themselves(self) -> None:
        model, calls = make(), inputs(STEPS)
        expected = naive(model, calls, COMPUTED)
        with attach(model, Static(COMPUTED), steps=[0.9, 0.7, 0.5, 0.4, 0.2, 0.1, 0.0]) as cache:
            for _ in range(2):
                assert equal(run(model, calls), expected)
                assert cache.bytes_held == 0
                assert [entry.step for entry in cache.ledger.entries] == list(range(STEPS))

    def test_without_a_generation_nothing_is_cached(self) -> None:
        model, calls = make(), inputs(STEPS)
        expected = run(model, calls)
        with attach(model, Static(COMPUTED)) as cache:
            assert equal(run(model, calls), expected)
            assert cache.bytes_held == 0
            assert not cache.ledger.entries

    def test_another_shape_begins_another_generation(self) -> None:
        model, calls, others = make(), inputs(STEPS), inputs(STEPS, batch=1)
        with attach(model, Static(COMPUTED), steps=STEPS) as cache:
            run(model, calls[:2])
            with pytest.warns(CacheWarning, match="after 2 calls"):
                first = run(model, others[:1])
            assert equal(first + run(model, others[1:]), naive(model, others, COMPUTED))
            run(model, calls[:2])
            cache.reset()
            assert equal(run(model, others), naive(model, others, COMPUTED))

    @pytest.mark.parametrize("what", ["stack", "attention"])
    @pytest.mark.parametrize("way", [said, counted])
    def test_within_a_generation_the_shape_stays(self, what: Any, way: Any) -> None:
        model = make()
        with (
            attach(model, Static(COMPUTED), what=what) as cache,
            pytest.raises(GenerationError, match="a generation for each shape"),
        ):
            way(cache, model, inputs(STEPS)[:1] + inputs(STEPS, batch=1)[1:])

    def test_the_number_of_steps_may_change(self) -> None:
        model = make()
        with attach(model, Static(COMPUTED)) as cache:
            for steps in (6, 4, 9):
                calls = inputs(steps)
                assert equal(said(cache, model, calls), naive(model, calls, COMPUTED))


class TestBranches:
    def test_each_side_is_cached_for_itself(self) -> None:
        model = make()
        sides = {"cond": inputs(STEPS), "uncond": inputs(STEPS, length=4)}
        expected = {side: naive(model, calls, COMPUTED) for side, calls in sides.items()}
        order = [(step, side) for step in range(STEPS) for side in sides]
        with attach(model, Static(COMPUTED), branches=tuple(sides), steps=STEPS) as cache:
            for step, side in order:  # counted
                assert equal(run(model, [sides[side][step]]), [expected[side][step]])
            assert cache.bytes_held == 0
            with cache.generation(STEPS):
                for step, side in order:
                    if step != 1 or side == "cond":  # guidance left out in a step: it is a hole anyway
                        with cache.at(step, side):
                            assert equal(run(model, [sides[side][step]]), [expected[side][step]])
            assert len(cache.ledger.entries) == 2 * STEPS - 1

    def test_one_call_too_many(self) -> None:
        model, calls = make(), inputs(2)
        with attach(model, Always()) as cache, cache.generation(2):
            run(model, calls)
            with pytest.raises(GenerationError, match="branch of its own"):
                run(model, calls)

    def test_a_policy_may_decide_once_for_all(self) -> None:
        asked = []

        class Once(Always):
            once = True

            def decide(self, at: Any, seen: Any) -> Any:
                asked.append(at.branch)
                return super().decide(at, seen)

        model = make()
        with attach(model, Once(), branches=("cond", "uncond"), steps=2):
            run(model, inputs(2)[:1] * 4)
        assert asked == ["cond", "cond"]


class TestTwoModels:
    @pytest.mark.parametrize("way", [said, counted, by_itself])
    @pytest.mark.parametrize("what", ["stack", "attention"])
    def test_nothing_is_predicted_across_the_boundary(self, way: Any, what: Any) -> None:
        high, low, calls = make(), make(seed=1), inputs(STEPS)
        computed = Static([0, 2])
        with attach(high, computed, what=what) as cache:
            expected = said(cache, high, calls)[:4]
        with attach(low, computed, what=what) as cache:
            expected += said(cache, low, calls[4:])
        with attach([high, low], computed, what=what, steps=STEPS) as cache:
            held = []

            def model(latents: Tensor, time: Tensor) -> Tensor:
                output: Tensor = (high if time > 0.4 else low)(latents, time)
                held.append(cache.bytes_held)
                return output

            assert equal(way(cache, model, calls), expected)
            reasons = [entry.reason for entry in cache.ledger.entries]
            assert reasons == ["planned", "hole", "planned", "hole", "nothing kept", "hole"]
            assert max(held) <= cache.bytes_for((2, 6, 8))

    def test_a_moment_can_name_its_model(self) -> None:
        high, low, (call, *_) = make(), make(seed=1), inputs(2)
        with attach([high, low], Always()) as cache, cache.generation(2):
            with cache.at(0, model=high):
                high(*call)
            with (
                pytest.raises(ParametersInvalid, match="no cache is attached to this model"),
                cache.at(1, model=make()),
            ):
                raise AssertionError
            with pytest.raises(GenerationError, match="called twice"), cache.at(1, model=high):
                low(*call)


class TestRefused:
    @pytest.mark.parametrize("policy", [Always(), Static([0])])
    def test_two_calls_in_one_moment(self, policy: Any) -> None:
        model, calls = make(), inputs(2)
        with attach(model, policy) as cache:
            with pytest.raises(GenerationError, match="called twice"), cache.generation(2), cache.at(0):
                run(model, calls)
            with pytest.raises(GenerationError, match="inside another"), cache.generation(2), cache.at(0), cache.at(1):
                raise AssertionError

    def test_moments_that_are_none(self) -> None:
        model, calls = make(), inputs(2)
        with attach(model, Always()) as cache:
            with pytest.raises(GenerationError, match="no generation"), cache.at(0):
                raise AssertionError
            with cache.generation(2):
                with cache.at(0):
                    pass  # no model was called: nothing was done
                with cache.at(0):
                    run(model, calls[:1])
                with pytest.raises(GenerationError, match="1 are done"), cache.at(0):
                    raise AssertionError

    @pytest.mark.parametrize("way", ["said", "counted", "steps"])
    def test_another_thread(self, way: str) -> None:
        model, calls = make(), inputs(STEPS)
        refused: list[BaseException] = []

        def intrude() -> None:
            try:
                model(*calls[0])
            except GenerationError as error:
                refused.append(error)

        def interrupted(latents: Tensor, time: Tensor) -> Tensor:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
            return Block.forward(model.blocks[2], latents, time)  # type: ignore[arg-type]

        model.blocks[2].forward = interrupted
        expected = naive(make(), calls, COMPUTED)
        with attach(model, Static(COMPUTED), steps=STEPS) as cache:
            outputs = {"said": said, "counted": counted, "steps": by_itself}[way](cache, model, calls)
        assert equal(outputs, expected)
        assert len(refused) == len(COMPUTED)
        assert vars(model.blocks[2])["forward"] is interrupted

    def test_copies(self) -> None:
        model, (call, *_) = make(), inputs(1)
        with attach(model, Always()):
            with pytest.raises(ConfigError, match=r"detach\(\)"):
                copy.deepcopy(model)
            with pytest.raises(ConfigError, match=r"detach\(\)"):
                pickle.dumps(model)
        assert torch.equal(copy.deepcopy(model)(*call), model(*call))

    def test_two_caches_on_one_model(self) -> None:
        model, other = make(), make()
        with attach(model, Always()):
            with pytest.raises(ConfigError, match="already"):
                attach([other, model], Always())
            assert not any("forward" in vars(module) for module in other.modules())
            assert not other._forward_hooks

    def test_what_was_put_on_top_goes_first(self) -> None:
        model = make()
        cache = attach(model, Always())
        ours = model.blocks[1].forward
        model.blocks[1].forward = lambda *args: ours(*args)
        with pytest.raises(ConfigError, match="Block was replaced"):
            cache.detach()
        model.blocks[1].forward = ours
        cache.detach()
        assert not any("forward" in vars(module) for module in model.modules())

    @pytest.mark.parametrize("what", ["stack", "attention"])
    @pytest.mark.parametrize("way", [said, counted])
    def test_a_model_that_leaves_out_a_block(self, what: Any, way: Any) -> None:
        class Hasty(Toy):
            def forward(self, latents: Tensor, time: Tensor) -> Tensor:
                streams = self.enter(latents)
                for index in range(len(self.blocks) - 1):
                    streams = self.block(index, streams, time)
                return self.leave(streams)

        model, calls = make(Hasty), inputs(2)
        with attach(model, Static([0]), what=what) as cache:
            with pytest.raises(ModelExecError, match="did not run all"):
                way(cache, model, calls)
            assert cache.bytes_held == 0

    @pytest.mark.parametrize("way", [said, counted])
    def test_a_model_that_runs_its_blocks_twice(self, way: Any) -> None:
        class Looping(Toy):
            def enter(self, latents: Tensor) -> tuple[Tensor, ...]:
                return self.block(0, super().enter(latents), torch.tensor(1.0))

        model = make(Looping)
        with (
            attach(model, Static([0]), what="range", between=(0, 2)) as cache,
            pytest.raises(ModelExecError, match="twice"),
        ):
            way(cache, model, inputs(2))

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (lambda hidden: (hidden, None), r"a tuple of 2 \(Tensor, NoneType\)"),
            (lambda hidden: [hidden], "a list was returned"),
            (lambda hidden: hidden[:, :2], r"which is\s+which is not clear"),
            (lambda hidden: (hidden, hidden), "which is not clear"),
        ],
    )
    def test_outputs_that_cannot_be_cached(self, output: Any, message: str) -> None:
        class Odd(nn.Module):
            def forward(self, hidden_states: Tensor, time: Tensor) -> Any:
                return output(hidden_states)

        class OddToy(Toy):
            block_class = Odd

        model = make(OddToy)
        with attach(model, Always()) as cache, pytest.raises(ModelExecError, match=message):
            said(cache, model, inputs(1))

    def test_streams_of_one_shape_without_names(self) -> None:
        model = make(TextToy)
        with attach(model, Always()) as cache, pytest.raises(ModelExecError, match=r"streams=\("):
            said(cache, model, inputs(1, length=3))


class TestArguments:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"what": "range"}, '"range" with it'),
            ({"between": (0, 1)}, '"stack" without between'),
            ({"what": "velocity"}, "legal are"),
            ({"what": "range", "between": (2, 2)}, "the model has 5"),
            ({"what": "range", "between": (-1, 2)}, "the model has 5"),
            ({"what": "attention", "between": (0, 6)}, "the model has 5"),
            ({"what": "attention", "attention": "attn2"}, "one of: attn1, ff"),
            ({"blocks": "embed"}, r"there are: blocks \(5\)"),
            ({"blocks": "stack"}, r"there are: blocks \(5\)"),
            ({"branches": ()}, "0 branches"),
            ({"branches": ("a", "a")}, "1 different"),
            ({"predictor": Secant()}, "Secant uses the latents"),
            ({"streams": ("hidden",)}, r"it takes \['hidden_states', 'time'\]"),
            ({"streams": ()}, "name each once"),
            ({"streams": ("time", "time")}, "name each once"),
        ],
    )
    def test_that_do_not_go_together(self, given: dict[str, Any], message: str) -> None:
        model = make()
        with pytest.raises(ConfigError, match=message):
            attach(model, Always(), **given)
        assert not any("forward" in vars(module) for module in model.modules())

    @pytest.mark.parametrize("needs", ["probe", "latents", "signal"])
    def test_policies_that_look_at_what_is_not_there(self, needs: str) -> None:
        class Looking(Always):
            pass

        policy = Looking()
        object.__setattr__(policy, "needs", frozenset({needs}))
        object.__setattr__(policy, "first", 0)
        with pytest.raises(ConfigError, match=needs if needs != "probe" else 'what has to be "stack"'):
            attach(make(), policy, what="attention")
        if needs == "probe":
            with pytest.raises(ConfigError, match="at least one block"):
                attach(make(), policy)

    @pytest.mark.parametrize("models", [[], "twice"])
    def test_models(self, models: Any) -> None:
        model = make()
        with pytest.raises(ConfigError, match="models"):
            attach([model, model] if models else [], Always())

    def test_blocks_that_are_not_clear(self) -> None:
        model = make()
        model.more = nn.ModuleList(Block() for _ in range(5))
        with pytest.raises(ConfigError, match=r"blocks \(5\), more \(5\)"):
            attach(model, Always())
        with attach(model, Always(), blocks="blocks") as cache, counting(model):
            said(cache, model, inputs(2))
        with pytest.raises(ConfigError, match="no list of modules at all"):
            attach(nn.Linear(2, 2), Always())
        model.more = nn.ModuleList([model.blocks[0]] * 7)
        with pytest.raises(ConfigError, match="stands for several"):
            attach(model, Always())
