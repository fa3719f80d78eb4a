"""What is put in a hole, against the formulas written another way, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_cache.engine.moment import Moment
from dit_cache.engine.predictors import Offset, Planned, Reuse, Secant, Taylor
from dit_cache.engine.protocols import Predictor, Weights

# A sum of five products in another order differs by a few units in the last place of its largest term, 2^-52 each; a
# weight is a product of at most four quotients of differences, with as many roundings.
ROUNDING = 64 * 2.0**-52

ORDERS = st.integers(0, 4)
NUMBERS = st.floats(-2, 2, allow_subnormal=False)
# Multiples of 1/64: differences of them are exact, and none is so small that the weights explode.
TIMES = st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=8, max_size=8, unique=True)


def moments(times: Sequence[float]) -> list[Moment]:
    return [Moment(step=step, steps=50, time=time) for step, time in enumerate(times)]


def hole(time: float, step: int = 40) -> Moment:
    return Moment(step=step, steps=50, time=time)


def combined(weights: Weights, values: Sequence[float], latents: Sequence[float] = (), here: float = 0.0) -> float:
    assert len(weights.values) == len(values)
    at_latents = weights.latents or (0.0,) * len(latents)
    terms = [w * v for w, v in zip(weights.values, values, strict=True)]
    return math.fsum([*terms, *(w * x for w, x in zip(at_latents, latents, strict=True)), weights.here * here])


def size(weights: Weights, *numbers: float) -> float:
    largest = max(map(abs, numbers), default=0.0)
    return largest * sum(map(abs, (*weights.values, *weights.latents, weights.here, 1.0)))


def newton(times: Sequence[float], values: Sequence[float], at: float) -> float:
    """The polynomial through all points, by divided differences, from the newest point on."""
    nodes, column = list(times[::-1]), list(values[::-1])
    result, product = column[0], 1.0
    for degree in range(1, len(nodes)):
        column = [(column[n + 1] - column[n]) / (nodes[n + degree] - nodes[n]) for n in range(len(column) - 1)]
        product *= at - nodes[degree - 1]
        result += column[0] * product
    return result


@given(TIMES, ORDERS, st.lists(NUMBERS, min_size=5, max_size=5))
def test_taylor_reproduces_polynomials_of_its_degree(times: list[float], order: int, coefficients: list[float]) -> None:
    def polynomial(time: float) -> float:
        return math.fsum(c * time**power for power, c in enumerate(coefficients[: order + 1]))

    *kept, at = times
    weights = Taylor(order).weights(hole(at), moments(kept))
    values = [polynomial(time) for time in kept]
    assert abs(combined(weights, values) - polynomial(at)) <= ROUNDING * size(weights, *values, *coefficients)


@given(TIMES, ORDERS, st.integers(1, 7), st.lists(NUMBERS, min_size=7, max_size=7))
def test_taylor_is_newtons_polynomial_through_the_last_values(
    times: list[float], order: int, count: int, values: list[float]
) -> None:
    kept, values, at = times[:count], values[:count], times[-1]
    weights = Taylor(order).weights(hole(at), moments(kept))
    used = min(order + 1, count)
    # Newton's sum has intermediate terms of its own; the smallest gap bounds how they grow.
    gap = min(abs(a - b) for n, a in enumerate(times) for b in times[:n])
    growth = sum(gap**-power for power in range(used))
    wanted = newton(kept[-used:], values[-used:], at)
    assert abs(combined(weights, values) - wanted) <= ROUNDING * max(size(weights, *values), growth * 2**used)


@given(TIMES)
def test_orders_0_and_1_are_the_last_value_and_the_line(times: list[float]) -> None:
    *kept, at = times
    assert Taylor(0).weights(hole(at), moments(kept)) == Reuse().weights(hole(at), moments(kept))
    slope = (at - kept[-1]) / (kept[-1] - kept[-2])
    line = Taylor(1).weights(hole(at), moments(kept)).values
    assert line[:-2] == (0.0,) * 5
    assert line[-2:] == pytest.approx((-slope, 1 + slope), rel=ROUNDING, abs=ROUNDING)


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(1), Taylor(4), Secant(), Offset(), Planned()], ids=repr)
def test_one_kept_value_is_repeated(predictor: Predictor) -> None:
    weights = predictor.weights(hole(0.3), moments([0.9]))
    assert weights.values == (1.0,)
    assert sum(weights.latents) + weights.here == 0


@pytest.mark.parametrize("order", [-1, 5])
def test_an_order_that_extrapolates_noise_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 4"):
        Taylor(order)


@given(TIMES, st.integers(1, 7))
def test_weights_keep_what_is_constant(times: list[float], count: int) -> None:
    kept, at = moments(times[:count]), hole(times[-1])
    predictors: list[Predictor] = [Reuse(), *(Taylor(order) for order in range(5)), Planned(orders={40: 2}), Offset()]
    for predictor in predictors:
        weights = predictor.weights(at, kept)
        assert abs(sum(weights.values) - 1) <= ROUNDING * size(weights, 1.0), predictor
        assert len(weights.values) == count
        assert not any(weights.values[: -predictor.history]), predictor
    for predictor in (Offset(), Secant()):
        weights = predictor.weights(at, kept)  # a shift of all latents changes nothing
        assert abs(sum(weights.latents) + weights.here) <= ROUNDING * size(weights, 1.0)


@given(TIMES, st.lists(NUMBERS, min_size=14, max_size=14))
def test_secant_is_its_formula(times: list[float], numbers: list[float]) -> None:
    *kept, t = times
    values, latents = numbers[:7], numbers[7:]
    (t_i, t_j), (v_i, v_j), (x_i, x_j) = kept[-2:], values[-2:], latents[-2:]
    slope = (x_j - x_i - (t_j - t_i) * v_i) / (t_j - t_i) ** 2
    weights = Secant().weights(hole(t), moments(kept))
    assert abs(combined(weights, values, latents) - (v_j + (t - t_j) * slope)) <= ROUNDING * size(weights, *numbers)


@given(TIMES, NUMBERS, NUMBERS)
def test_secant_gives_the_mean_of_a_line_over_the_jump(times: list[float], level: float, slope: float) -> None:
    """Where v(t) = level + slope·t, and x is its integral, the mean of v from t_j to t is that at the middle."""
    *kept, t = times
    values = [level + slope * time for time in kept]
    latents = [level * time + slope * time**2 / 2 for time in kept]
    weights = Secant().weights(hole(t), moments(kept))
    mean = level + slope * (kept[-1] + t) / 2
    assert abs(combined(weights, values, latents) - mean) <= ROUNDING * size(weights, level, slope)


@given(TIMES, st.lists(NUMBERS, min_size=15, max_size=15))
def test_offset_is_its_formula(times: list[float], numbers: list[float]) -> None:
    values, latents, here = numbers[:7], numbers[7:14], numbers[14]
    weights = Offset().weights(hole(times[-1]), moments(times[:-1]))
    wanted = here + (values[-1] - latents[-1])
    assert abs(combined(weights, values, latents, here) - wanted) <= ROUNDING * size(weights, *numbers)


def test_planned_takes_the_order_of_the_hole() -> None:
    planned = Planned(orders={3: 0, 4: 2})
    kept = moments([1.0, 0.9, 0.7])
    for step, order in ((3, 0), (4, 2), (5, 1)):  # 5 is not named
        assert planned.weights(hole(0.6, step), kept) == Taylor(order).weights(hole(0.6, step), kept)
    assert planned.history == 3


FITTED = Planned(orders={6: 2}, fitted={6: {1: 0.25, 4: 0.5}})


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1, 4], (0.25, 0.5)),
        ([0, 1, 4], (0.0, 0.25, 0.5)),
        ([1, 4, 5], None),  # a guard computed 5
        ([1, 3, 4], None),  # and here 3
        ([4], None),
        ([0, 4], None),
    ],
)
def test_fitted_weights_are_for_the_values_they_were_fitted_to(
    steps: list[int], expected: tuple[float, ...] | None
) -> None:
    kept = [Moment(step=step, steps=10, time=1 - step / 10) for step in steps]
    at = Moment(step=6, steps=10, time=0.4)
    assert FITTED.weights(at, kept) == (Taylor(2).weights(at, kept) if expected is None else Weights(expected))


@pytest.mark.parametrize(
    ("planned", "history"),
    [
        (Planned(), 2),
        (Planned(orders={1: 0}), 2),  # a hole that is not named takes a line
        (Planned(orders={1: 0, 2: 3}), 4),
        (Planned(fitted={5: {0: 1.0, 2: 0.5, 4: -0.5}}), 3),
        (FITTED, 3),
    ],
)
def test_planned_looks_back_as_far_as_any_hole(planned: Planned, history: int) -> None:
    assert planned.history == history


@pytest.mark.parametrize(
    ("make", "uses_latents"),
    [(Reuse, False), (Taylor, False), (Planned, False), (Secant, True), (Offset, True)],
)
def test_predictors_say_whether_they_use_latents(make: Callable[[], Predictor], uses_latents: bool) -> None:
    predictor = make()
    assert isinstance(predictor, Predictor)
    assert predictor.uses_latents is uses_latents
    weights = predictor.weights(hole(0.1), moments([0.9, 0.5]))
    assert bool(any(weights.latents) or weights.here) is uses_latents
