from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_blocks import TOYS, WIDTH, HintToy, InPlaceToy, TextFirstToy, TextToy, Toy, counting, inputs, line, make, naive

from dit_cache.engine.attaching import attach
from dit_cache.engine.blocks import BlockCache
from dit_cache.engine.guards import Limits
from dit_cache.engine.moment import Decision, Evidence, Moment, Streams
from dit_cache.engine.policies import Always, Interval, Static
from dit_cache.engine.predictors import Taylor
from dit_cache.engine.store import Keep

STEPS = 7
COMPUTED = (0, 1, 3, 6)
# A line through two values is summed in another order here than there: a few roundings of float32, of numbers near 10.
ROUNDINGS = 2e-5


def generate(cache: BlockCache, model: Toy, calls: list[tuple[Tensor, Tensor]], *, said: bool = True) -> list[Tensor]:
    outputs = []
    with cache.generation(len(calls)):
        for step, (latents, time) in enumerate(calls):
            if said:
                with cache.at(step):
                    outputs.append(model(latents.clone(), time))
            else:
                outputs.append(model(latents.clone(), time))
    return outputs


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@dataclass
class Gate:
    """Computes every second step, by a probe that it writes down."""

    first: int = 1
    last: int = 0
    probes: list[Tensor] = field(default_factory=list)
    needs: frozenset[str] = frozenset({"probe"})
    dynamic: bool = True
    once: bool = False

    def __deepcopy__(self, memo: Any) -> Gate:
        return self  # so that the test sees what the copy saw

    def decide(self, at: Moment, seen: Evidence) -> Decision:
        assert seen.probe is not None
        self.probes.append(seen.probe().clone())
        return Decision(at.step % 2 == 0, "gate")

    def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
        assert seen.probe is not None
        assert torch.equal(seen.probe(), self.probes[-1])


class TestChange:
    @pytest.mark.parametrize("kind", TOYS)
    @pytest.mark.parametrize("between", [None, (1, 3), (2, 3), (0, 1), (3, 5)])
    @pytest.mark.parametrize("said", [True, False])
    def test_a_generation_is_that_of_the_plain_loop(
        self, kind: type[Toy], between: tuple[int, int] | None, said: bool
    ) -> None:
        model, calls = make(kind), inputs(STEPS)
        expected = naive(model, calls, COMPUTED, between)
        with attach(model, Static(COMPUTED), what="range" if between else "stack", between=between) as cache:
            for _ in range(2):
                assert equal(generate(cache, model, calls, said=said), expected)
        assert [entry.computed for entry in cache.ledger.entries] == [step in COMPUTED for step in range(STEPS)]
        assert not equal(expected, [model(*call) for call in calls])

    @pytest.mark.parametrize("kind", TOYS)
    def test_a_line_is_extrapolated(self, kind: type[Toy]) -> None:
        model, calls = make(kind), inputs(STEPS)
        expected = naive(model, calls, COMPUTED, combine=line)
        with attach(model, Static(COMPUTED), predictor=Taylor(1)) as cache:
            for got, wanted in zip(generate(cache, model, calls), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDINGS)

    @pytest.mark.parametrize("kind", TOYS)
    @pytest.mark.parametrize("what", ["stack", "range", "attention"])
    def test_all_computed_is_bit_exact_and_so_is_the_model_afterwards(self, kind: type[Toy], what: Any) -> None:
        model, calls = make(kind), inputs(STEPS)
        names, expected = list(model.state_dict()), [model(*call) for call in calls]
        cache = attach(model, Always(), what=what, between=(1, 3) if what == "range" else None)
        assert equal(generate(cache, model, calls), expected)
        assert equal([model(*call) for call in calls], expected)  # attached, and no generation
        assert list(model.state_dict()) == names
        cache.detach()
        cache.detach()
        assert equal([model(*call) for call in calls], expected)
        assert list(model.state_dict()) == names
        assert not any("forward" in vars(module) for module in model.modules())
        assert not model._forward_hooks
        assert not model._forward_pre_hooks

    @pytest.mark.parametrize("kind", [TextToy, TextFirstToy])
    def test_streams_by_name(self, kind: type[Toy]) -> None:
        names = ("hidden_states", "encoder_hidden_states")
        model, calls = make(kind), inputs(STEPS, length=3)  # both streams have three tokens: shapes say nothing
        with attach(model, Static(COMPUTED), streams=names if kind is TextToy else names[::-1]) as cache:
            assert equal(generate(cache, model, calls), naive(model, calls, COMPUTED))

    def test_what_is_kept_may_have_another_dtype(self) -> None:
        model, calls = make(), inputs(2)
        with attach(model, Static([0]), store=Keep(dtype=torch.bfloat16)) as cache:
            got = generate(cache, model, calls)[1]
        before = [model.enter(latents)[0] for latents, _ in calls]
        after = before[0]
        for index in range(len(model.blocks)):
            (after,) = model.block(index, (after,), calls[0][1])
        change = (after - before[0]).bfloat16().float()
        assert torch.equal(got, model.leave((before[1] + change,)))

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_in_every_grad_mode(self, mode: Any) -> None:
        model, calls = make().requires_grad_(True), inputs(STEPS)
        with mode(), attach(model, Static(COMPUTED)) as cache:
            outputs = generate(cache, model, calls)
            expected = naive(model, calls, COMPUTED)
        assert equal(outputs, expected)


