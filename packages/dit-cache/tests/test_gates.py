"""Policies that look, and those that measured before, against their rules written as plain loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_cache.engine.gates import TEACACHE_WAN, EasyCache, FirstBlock, TeaCache, relative_l1
from dit_cache.engine.magnitude import MagCache, MagCalibration, MagRatios
from dit_cache.engine.moment import Decision, Evidence, Moment
from dit_cache.engine.predictors import Offset, Reuse
from dit_cache.engine.protocols import Policy
from dit_cache.engine.velocity import VelocityCache
from dit_cache.errors import ConfigError, GenerationError, ParametersInvalid

# Both sides sum the same float32 numbers, in another order and precision: sums that are nearer to the threshold than
# this, relatively, may fall on either side of it, and say nothing.
UNDECIDED = 1e-4

STEPS = 14
SEEDS = st.integers(0, 10_000)
THRESHOLDS = st.sampled_from([0.0, 0.03, 0.1, 0.25, 0.6, 2.0])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walk(count: int, seed: int, pace: float = 0.1) -> list[Tensor]:
    """Tensors that change little by little, now more, now less."""
    generator = torch.Generator().manual_seed(seed)
    now, result = torch.randn(2, 6, generator=generator), []
    for _ in range(count):
        now = now + pace * torch.rand((), generator=generator) * torch.randn(2, 6, generator=generator)
        result.append(now)
    return result


def moment(step: int, steps: int = STEPS, branch: str = "") -> Moment:
    return Moment(step=step, steps=steps, time=1 - step / steps, branch=branch)


def drive(
    policy: Policy, seen: Sequence[Evidence], forced: Sequence[int] = (0,), branch: str = ""
) -> tuple[list[bool], list[Decision]]:
    """Decide over a generation as a cache does; the `forced` steps are computed whatever is decided."""
    policy, decisions, computed = copy.deepcopy(policy), [], []
    for step, each in enumerate(seen):
        at = moment(step, len(seen), branch)
        decisions.append(policy.decide(at, each))
        computed.append(decisions[-1].compute or step in forced)
        if computed[-1]:
            policy.computed(at, each, (torch.zeros(1),))
    return computed, decisions


def constant(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def signals(values: Sequence[Tensor]) -> list[Evidence]:
    return [Evidence(signal=constant(value)) for value in values]


def probes(values: Sequence[Tensor]) -> list[Evidence]:
    return [Evidence(probe=constant(value)) for value in values]


def change(now: Tensor, before: Tensor) -> float:
    """relL1, number by number."""
    pairs = list(zip(now.flatten().tolist(), before.flatten().tolist(), strict=True))
    return math.fsum(abs(a - b) for a, b in pairs) / math.fsum(abs(b) for _, b in pairs)


def below(total: float, threshold: float) -> bool:
    assume(abs(total - threshold) > UNDECIDED * max(threshold, abs(total)))
    return total < threshold


# ---- TeaCache ------------------------------------------------------------------------------------------------------


@given(
    SEEDS,
    st.sampled_from([0.03, 0.1, 0.25, 0.6]),
    st.sampled_from([None, (1.0, 0.0), (30.0, -4.0, 2.0, 0.5, 0.001), (-1.0, 0.02)]),
    st.integers(0, 4),
    st.integers(0, 4),
    st.sets(st.integers(0, STEPS - 1), max_size=3),
)
def test_teacache_is_its_rule(
    seed: int, threshold: float, fit: tuple[float, ...] | None, first: int, last: int, guarded: set[int]
) -> None:
    values = walk(STEPS, seed, pace=0.3)
    total, wanted = 0.0, []
    for step in range(STEPS):
        hole = False
        if step > 0 and first <= step < STEPS - last:
            x = change(values[step], values[step - 1])
            total += x if fit is None else sum(c * x ** (len(fit) - 1 - n) for n, c in enumerate(fit))
            hole = below(total, threshold)
        if not hole or step in guarded:
            total = 0.0
        wanted.append(not hole or step in guarded)
    policy = TeaCache(threshold, fit, first=first, last=last)
    assert drive(policy, signals(values), forced=(0, *guarded))[0] == wanted


def test_teacache_says_the_sum() -> None:
    values = walk(STEPS, 1)
    _, decisions = drive(TeaCache(1e9), signals(values))
    assert decisions[0] == Decision(True, "first steps")
    assert decisions[-1] == Decision(True, "last steps")
    total = 0.0
    for step in range(1, STEPS - 1):
        total += change(values[step], values[step - 1])
        assert decisions[step].indicator == pytest.approx(total, rel=1e-5)  # float32
        assert not decisions[step].compute


@pytest.mark.parametrize(
    ("size", "mode"), [(size, mode) for size in ("1.3B", "14B") for mode in ("plain", "ret_steps")]
)
def test_published_fits(size: str, mode: str) -> None:
    fit = TEACACHE_WAN[size, mode]
    policy = TeaCache(0.1, *fit)
    assert (policy.first, policy.last) == ((1, 1) if mode == "plain" else (5, 0))
    assert policy.coefficients is not None
    assert len(policy.coefficients) == 5  # degree 4
    with pytest.raises(TypeError):
        TEACACHE_WAN[size, mode] = fit  # type: ignore[index]


# ---- EasyCache -----------------------------------------------------------------------------------------------------


def field(latents: Tensor, sigma: float) -> Tensor:
    return torch.tanh(1.5 * latents.roll(1, -1) + 2 * sigma) * (1 + sigma) - 0.4 * latents


def sigmas(steps: int) -> list[float]:
    return [1 - (step / steps) ** 1.5 for step in range(steps)] + [0.0]


def easy_rule(
    latents: Tensor, levels: Sequence[float], threshold: float, first: int, last: int
) -> tuple[list[int], Tensor]:
    """The loop of the publication, in float64: computed steps, and the latents at the end."""
    x, steps = latents.double(), len(levels) - 1
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    computed: list[int] = []
    rate: float | None = None
    total = 0.0
    for step, (now, after) in enumerate(pairwise(levels)):
        hole = False
        if first <= step < steps - last and rate is not None:
            total += rate * float((x - inputs[-1]).abs().mean()) / float(outputs[-1].abs().mean())
            hole = below(total, threshold)
        if hole:
            v = x + (outputs[computed[-1]] - inputs[computed[-1]])
        else:
            v, total = field(x, now), 0.0
            if computed:
                h = computed[-1]
                rate = float((v - outputs[h]).abs().mean()) / float((x - inputs[h]).abs().mean())
            computed.append(step)
        inputs.append(x)
        outputs.append(v)
        x = x + (after - now) * v
    return computed, x


@given(SEEDS, st.sampled_from([0.05, 0.15, 0.3, 0.8]), st.integers(1, 6), st.integers(0, 3))
def test_easycache_is_its_rule(seed: int, threshold: float, first: int, last: int) -> None:
    levels, x, computed = sigmas(STEPS), random(1, 4, 6, seed=seed), []
    wanted, end = easy_rule(x, levels, threshold, first, last)
    cache = VelocityCache(EasyCache(threshold, first=first, last=last), predictor=Offset())
    with cache.generation(levels):
        for step, (now, after) in enumerate(pairwise(levels)):

            def predict(step: int = step, now: float = now, x: Tensor = x) -> Tensor:
                computed.append(step)
                return field(x, now)

            x = x + (after - now) * cache.velocity(predict, x)
    assert computed == wanted
    assert torch.allclose(x.double(), end, rtol=1e-4, atol=1e-4)  # float32, over 14 steps that stretch what is wrong


def test_easycache_lets_the_first_side_decide() -> None:
    """Inputs of the other side jump about; still it follows."""
    cache = VelocityCache(EasyCache(1.0, first=3), predictor=Offset())
    computed: dict[str, list[int]] = {"cond": [], "uncond": []}
    with cache.generation(10):
        for step, x in enumerate(walk(10, 1)):
            for branch, latents in (("cond", x), ("uncond", random(2, 6, seed=step))):

                def predict(branch: str = branch, step: int = step, latents: Tensor = latents) -> Tensor:
                    computed[branch].append(step)
                    return field(latents, 0.5)

                cache.velocity(predict, latents, branch=branch)
    assert computed["cond"] == computed["uncond"]
    assert 3 < len(computed["cond"]) < 10


# ---- MagCache ------------------------------------------------------------------------------------------------------


def mag_rule(ratios: Sequence[float], threshold: float, in_a_row: int, retention: float) -> list[bool]:
    """The published counters, over the calls of both sides of the guidance one after the other; True is computed."""
    calls = len(ratios)
    product, error, skipped = [1.0, 1.0], [0.0, 0.0], [0, 0]
    result = []
    for call in range(calls):
        side, hole = call % 2, False
        if call >= int(calls * retention):
            product[side] *= ratios[call]
            skipped[side] += 1
            error[side] += abs(1 - product[side])
            if error[side] < threshold and skipped[side] <= in_a_row:
                hole = True
            else:
                product[side], error[side], skipped[side] = 1.0, 0.0, 0
        result.append(not hole)
    return result


@given(
    st.lists(st.floats(0.8, 1.1), min_size=40, max_size=40),
    st.sampled_from([0.0, 0.06, 0.12, 0.24, 5.0]),
    st.integers(1, 6),
    st.sampled_from([0.1, 0.2, 0.5]),
)
def test_magcache_is_its_rule(ratios: list[float], threshold: float, in_a_row: int, retention: float) -> None:
    wanted = mag_rule(ratios, threshold, in_a_row, retention)
    policy = MagCache({"cond": ratios[::2], "uncond": ratios[1::2]}, threshold, in_a_row, retention)
    assert not policy.needs
    assert not policy.dynamic
    for side, branch in enumerate(("cond", "uncond")):
        got, _ = drive(policy, [Evidence()] * 20, forced=(), branch=branch)
        assert got == wanted[side::2]
        alone = MagCache(ratios[side::2], threshold, in_a_row, retention)
        assert drive(alone, [Evidence()] * 20, forced=())[0] == got


@given(st.integers(1, 30), st.integers(1, 60))
def test_ratios_of_another_number_of_steps_are_the_nearest(known: int, steps: int) -> None:
    ratios = [1 + (n + 1) / 100 for n in range(known)]
    policy = MagCache(ratios, 1e9, 1, retention=0.0)
    for step in range(steps):
        one = copy.deepcopy(policy)
        decision = one.decide(moment(step, steps), Evidence())
        assert decision.indicator is not None
        taken = round(decision.indicator * 100) - 1
        place = step / max(1, steps - 1) * (known - 1)
        assert abs(taken - place) <= 0.5 + 1e-9


def test_ratios_of_a_branch_that_was_not_measured() -> None:
    with pytest.raises(ConfigError, match="'uncond'"):
        MagCache({"cond": [1.0]}, 0.1, 1, retention=0.0).decide(moment(0, branch="uncond"), Evidence())


def test_calibration_measures_the_mean_over_tokens() -> None:
    residuals = {
        b: [random(2, 5, 8, seed=seed + 10 * n) for seed in range(6)] for n, b in enumerate(("cond", "uncond"))
    }
    calibration = MagCalibration()
    cache = VelocityCache(calibration)
    for generation in range(2):  # the second one in the opposite order: ratios are the mean of both
        with cache.generation(6):
            for step in range(6):
                for branch, values in residuals.items():
                    value = values[-1 - step if generation else step]
                    cache.velocity(constant(value), value, branch=branch)

    def ratio(now: Tensor, before: Tensor) -> float:
        tokens = [(now[b, s].norm() / before[b, s].norm()).item() for b in range(2) for s in range(5)]
        return math.fsum(tokens) / len(tokens)

    for branch, v in residuals.items():
        there = [ratio(v[step], v[step - 1]) for step in range(1, 6)]
        back = [ratio(v[5 - step], v[6 - step]) for step in range(1, 6)]
        wanted = [1.0, *((a + b) / 2 for a, b in zip(there, back, strict=True))]
        assert calibration.found.ratios(branch) == pytest.approx(wanted, rel=1e-5)  # float32
    assert calibration.found.by_branch() == {b: calibration.found.ratios(b) for b in residuals}
    MagCache(calibration.found.by_branch(), 0.1, 2)


def test_calibration_of_a_velocity_has_its_tokens_along_the_channels() -> None:
    v = [random(1, 4, 2, 3, 5, seed=seed) for seed in range(2)]
    calibration = MagCalibration(dim=1)
    cache = VelocityCache(calibration)
    with cache.generation(2):
        for value in v:
            cache.velocity(constant(value), value)
    wanted = (v[1].norm(dim=1) / v[0].norm(dim=1)).mean().item()
    assert calibration.found.ratios() == pytest.approx((1.0, wanted), rel=1e-5)  # float32


def test_tokens_that_were_zero_are_left_out() -> None:
    before, now = torch.ones(1, 3, 4), torch.full((1, 3, 4), 2.0)
    before[0, 1] = 0
    calibration = MagCalibration()
    for step, value in enumerate((before, now)):
        calibration.computed(moment(step, 2), Evidence(), (value,))
    assert calibration.found.ratios() == (1.0, 2.0)


def test_calibrations_that_are_no_table() -> None:
    found = MagRatios()
    with pytest.raises(ConfigError, match="not measured"):
        found.ratios("cond")
    found.add(moment(1, 4, "cond"), 0.9)
    found.add(moment(3, 4, "cond"), 0.9)
    with pytest.raises(ConfigError, match="not measured over a whole generation"):
        found.ratios("cond")
    with pytest.raises(GenerationError, match="4 steps"):
        found.add(moment(1, 5, "cond"), 0.9)


# ---- FirstBlock ----------------------------------------------------------------------------------------------------


@given(SEEDS, THRESHOLDS, st.sets(st.integers(0, STEPS - 1), max_size=3))
def test_first_block_compares_with_the_last_computed_step(seed: int, threshold: float, guarded: set[int]) -> None:
    values = walk(STEPS, seed, pace=0.5)
    wanted, last = [], 0
    for step in range(STEPS):
        hole = step > 0 and below(change(values[step], values[last]), threshold)
        wanted.append(not hole or step in guarded)
        last = step if wanted[-1] else last
    assert drive(FirstBlock(threshold), probes(values), forced=tuple(guarded))[0] == wanted


def test_a_probe_is_run_once_a_decision() -> None:
    values, runs = walk(STEPS, 3, pace=0.5), []

    def probe(value: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            runs.append(value)
            return value

        return run

    got, _ = drive(FirstBlock(0.25), [Evidence(probe=probe(value)) for value in values])
    assert len(runs) == STEPS
    assert 1 < sum(got) < STEPS  # not a no-op


# ---- what they have in common --------------------------------------------------------------------------------------

CASES: list[tuple[Policy, set[str], bool, bool]] = [
    (TeaCache(0.2), {"signal"}, True, False),
    (EasyCache(0.2), {"latents"}, True, True),
    (FirstBlock(0.2), {"probe"}, True, False),
    (MagCache([1.0], 0.1, 2), set(), False, False),
    (MagCalibration(), set(), False, False),
]


@pytest.mark.parametrize(("policy", "needs", "dynamic", "once"), CASES, ids=lambda each: type(each).__name__)
def test_gates_are_policies(policy: Policy, needs: set[str], dynamic: bool, once: bool) -> None:
    assert isinstance(policy, Policy)
    assert policy.needs == frozenset(needs)
    assert (policy.dynamic, policy.once) == (dynamic, once)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often a number is fetched from the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "policy", [TeaCache(0.2), EasyCache(0.2, first=2), FirstBlock(0.2)], ids=lambda p: type(p).__name__
)
def test_a_decision_waits_once(policy: Policy) -> None:
    policy, waits = copy.deepcopy(policy), []
    for step, x in enumerate(walk(STEPS, 5, pace=0.5)):
        seen = Evidence(latents=x, signal=constant(x), probe=constant(x))
        with Waits() as counted:  # type: ignore[no-untyped-call]
            decision = policy.decide(moment(step), seen)
        waits.append(counted.count)
        with Waits() as counted:  # type: ignore[no-untyped-call]
            if decision.compute:
                policy.computed(moment(step), seen, (field(x, 0.5),))
        assert counted.count == 0
    assert max(waits) == 1
    assert sum(waits) > STEPS / 2


@pytest.mark.parametrize("policy", [TeaCache(0.25), FirstBlock(0.25)], ids=lambda p: type(p).__name__)
def test_what_is_looked_at_may_be_written_over(policy: Policy) -> None:
    values, buffer = walk(STEPS, 3, pace=0.5), torch.empty(2, 6)

    def reused(value: Tensor) -> Callable[[], Tensor]:
        return lambda: buffer.copy_(value)

    got, _ = drive(policy, [Evidence(signal=reused(value), probe=reused(value)) for value in values])
    wanted, _ = drive(policy, [Evidence(signal=constant(value), probe=constant(value)) for value in values])
    assert got == wanted
    assert 1 < sum(got) < STEPS


@pytest.mark.parametrize("policy", [TeaCache(0.0), EasyCache(0.0, first=2), FirstBlock(0.0), MagCache([1.0], 0.0, 9)])
def test_at_a_threshold_of_0_even_what_stands_still_is_computed(policy: Policy) -> None:
    policy, x = copy.deepcopy(policy), torch.ones(2, 3)
    for step in range(STEPS):
        seen = Evidence(latents=x + min(step, 2), signal=constant(x), probe=constant(x))
        assert policy.decide(moment(step), seen).compute
        policy.computed(moment(step), seen, (x + min(step, 2),))


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 1.0), (math.nan, 1.0), (1.0, math.inf)], ids=str)
@pytest.mark.parametrize(
    "policy",
    [TeaCache(1e30), TeaCache(1e30, (-1.0, 0.0)), EasyCache(1e30, first=2), FirstBlock(1e30)],
    ids=["identity", "negative", "easy", "probe"],
)
def test_what_cannot_be_compared_is_computed(policy: Policy, values: tuple[float, float]) -> None:
    """The change of nothing is not small; nor is one that is no number, whatever a polynomial makes of it."""
    policy, (before, now) = copy.deepcopy(policy), values
    for step in range(1, 4):
        x = torch.full((2, 3), now if step == 3 else before)
        seen = Evidence(latents=x, signal=constant(x), probe=constant(x))
        decision = policy.decide(moment(step), seen)
        if step == 3:
            assert decision == Decision(True, "not comparable")
        policy.computed(moment(step), seen, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_change_is_measured_in_float32(dtype: torch.dtype) -> None:
    now, before = (1 + 0.01 * random(64, 1024, seed=seed).to(dtype) for seed in (1, 2))
    assert float(relative_l1(now, before)) == pytest.approx(float(relative_l1(now.float(), before.float())), rel=1e-6)
    assert relative_l1(now, before).dtype == torch.float32


@pytest.mark.parametrize(
    ("policy", "missing"), [(TeaCache(0.1), "signal"), (EasyCache(0.1), "latents"), (FirstBlock(0.1), "probe")]
)
def test_evidence_that_was_not_given(policy: Policy, missing: str) -> None:
    with pytest.raises(ParametersInvalid, match=missing):
        policy.decide(moment(0), Evidence())


@pytest.mark.parametrize("make", [TeaCache, EasyCache, FirstBlock, lambda t: MagCache([1.0], t, 1)])
@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_thresholds_that_are_refused(make: Callable[[float], Policy], threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold (is )?{threshold}"):
        make(threshold)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TeaCache(0.1, ()),
        lambda: FirstBlock(0.1, first=0),
        lambda: FirstBlock(0.1, last=-1),
        lambda: MagCache([], 0.1, 1),
        lambda: MagCache({"cond": [1.0, math.nan]}, 0.1, 1),
        lambda: MagCache([1.0, 0.0], 0.1, 1),
        lambda: MagCache([1.0], 0.1, 0),
        lambda: MagCache([1.0], 0.1, 1, retention=1.5),
    ],
)
def test_arguments_that_are_refused(make: Callable[[], Policy]) -> None:
    with pytest.raises(ValueError, match=r"were given|have to be|are empty"):
        make()


def test_a_template_is_never_written_to() -> None:
    """Two generations with one cache decide the same, for every gate."""
    for policy in (TeaCache(0.2), EasyCache(0.4, first=2), MagCache([0.97] * 12, 0.12, 3)):
        cache = VelocityCache(policy, predictor=Offset() if policy.once else Reuse())
        runs = []
        for _ in range(2):
            computed: list[int] = []
            with cache.generation(12):
                for step, x in enumerate(walk(12, 9, pace=0.3)):

                    def predict(step: int = step, x: Tensor = x, computed: list[int] = computed) -> Tensor:
                        computed.append(step)
                        return field(x, 0.5)

                    cache.velocity(predict, x, signal=constant(x))
            runs.append(computed)
        assert runs[0] == runs[1]
        assert 1 < len(runs[0]) < 12, policy
