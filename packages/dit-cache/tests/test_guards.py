"""When it is computed after all."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dit_cache.engine.guards import Envelope, Limits
from dit_cache.engine.moment import Evidence, Moment
from dit_cache.engine.policies import Interval, Static
from dit_cache.engine.protocols import Guard
from dit_cache.engine.velocity import VelocityCache

NOTHING = Evidence()


def moment(step: int, steps: int = 20) -> Moment:
    return Moment(step=step, steps=steps, time=1 - step / steps)


def generation(cache: VelocityCache, values: list[float]) -> list[int]:
    """Run over velocities that are all one number; return the computed steps."""
    computed = []
    with cache.generation(len(values)):
        for step, value in enumerate(values):

            def predict(step: int = step, value: float = value) -> Tensor:
                computed.append(step)
                return torch.full((2, 3), value)

            cache.velocity(predict, torch.zeros(2, 3))
    return computed


@given(
    st.sets(st.integers(0, 19)),
    st.integers(0, 21),
    st.integers(0, 21),
    st.one_of(st.none(), st.integers(1, 20)),
)
def test_limits_bound_any_policy(planned: set[int], first: int, last: int, in_a_row: int | None) -> None:
    planned |= {0}
    skipped, wanted = 0, []
    for step in range(20):
        compute = step in planned or step < first or step >= 20 - last or skipped == in_a_row
        skipped = 0 if compute else skipped + 1
        wanted += [step] if compute else []
    cache = VelocityCache(Static(planned), guards=[Limits(first=first, last=last, in_a_row=in_a_row)])
    assert generation(cache, [1.0] * 20) == wanted


def test_limits_say_why() -> None:
    limits = Limits(first=2, last=3, in_a_row=4)
    reasons = [limits.overrule(moment(step), NOTHING, skipped=4 if step == 9 else 0) for step in range(20)]
    wanted = [*["first steps"] * 2, *[None] * 7, "too many holes", *[None] * 7, *["last steps"] * 3]
    assert reasons == wanted


@pytest.mark.parametrize("guard", [Limits(), Envelope(bounds={})], ids=repr)
def test_guards_are_guards(guard: Guard) -> None:
    assert isinstance(guard, Guard)
    assert guard.needs == frozenset()
    assert guard.dynamic is isinstance(guard, Envelope)


# Computed are 0, 3, 6, …; each value is 1.1 times the one three steps before: a change of 0.1.
CALM = [1.1 ** (step / 3) for step in range(18)]
BOUNDS = dict.fromkeys(range(3, 18, 3), (0.09, 0.11))
PLANNED = list(range(0, 18, 3))


def enveloped(values: list[float], extra: int = 2) -> list[int]:
    cache = VelocityCache(Interval(interval=3), guards=[Envelope(bounds=BOUNDS, extra=extra)])
    first = generation(cache, values)
    assert generation(cache, values) == first  # the budget is that of a generation
    return first


def test_inside_the_envelope_nothing_is_added() -> None:
    assert enveloped(CALM) == PLANNED


@pytest.mark.parametrize("factor", [3.0, 0.92, math.nan, math.inf], ids=["more", "less", "nan", "inf"])
def test_outside_of_it_the_next_hole_is_computed(factor: float) -> None:
    values = [value * (factor if step >= 6 else 1) for step, value in enumerate(CALM)]
    added = [step for step in enveloped(values, extra=1) if step not in PLANNED]
    assert added == [7]


def test_the_last_values_are_compared_over_the_steps_of_calibration() -> None:
    """The step that was added is nearer to the next one than calibration ever saw; that is no reason to add another."""
    values = [value * (3.0 if step >= 6 else 1) for step, value in enumerate(CALM)]
    assert enveloped(values, extra=5) == sorted([*PLANNED, 7])


def test_extra_steps_are_bounded() -> None:
    wild = [1.0 + 5 * (step % 2) for step in range(18)]
    for extra in range(7):
        added = [step for step in enveloped(wild, extra=extra) if step not in PLANNED]
        assert added == [4, 7, 10, 13, 16][:extra]


def test_a_change_is_relative_to_the_value_before() -> None:
    """Just inside and just outside of the bounds."""
    generator = torch.Generator().manual_seed(1)
    before, direction = torch.randn(2, 3, 4, generator=generator)
    direction *= before.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)
    for change, expected in ((0.199, None), (0.201, "outside the calibrated range"), (0.101, None), (0.099, "outside")):
        guard = copy.deepcopy(Envelope(bounds={3: (0.1, 0.2)}))
        guard.computed(moment(0), NOTHING, (before,))
        guard.computed(moment(3), NOTHING, (before + change * direction,))
        got = guard.overrule(moment(4), NOTHING, skipped=0)
        assert got is None if expected is None else str(got).startswith(expected)
        assert guard.overrule(moment(5), NOTHING, skipped=0) is None  # one alarm, one step


def test_one_strange_sample_of_a_batch_is_enough() -> None:
    guard = copy.deepcopy(Envelope(bounds={3: (0.1, 0.2)}))
    guard.computed(moment(0), NOTHING, (torch.ones(8, 5),))
    now = 1.15 * torch.ones(8, 5)
    now[3] = 1.5
    guard.computed(moment(3), NOTHING, (now,))
    assert guard.overrule(moment(4), NOTHING, skipped=0) is not None


def test_what_is_compared_is_a_copy() -> None:
    guard, value = copy.deepcopy(Envelope(bounds={3: (0.0, 0.1)})), torch.ones(3)
    guard.computed(moment(0), NOTHING, (value,))
    value.mul_(3)  # in place, by whoever made it
    guard.computed(moment(3), NOTHING, (value,))
    assert guard.overrule(moment(4), NOTHING, skipped=0) is not None


def test_guards_are_asked_in_their_order_and_only_about_holes() -> None:
    asked: list[tuple[str, int, int]] = []

    class Spy:
        needs: frozenset[str] = frozenset()
        dynamic = False

        def __init__(self, name: str, at: int) -> None:
            self.name, self.at = name, at

        def overrule(self, at: Moment, seen: Evidence, *, skipped: int) -> str | None:
            asked.append((self.name, at.step, skipped))
            return self.name if at.step == self.at else None

        def computed(self, at: Moment, seen: Evidence, value: tuple[Tensor, ...]) -> None:
            pass

    cache = VelocityCache(Static([0, 4]), guards=[Spy("one", 2), Spy("two", 3)])
    assert generation(cache, [1.0] * 6) == [0, 2, 3, 4]
    assert asked == [
        ("one", 1, 0),
        ("two", 1, 0),
        ("one", 2, 1),
        ("one", 3, 0),
        ("two", 3, 0),
        ("one", 5, 0),
        ("two", 5, 0),
    ]