class TestAttention:
    def expected(
        self, model: Toy, calls: list[tuple[Tensor, Tensor]], between: tuple[int, int] = (0, 5), name: str = "attn1"
    ) -> list[Tensor]:
        kept: dict[tuple[int, str], Tensor] = {}
        outputs = []
        for step, (latents, time) in enumerate(calls):
            (hidden,) = model.enter(latents)
            for n, block in enumerate(model.blocks):
                computed = step in COMPUTED or not between[0] <= n < between[1]
                if computed or name != "attn1":
                    kept[n, "attn1"] = block.attn1(hidden)  # type: ignore[operator]
                hidden = hidden + kept[n, "attn1"] * time
                if computed or name != "ff":
                    kept[n, "ff"] = block.ff(hidden.tanh())  # type: ignore[operator]
                hidden = hidden + kept[n, "ff"]
            outputs.append(model.leave((hidden,)))
        return outputs

    @pytest.mark.parametrize("kind", [Toy, InPlaceToy])
    @pytest.mark.parametrize("between", [None, (1, 4)])
    def test_a_generation_is_that_of_the_plain_loop(self, kind: type[Toy], between: tuple[int, int] | None) -> None:
        model, calls = make(kind), inputs(STEPS)
        expected = self.expected(model, calls, between or (0, 5))
        with attach(model, Static(COMPUTED), what="attention", between=between) as cache:
            assert equal(generate(cache, model, calls), expected)
            assert equal(generate(cache, model, calls, said=False), expected)

    @pytest.mark.parametrize("name", ["attn1", "ff"])
    def test_by_name(self, name: str) -> None:
        model, calls = make(), inputs(STEPS)
        expected = self.expected(model, calls, name=name)
        with attach(model, Static(COMPUTED), what="attention", attention=name) as cache:
            assert equal(generate(cache, model, calls), expected)


class TestWhatIsRun:
    """Wrappers that do nothing would pass many a test: here the layers inside are counted."""

    @pytest.mark.parametrize(
        ("what", "between", "blocks", "attentions"),
        [("stack", None, 5, 5), ("range", (1, 3), 2, 2), ("attention", None, 0, 5), ("attention", (1, 3), 0, 2)],
    )
    @pytest.mark.parametrize("kind", [Toy, HintToy])
    def test_no_layer_of_a_skipped_module_is_called(
        self, kind: type[Toy], what: Any, between: Any, blocks: int, attentions: int
    ) -> None:
        model = make(kind)
        with attach(model, Static(COMPUTED), what=what, between=between) as cache, counting(model) as runs:
            generate(cache, model, inputs(STEPS))
        holes = STEPS - len(COMPUTED)
        assert runs["ff"] == 5 * STEPS - holes * blocks
        assert runs["mix"] == 5 * STEPS - holes * attentions

    def test_the_rule_of_mindie(self) -> None:
        model = make(depth=30)
        policy = Interval(interval=2, start=20, end=47)
        with attach(model, policy, what="range", between=(10, 30)) as cache, counting(model) as runs:
            generate(cache, model, inputs(50))
        assert runs["ff"] == 50 * 30 - 14 * 20  # holes: 21, 23, ... 47

    @pytest.mark.parametrize("what", ["stack", "attention"])
    @pytest.mark.parametrize("order", [0, 1])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("kind", [Toy, TextToy])
    def test_the_memory_is_what_was_announced(self, what: Any, order: int, dtype: Any, kind: type[Toy]) -> None:
        model, calls = make(kind), inputs(STEPS)
        held = []
        with attach(
            model, Always(), what=what, predictor=Taylor(order), store=Keep(dtype=dtype), branches=("a", "b")
        ) as cache:
            with cache.generation(STEPS):
                for call in calls:
                    for _ in cache.branches:
                        model(*call)
                        held.append(cache.bytes_held)
            joint = kind is TextToy and what == "attention"
            announced = cache.bytes_for(
                (2, 9 if joint else 6, WIDTH), encoder_shape=(2, 3, WIDTH) if kind is TextToy and not joint else None
            )
        assert max(held) == announced > 0
        assert cache.bytes_held == 0


