import math

import pytest

from mm_finetune.schedule import learning_rate


def test_warm_up_is_linear_and_the_first_step_moves() -> None:
    rates = [learning_rate(s, steps=100, lr=1.0, warmup_steps=10) for s in range(1, 11)]
    assert rates == pytest.approx([s / 10 for s in range(1, 11)])


def test_cosine_is_half_way_down_in_the_middle_and_above_the_minimum_at_the_end() -> None:
    assert learning_rate(50, steps=99, lr=1.0, min_lr=0.2) == pytest.approx(0.6)
    last = learning_rate(99, steps=99, lr=1.0, min_lr=0.2)
    assert 0.2 < last < 0.21
    assert last == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 0.99)) / 2)


def test_it_never_rises_after_warm_up() -> None:
    rates = [learning_rate(s, steps=40, lr=1e-3, warmup_steps=4) for s in range(4, 41)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1e-3
