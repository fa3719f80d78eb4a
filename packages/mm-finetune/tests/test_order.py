"""The order of samples: a function of the seed and the step alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mm_finetune.data import order, step_numbers


@given(count=st.integers(1, 50), batch=st.integers(1, 70), seed=st.integers(0, 9))
def test_steps_walk_through_whole_permutations(count: int, batch: int, seed: int) -> None:
    steps = -(-3 * count // batch)
    seen = [n for s in range(1, steps + 1) for n in step_numbers(count, s, global_batch_size=batch, seed=seed)]
    assert len(seen) == steps * batch
    for epoch in range(3):
        part = seen[epoch * count : (epoch + 1) * count]
        assert sorted(part) == list(range(count)), "every record once an epoch"
        assert part == order(count, seed=seed, epoch=epoch)


def test_order_depends_on_seed_and_epoch() -> None:
    assert order(20, seed=0, epoch=0) == order(20, seed=0, epoch=0)
    assert len({tuple(order(20, seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


@given(count=st.integers(1, 30), batch=st.integers(1, 20), steps=st.lists(st.integers(1, 40), max_size=8))
def test_a_step_does_not_depend_on_the_steps_before_it(count: int, batch: int, steps: list[int]) -> None:
    straight = [n for s in range(1, 41) for n in step_numbers(count, s, global_batch_size=batch, seed=3)]
    for step in steps:  # as a run that resumes anywhere
        expected = straight[(step - 1) * batch : step * batch]
        assert step_numbers(count, step, global_batch_size=batch, seed=3) == expected


def test_a_step_at_the_end_of_an_epoch_goes_on_with_the_next() -> None:
    # 5 records in steps of 3: the second step holds the last two of the first epoch and the first of the second.
    first, second = order(5, seed=0, epoch=0), order(5, seed=0, epoch=1)
    assert step_numbers(5, 2, global_batch_size=3, seed=0) == [*first[3:], second[0]]