class TestEvidence:
    @pytest.mark.parametrize("kind", TOYS)
    @pytest.mark.parametrize(("first", "last"), [(1, 0), (2, 1), (1, 3)])
    @pytest.mark.parametrize("said", [True, False])
    def test_a_probe_is_the_change_over_the_first_blocks(
        self, kind: type[Toy], first: int, last: int, said: bool
    ) -> None:
        model, calls, gate = make(kind), inputs(STEPS), Gate(first, last)
        expected = naive(model, calls, range(0, STEPS, 2), (first, 5 - last))
        with attach(model, gate) as cache, counting(model) as runs:
            assert equal(generate(cache, model, calls, said=said), expected)
        assert runs["ff"] == STEPS * 5 - STEPS // 2 * (5 - first - last)
        for probe, (latents, time) in zip(gate.probes, calls, strict=True):
            streams = model.enter(latents)
            before = streams[0].clone()
            for index in range(first):
                streams = model.between(index, model.block(index, streams, time))
            assert torch.equal(probe, streams[0] - before)

    def test_guards_stand_above_a_probe(self) -> None:
        model = make()
        with attach(model, Gate(), guards=[Limits(first=4, in_a_row=1)]) as cache:
            generate(cache, model, inputs(STEPS))
        assert [entry.reason for entry in cache.ledger.entries][1:4] == ["first steps", "gate", "first steps"]

    def test_a_signal_is_made_of_the_call(self) -> None:
        @dataclass(frozen=True)
        class BySignal:
            needs: frozenset[str] = frozenset({"signal"})
            dynamic: bool = True
            once: bool = False

            def decide(self, at: Moment, seen: Evidence) -> Decision:
                assert seen.signal is not None
                return Decision(at.step == 0, "signal", float(seen.signal()))

            def computed(self, at: Moment, seen: Evidence, value: Streams) -> None:
                assert seen.signal is not None
                assert seen.signal() is not None

        model, calls = make(), inputs(STEPS)
        asked = []

        def signal(given: torch.nn.Module, latents: Tensor, time: Tensor) -> Tensor:
            asked.append(given)
            return time * 2

        with attach(model, BySignal(), signal=signal) as cache:
            for said in (True, False):
                generate(cache, model, calls, said=said)
                indicators = [entry.indicator for entry in cache.ledger.entries]
                assert indicators == [float(time * 2) for _, time in calls]
        assert asked == [model] * (2 * STEPS)

    @pytest.mark.parametrize("what", ["stack", "attention"])
    def test_the_error_that_a_hole_would_have_had(self, what: Any) -> None:
        model, calls = make(depth=1), inputs(STEPS)
        with attach(model, Always(), what=what, measure=True) as cache:
            generate(cache, model, calls)
        values = []
        for latents, time in calls:
            (hidden,) = model.enter(latents)
            block = model.blocks[0]
            values.append(block.attn1(hidden) if what == "attention" else block(hidden, time) - hidden)  # type: ignore[operator]
        errors = [entry.realised_error for entry in cache.ledger.entries]
        assert errors[0] is None
        for error, before, now in zip(errors[1:], values, values[1:], strict=False):
            assert error == pytest.approx(float((before - now).norm() / now.norm()), rel=1e-5)  # float32 norms
