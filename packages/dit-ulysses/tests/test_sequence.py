from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_all
from torch import Tensor

from dit_ulysses import ShapeError, gather_sequence, split_sequence
from dit_ulysses.shares import spans

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)


def there_and_back(lengths: tuple[int, ...]) -> None:
    rank, total = dist.get_rank(), sum(lengths)
    start, end = spans(lengths)[rank]
    for dtype in DTYPES:
        for dim, shape in ((0, (total, 3)), (1, (2, total, 3)), (-1, (2, 1, total)), (0, (total,))):
            whole = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
            part = split_sequence(whole, dim, group=None, lengths=lengths)
            assert torch.equal(part, whole.narrow(dim, start, end - start))
            assert part.is_contiguous()
            again = gather_sequence(part, dim, group=None, lengths=lengths)
            assert again.dtype == dtype
            assert torch.equal(again, whole)
            assert again.is_contiguous()


@pytest.mark.parametrize(
    "lengths", [(5,), (3, 4), (2, 2, 2), (0, 5, 1), (1, 0, 0, 0), (3, 0, 2, 2, 2, 2, 2, 1)], ids=str
)
def test_a_sequence_is_split_and_gathered(lengths: tuple[int, ...]) -> None:
    run_all(len(lengths), there_and_back, lengths)


def gradients(lengths: tuple[int, ...]) -> None:
    """Of whole numbers, so that sums are exact in any order."""
    rank, ranks, total = dist.get_rank(), len(lengths), sum(lengths)
    start, end = spans(lengths)[rank]
    whole = torch.arange(2.0 * total).view(2, total).requires_grad_()
    weights = torch.arange(1.0, 2 * total + 1).view(2, total)

    part = split_sequence(whole, 1, group=None, lengths=lengths)
    (found,) = torch.autograd.grad((part**2 * weights[:, start:end]).sum(), whole)
    assert torch.equal(found, 2 * whole * weights)  # whole on every rank

    for gradient, factor in (("same", 1.0), ("sum", sum(range(1, ranks + 1)))):
        mine = whole.detach()[:, start:end].clone().requires_grad_()
        kind: Any = gradient
        again = gather_sequence(mine, 1, group=None, lengths=lengths, gradient=kind)
        scale = 1.0 if gradient == "same" else rank + 1.0  # "sum": every rank has a loss of its own
        (found,) = torch.autograd.grad((again * weights).sum() * scale, mine)
        assert torch.equal(found, weights[:, start:end] * factor)


@pytest.mark.parametrize("lengths", [(4,), (2, 3), (0, 4, 3), (2, 2, 2, 2)], ids=str)
def test_gradients_go_the_way_back(lengths: tuple[int, ...]) -> None:
    run_all(len(lengths), gradients, lengths)


def default_lengths() -> list[float]:
    part = split_sequence(torch.arange(10), 0, group=None)
    assert part.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]][dist.get_rank()]
    whole = gather_sequence(torch.full((2,), dist.get_rank()), 0, group=None)
    return [float(value) for value in whole]


def test_without_lengths_parts_are_even() -> None:
    for whole in run_all(4, default_lengths):
        assert whole == [0, 0, 1, 1, 2, 2, 3, 3]


def bad_calls() -> None:
    x, kind = torch.zeros(2, 3), "mean"
    wrong: Any = kind
    calls: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: split_sequence(x, 2, group=None), "from -2 to 1"),
        (lambda: split_sequence(x, 1, group=None, lengths=[2]), "add up to the 3 of dimension 1"),
        (lambda: split_sequence(x, 1, group=None, lengths=[2, 1]), "1 numbers"),
        (lambda: gather_sequence(x, -3, group=None), "from -2 to 1"),
        (lambda: gather_sequence(x, 1, group=None, lengths=[2]), "holds 3 tokens, not 2"),
        (lambda: gather_sequence(x, 1, group=None, gradient=wrong), '"same" or "sum"'),
    ]
    for call, said in calls:
        with pytest.raises(ShapeError, match=said):
            call()


def test_bad_input_is_told() -> None:
    run_all(1, bad_calls)
