"""The cache around the model: what comes out, what is refused, and that nothing is left of a generation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dit_cache.engine.gates import EasyCache, FirstBlock, TeaCache
from dit_cache.engine.guards import Envelope, Limits
from dit_cache.engine.magnitude import MagCache
from dit_cache.engine.policies import Always, Interval, Static
from dit_cache.engine.predictors import Offset, Planned, Reuse, Secant, Taylor
from dit_cache.engine.protocols import Policy, Predictor
from dit_cache.engine.store import Keep
from dit_cache.engine.velocity import VelocityCache
from dit_cache.errors import ConfigError, GenerationError, ParametersInvalid

STEPS = 12
SIGMAS = [1 - (step / STEPS) ** 1.5 for step in range(STEPS)] + [0.0]
SHAPE = (1, 4, 6)

POLICIES: list[Policy] = [
    Static([0, 1, 2, 4, 7, 10]),
    Interval(interval=3, start=2, end=9),
    TeaCache(0.15),
    EasyCache(0.3, first=3),
    MagCache([0.97] * STEPS, 0.12, 3),
]
PREDICTORS: list[Predictor] = [Reuse(), Taylor(1), Taylor(2), Secant(), Offset(), Planned(orders={3: 2})]
named = pytest.mark.parametrize("policy", POLICIES, ids=lambda each: type(each).__name__)
predicted = pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda each: type(each).__name__)


class Broken(Exception):
    """What a model raises."""


class Model:
    """A velocity, its embedding of the time, and a count of the steps in which it was computed."""

    def __init__(self, seed: int = 0, shape: Sequence[int] = SHAPE) -> None:
        self.noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
        self.computed: list[int] = []
        self.fails_at: int | None = None

    def field(self, latents: Tensor, sigma: float) -> Tensor:
        return torch.tanh(1.5 * latents.roll(1, -1) + 2 * sigma) * (1 + sigma) - 0.4 * latents

    def signal(self, sigma: float) -> Callable[[], Tensor]:
        return lambda: torch.cos(sigma * torch.arange(1.0, 9.0))

    def predict(self, latents: Tensor, step: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            if step == self.fails_at:
                raise Broken
            self.computed.append(step)
            return self.field(latents, SIGMAS[step])

        return run

    def step(self, cache: VelocityCache | None, latents: Tensor, step: int, **where: Any) -> Tensor:
        predict = self.predict(latents, step)
        velocity = (
            predict() if cache is None else cache.velocity(predict, latents, signal=self.signal(SIGMAS[step]), **where)
        )
        result: Tensor = latents + (SIGMAS[step + 1] - SIGMAS[step]) * velocity
        return result

    def run(self, cache: VelocityCache | None, sigmas: Sequence[float] | int = SIGMAS, **where: Any) -> Tensor:
        latents = self.noise
        if cache is None:
            for step in range(STEPS):
                latents = self.step(None, latents, step)
            return latents
        with cache.generation(sigmas):
            for step in range(STEPS):
                latents = self.step(cache, latents, step, **where)
        return latents


# ---- what comes out ------------------------------------------------------------------------------------------------


@predicted
@pytest.mark.parametrize(
    "policy",
    [
        Always(),
        Static(range(STEPS)),
        Interval(interval=1),
        TeaCache(0.0),
        EasyCache(0.0, first=2),
        MagCache([0.9], 0.0, 3),
    ],
    ids=lambda each: type(each).__name__,
)
def test_all_computed_is_uncached_bit_for_bit(policy: Policy, predictor: Predictor) -> None:
    plain, cached = Model(), Model()
    assert torch.equal(cached.run(VelocityCache(policy, predictor=predictor)), plain.run(None))
    assert cached.computed == plain.computed == list(range(STEPS))


@predicted
@named
def test_no_policy_is_a_no_op(policy: Policy, predictor: Predictor) -> None:
    plain, cached = Model(), Model()
    out = cached.run(VelocityCache(policy, predictor=predictor))
    assert 1 < len(cached.computed) < STEPS
    assert 0 < (out - plain.run(None)).norm() < plain.noise.norm()


@pytest.mark.parametrize("guards", [[], [Limits(first=2, last=2, in_a_row=1)]], ids=["bare", "guarded"])
def test_a_run_by_hand(guards: list[Limits]) -> None:
    """The same run, with the polynomial of the last three values written into the loop."""
    computed = {0, 2, 5, 6, 9}
    if guards:
        computed |= {1, 4, 8, 10, 11}
    latents = Model().noise
    times: list[float] = []
    values: list[Tensor] = []
    for step in range(STEPS):
        now = SIGMAS[step]
        if step in computed:
            velocity = Model().field(latents, now)
            times, values = [*times, now][-3:], [*values, velocity][-3:]
        else:
            velocity = torch.zeros(SHAPE)
            for n, value in enumerate(values):
                weight = 1.0
                for m, other in enumerate(times):
                    weight *= 1.0 if m == n else (now - other) / (times[n] - other)
                velocity = velocity + weight * value
        latents = latents + (SIGMAS[step + 1] - now) * velocity
    model = Model()
    got = model.run(VelocityCache(Static([0, 2, 5, 6, 9]), predictor=Taylor(2), guards=guards))
    assert model.computed == sorted(computed)
    assert torch.allclose(got, latents, rtol=1e-5, atol=1e-5)  # the same sums of float32, in another order


@named
def test_a_solver_may_write_into_its_latents(policy: Policy) -> None:
    for predictor in PREDICTORS:
        model, other = Model(), Model()
        wanted = model.run(VelocityCache(policy, predictor=predictor))
        cache = VelocityCache(policy, predictor=predictor)
        latents = other.noise.clone()
        with cache.generation(SIGMAS):
            for step in range(STEPS):
                velocity = cache.velocity(other.predict(latents, step), latents, signal=other.signal(SIGMAS[step]))
                latents += velocity.mul_(SIGMAS[step + 1] - SIGMAS[step])
        assert torch.equal(latents, wanted), predictor
        assert other.computed == model.computed


def test_sigmas_with_and_without_their_end_are_the_same() -> None:
    outs = [
        Model().run(VelocityCache(Static([0, 3, 6]), predictor=Taylor(2)), sigmas) for sigmas in (SIGMAS, SIGMAS[:-1])
    ]
    outs.append(Model().run(VelocityCache(Static([0, 3, 6]), predictor=Taylor(2)), torch.tensor(SIGMAS)))  # type: ignore[arg-type]
    assert torch.equal(outs[0], outs[1])
    assert torch.allclose(outs[0], outs[2], rtol=1e-5, atol=1e-5)  # levels of float32
    counted = Model().run(VelocityCache(Static([0, 3, 6]), predictor=Reuse()), STEPS)
    assert torch.equal(counted, Model().run(VelocityCache(Static([0, 3, 6]), predictor=Reuse())))


@pytest.mark.parametrize(
    "sigmas", [[], 0, [1.0, 0.5, 0.5, 0.0], [1.0, 1.0], [1.0, float("nan")], [float("inf"), 1.0]], ids=str
)
def test_sigmas_that_are_no_times(sigmas: list[float] | int) -> None:
    cache = VelocityCache(Always())
    with pytest.raises(ConfigError, match="sigmas"), cache.generation(sigmas):
        pass
    Model().run(cache)  # and nothing is left of it


def test_a_single_level_of_zero_is_a_step() -> None:
    cache = VelocityCache(Always())
    with cache.generation([0.0]):
        assert torch.equal(cache.velocity(lambda: torch.ones(1), torch.ones(1)), torch.ones(1))


# ---- branches and parts --------------------------------------------------------------------------------------------


@named
def test_branches_do_not_see_each_other(policy: Policy) -> None:
    alone = {}
    for seed, branch in enumerate(("cond", "uncond")):
        model = Model(seed)
        cache = VelocityCache(policy, predictor=Secant())
        alone[branch] = (model.run(cache, branch=branch), model.computed)
    models = {"cond": Model(0), "uncond": Model(1)}
    cache = VelocityCache(policy, predictor=Secant())
    latents = {branch: model.noise for branch, model in models.items()}
    with cache.generation(SIGMAS):
        for step in range(STEPS):
            for branch, model in models.items():
                latents[branch] = model.step(cache, latents[branch], step, branch=branch)
    for branch, model in models.items():
        if policy.once:  # the first side decides for both
            assert model.computed == alone["cond"][1]
        if not policy.once or branch == "cond":
            assert torch.equal(latents[branch], alone[branch][0])
            assert model.computed == alone[branch][1]


def test_a_side_may_be_left_out_of_some_steps() -> None:
    cache, model = VelocityCache(Static([0, 2, 5]), predictor=Taylor(1)), Model()
    with cache.generation(SIGMAS):
        for step in (1, 2, 4, 5, 7):
            cache.velocity(model.predict(model.noise, step), model.noise, step=step, branch="uncond")
    assert model.computed == [1, 2, 5]  # at 1 nothing was kept
    assert [entry.reason for entry in cache.ledger.entries] == ["nothing kept", "planned", "hole", "planned", "hole"]


def test_nothing_is_predicted_over_the_boundary_of_two_models() -> None:
    cache, model = VelocityCache(Static([0, 2, 8]), predictor=Taylor(1)), Model()
    latents, held = model.noise, []
    with cache.generation(SIGMAS):
        for step in range(STEPS):
            latents = model.step(cache, latents, step, part="high" if step < 5 else "low")
            held.append(cache.bytes_held)
    assert model.computed == [0, 2, 5, 8]
    one = cache.store.nbytes(SHAPE, torch.float32)
    assert held == [one, one, *[2 * one] * 3, *[one] * 3, *[2 * one] * 4]  # what the first one left is dropped
    assert max(held) == cache.bytes_for(SHAPE)


# ---- what is written down ------------------------------------------------------------------------------------------


def test_the_ledger_says_what_was_done() -> None:
    cache, model = VelocityCache(EasyCache(0.3, first=3), predictor=Offset()), Model()
    for _ in range(2):  # the second generation has a ledger of its own
        model.computed.clear()
        model.run(cache, branch="cond")
        entries = cache.ledger.entries
        assert [entry.step for entry in entries] == list(range(STEPS))
        assert {entry.branch for entry in entries} == {"cond"}
        assert [entry.step for entry in entries if entry.computed] == model.computed
        for entry in entries[3 : STEPS - 1]:
            assert entry.indicator is not None
            assert (entry.indicator < 0.3) is not entry.computed
        assert cache.ledger.bytes_held == cache.bytes_for(SHAPE)


@predicted
def test_what_a_hole_would_have_cost_is_measured_where_it_was_not_one(predictor: Predictor) -> None:
    """A line in the noise level: lines and parabolas follow it, what is older is wrong by the way that it went."""
    cache, value, x = VelocityCache(Always(), predictor=predictor, measure=True), torch.ones(SHAPE), torch.zeros(SHAPE)
    with cache.generation(SIGMAS):
        for sigma in SIGMAS[:-1]:
            cache.velocity(lambda sigma=sigma: (1 + sigma) * value, x)  # type: ignore[misc]
    errors = [entry.realised_error for entry in cache.ledger.entries]
    assert errors[0] is None
    assert None not in errors[1:]
    if isinstance(predictor, Taylor | Planned):
        assert errors[2:] == pytest.approx([0.0] * (STEPS - 2), abs=1e-5)  # float32
    elif not isinstance(predictor, Secant):
        wanted = [(before - now) / (1 + now) for before, now in pairwise(SIGMAS[:-1])]
        assert errors[1:] == pytest.approx(wanted, rel=1e-4)  # float32


# ---- memory --------------------------------------------------------------------------------------------------------


@predicted
@pytest.mark.parametrize("store", [Keep(), Keep(dtype=torch.bfloat16)], ids=["as is", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("parts", [("",), ("high", "low")], ids=["one", "two"])
@pytest.mark.parametrize("branches", [("",), ("cond", "uncond")], ids=["joint", "split"])
def test_bytes_are_those_that_were_announced(
    predictor: Predictor, store: Keep, dtype: torch.dtype, parts: tuple[str, ...], branches: tuple[str, ...]
) -> None:
    cache = VelocityCache(Interval(interval=2), predictor=predictor, store=store)
    peak = 0
    with cache.generation([1 - step / STEPS for step in range(STEPS)]):
        for step in range(STEPS):
            for branch in branches:
                latents = torch.full(SHAPE, float(step), dtype=dtype)
                part = parts[step * len(parts) // STEPS]
                got = cache.velocity(lambda x=latents: x, latents, branch=branch, part=part)  # type: ignore[misc]
                assert got.dtype == dtype
                peak = max(peak, cache.bytes_held)
    assert peak == cache.bytes_for(SHAPE, dtype, branches=len(branches)) > 0
    assert cache.bytes_held == 0


@pytest.mark.parametrize(
    ("predictor", "tensors"), [(Reuse(), 1), (Taylor(1), 2), (Secant(), 4), (Offset(), 2)], ids=repr
)
def test_wan_14b_takes_megabytes(predictor: Predictor, tensors: int) -> None:
    shape = (1, 16, 21, 90, 160)  # 81 frames of 1280 × 720
    cache, peak = VelocityCache(Interval(interval=2), predictor=predictor), 0
    with FakeTensorMode():
        latents = torch.empty(shape)
        with cache.generation([1 - step / 50 for step in range(50)]):
            for _ in range(50):
                latents = latents + cache.velocity(lambda: torch.empty(shape), latents)
                peak = max(peak, cache.bytes_held)
    assert peak == cache.bytes_for(shape) == tensors * 4 * 16 * 21 * 90 * 160
    assert peak < tensors * 20e6


def test_latents_of_another_shape_are_refused_within_a_generation() -> None:
    cache = VelocityCache(Static([0]))
    with cache.generation(4):
        cache.velocity(lambda: torch.ones(1, 3), torch.ones(1, 3))
        with pytest.raises(GenerationError, match=r"\[2, 3\], they were \[1, 3\]"):
            cache.velocity(lambda: torch.ones(2, 3), torch.ones(2, 3))


def test_a_velocity_is_a_tensor() -> None:
    cache = VelocityCache(Static([0]))
    with cache.generation(4), pytest.raises(ParametersInvalid, match="tuple"):
        cache.velocity(lambda: (torch.ones(1),), torch.ones(1))  # type: ignore[arg-type, return-value]


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_probe_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"FirstBlock looks at the probe.*latents, signal"):
        VelocityCache(FirstBlock(0.1))


def test_a_signal_that_was_not_given() -> None:
    cache = VelocityCache(TeaCache(0.1))
    with pytest.raises(ParametersInvalid, match="signal="), cache.generation(2):
        cache.velocity(lambda: torch.ones(1), torch.ones(1))


def test_no_generation() -> None:
    cache, x = VelocityCache(Always()), torch.ones(2)
    with pytest.raises(GenerationError, match=r"with cache\.generation"):
        cache.velocity(lambda: x, x)
    Model().run(cache)
    with pytest.raises(GenerationError, match="no generation"):
        cache.velocity(lambda: x, x)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([None] * 4, "step 3 of branch '' was asked for; 3 are done of 3"),
        ([0, 3], "step 3"),
        ([0, -1], "step -1"),
        ([0, 0], "step 0 .*; 1 are done"),
        ([1, 0], "step 0 .*; 2 are done"),
    ],
)
def test_steps_that_are_not_next(steps: list[int | None], message: str) -> None:
    cache, model = VelocityCache(Always()), Model()
    with cache.generation(3):
        for step in steps[:-1]:
            cache.velocity(model.predict(model.noise, 0), model.noise, step=step)
        with pytest.raises(GenerationError, match=message):
            cache.velocity(model.predict(model.noise, 0), model.noise, step=steps[-1])
    assert len(model.computed) == len(steps) - 1


def test_a_generation_in_another_one() -> None:
    cache, x = VelocityCache(Static([0])), torch.ones(2)
    with cache.generation(3):
        cache.velocity(lambda: x, x)
        with pytest.raises(GenerationError, match="going on"), cache.generation(3):
            pass
        assert torch.equal(cache.velocity(lambda: x * 2, x), x)  # the outer one goes on


def test_another_thread() -> None:
    cache, x, raised = VelocityCache(Static([0])), torch.ones(2), []

    def other(act: Callable[[], object]) -> None:
        def run() -> None:
            try:
                act()
            except GenerationError as error:
                raised.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with cache.generation(3):
        cache.velocity(lambda: x, x)
        other(lambda: cache.velocity(lambda: x * 2, x))
        other(lambda: cache.generation(3).__enter__())
        assert torch.equal(cache.velocity(lambda: x * 2, x), x)
    assert len(raised) == 2
    assert "thread" in raised[0]
    other(lambda: Model().run(cache))  # after the end, anyone may begin
    assert len(raised) == 2


def test_caches_of_several_threads_are_independent() -> None:
    policy, predictor = TeaCache(0.15), Taylor(1)
    outs: dict[int, Tensor] = {}
    threads = [
        threading.Thread(
            target=lambda seed=seed: outs.update({seed: Model(seed).run(VelocityCache(policy, predictor=predictor))})
        )
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(outs[seed], Model(seed).run(VelocityCache(policy, predictor=predictor)))


# ---- and what is left of a generation: nothing -----------------------------------------------------------------------


@named
def test_a_failed_generation_leaves_nothing(policy: Policy) -> None:
    guards = [Envelope(bounds=dict.fromkeys(range(STEPS), (0.0, 0.05)), extra=1)]
    fresh = Model()
    wanted = fresh.run(VelocityCache(policy, predictor=Secant(), guards=guards))
    cache, model = VelocityCache(policy, predictor=Secant(), guards=guards), Model()
    for fails_at in fresh.computed:
        model.fails_at = fails_at
        with pytest.raises(Broken):
            model.run(cache)
        assert cache.bytes_held == 0
        model.fails_at = None
        model.computed.clear()
        assert torch.equal(model.run(cache), wanted)
        assert model.computed == fresh.computed


@named
def test_a_step_that_failed_may_be_tried_again(policy: Policy) -> None:
    fresh = Model()
    wanted = fresh.run(VelocityCache(policy, predictor=Offset()))
    cache, model = VelocityCache(policy, predictor=Offset()), Model()
    latents = model.noise
    with cache.generation(SIGMAS):
        for step in range(STEPS):
            if step in fresh.computed:
                model.fails_at = step
                with pytest.raises(Broken):
                    model.step(cache, latents, step)
                model.fails_at = None
            latents = model.step(cache, latents, step)
    assert torch.equal(latents, wanted)
    assert model.computed == fresh.computed


@named
def test_shapes_and_step_counts_change_between_generations(policy: Policy) -> None:
    cache = VelocityCache(policy, predictor=Secant())
    for shape in ((1, 4, 6), (2, 4, 8), (1, 1, 6)):
        wanted = Model(shape=shape).run(VelocityCache(policy, predictor=Secant()))
        assert torch.equal(Model(shape=shape).run(cache), wanted)
    with cache.generation([1.0, 0.6, 0.3]):
        for _ in range(2):  # fewer than announced
            cache.velocity(lambda: torch.ones(2), torch.ones(2), signal=lambda: torch.ones(2))
    assert cache.bytes_held == 0
