from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_all
from torch import Tensor
from torch.nn import functional as F

from dit_ulysses import ShapeError, WireMeter, gather_sequence, halo_exchange
from dit_ulysses.halo import _wanted
from dit_ulysses.shares import spans

# A kernel may block a smaller image in another way, and so add up its terms in another order: eps(fp32) = 1.2e-7 of
# sums of some 100 terms of sizes 1 to 10. Rows themselves are equal to the bit: `test_rows_are_those_of_the_whole`.
ROUNDING = 5e-5


def rows(cases: list[tuple[tuple[int, ...], int, int]]) -> None:
    for lengths, before, after in cases:
        whole = torch.arange(1.0, sum(lengths) * 6 + 1).view(2, -1, 3).transpose(0, 2)  # strides of no layout
        start, end = spans(lengths)[dist.get_rank()]
        padded = F.pad(whole, (0, 0, before, after))
        part = whole[:, start:end]
        found = halo_exchange(part, 1, before, after, group=None, lengths=lengths)
        assert torch.equal(found, padded[:, start : end + before + after]), (lengths, before, after)
        found = halo_exchange(part, -2, before, after, group=None, lengths=lengths, edges="none")
        assert torch.equal(found, whole[:, max(0, start - before) : end + after]), (lengths, before, after)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_rows_are_those_of_the_whole(ranks: int) -> None:
    shards = {(3,) * ranks, tuple(range(1, ranks + 1)), (0, *range(ranks))[:-1] or (1,), (4, *[1] * (ranks - 1))}
    run_all(ranks, rows, [(shard, *halo) for shard in shards for halo in ((1, 1), (0, 1), (2, 0), (5, 3), (0, 0))])


def same(x: Tensor, weight: Tensor, lengths: Any) -> Tensor:
    if lengths is None:
        return F.conv2d(x, weight, padding=1)
    return F.conv2d(halo_exchange(x, 2, 1, 1, group=None, lengths=lengths), weight, padding=(0, 1))


def halved(x: Tensor, weight: Tensor, lengths: Any) -> Tensor:
    if lengths is None:
        return F.conv2d(x, weight, stride=2, padding=1)
    return F.conv2d(halo_exchange(x, 2, 1, 0, group=None, lengths=lengths), weight, stride=2, padding=(0, 1))


def stack(x: Tensor, weight: Tensor, lengths: Any) -> Tensor:
    """Two convolutions, half the size, one more, twice the size, one more."""
    half = None if lengths is None else [length // 2 for length in lengths]
    x = torch.tanh(same(x, weight, lengths))
    x = torch.tanh(same(x, weight, lengths))
    x = torch.tanh(halved(x, weight, lengths))
    x = torch.tanh(same(x, weight, half))
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return same(x, weight, lengths)


def causal(x: Tensor, weight: Tensor, lengths: Any) -> Tensor:
    """In three dimensions: frames look back only, and rows are spread."""
    weight = weight[:, :, None].repeat(1, 1, 3, 1, 1)
    video = torch.stack([x, x * 2, x * 3, x * 5], dim=2)
    rows = 1 if lengths is None else 0
    if lengths is not None:
        video = halo_exchange(video, 3, 1, 1, group=None, lengths=lengths)
    return F.conv3d(F.pad(video, (1, 1, rows, rows, 2, 0)), weight).flatten(1, 2)


def convolve(name: str, lengths: tuple[int, ...]) -> tuple[float, ...]:
    network = {"stack": stack, "causal": causal}[name]
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(4, 4, 3, 3, generator=generator) / 6).requires_grad_()
    x = torch.randn(2, 4, sum(lengths), 6, generator=generator).requires_grad_()
    wanted = network(x, weight, None)
    gradient = torch.randn(wanted.shape, generator=generator)
    theirs = torch.autograd.grad(wanted, (x, weight), gradient)

    start, end = spans(lengths)[dist.get_rank()]
    part = x.detach()[:, :, start:end].clone().requires_grad_()
    found = network(part, weight, lengths)
    ours = torch.autograd.grad(found, (part, weight), gradient[:, :, start:end])
    dist.all_reduce(ours[1])
    whole = gather_sequence(found.detach(), 2, group=None, lengths=lengths)
    pairs = ((whole, wanted), (ours[0], theirs[0][:, :, start:end]), (ours[1] / 10, theirs[1] / 10))  # of size 10
    return tuple(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", ["stack", "causal"])
@pytest.mark.parametrize("lengths", [(8,), (4, 8), (2, 2, 2), (6, 2, 4, 10)], ids=str)
def test_convolutions_of_shards_are_those_of_the_whole(name: str, lengths: tuple[int, ...]) -> None:
    for errors in run_all(len(lengths), convolve, name, lengths):
        assert max(errors) <= ROUNDING, errors


def adjoint(lengths: tuple[int, ...]) -> None:
    """The gradient counts how often each row was read; all numbers are whole, so nothing is rounded."""
    part = torch.zeros(lengths[dist.get_rank()], requires_grad=True)
    found = halo_exchange(part, 0, 3, 1, group=None, lengths=lengths)
    (gradient,) = torch.autograd.grad(found.sum(), part)
    start, end = spans(lengths)[dist.get_rank()]
    read = [row for a, b in spans(lengths) for row in range(max(0, a - 3), min(sum(lengths), b + 1))]
    assert gradient.tolist() == [read.count(row) for row in range(start, end)]


@pytest.mark.parametrize("lengths", [(3, 4), (1, 0, 2, 1)], ids=str)
def test_a_row_gets_back_the_gradient_of_all_its_readers(lengths: tuple[int, ...]) -> None:
    run_all(len(lengths), adjoint, lengths)


def sent(lengths: tuple[int, ...]) -> int:
    with WireMeter() as meter:
        halo_exchange(torch.zeros(lengths[dist.get_rank()], 5), 0, 1, 1, group=None, lengths=lengths)
    return meter.total


def test_only_rows_that_are_wanted_are_sent() -> None:
    assert run_all(3, sent, (4, 4, 4)) == [5 * 4, 2 * 5 * 4, 5 * 4]


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), before=st.integers(0, 9), after=st.integers(0, 9))
def test_what_is_wanted_of_each_rank(lengths: list[int], before: int, after: int) -> None:
    here = spans(lengths)
    for reader, (start, end) in enumerate(here):
        parts = [_wanted(here, owner, reader, before, after) for owner in range(len(lengths))]
        got = [row for first, last in parts for row in range(first, last)]
        wanted = [*range(max(0, start - before), start), *range(end, min(sum(lengths), end + after))]
        assert got == wanted


def bad_calls() -> None:
    x, edge = torch.zeros(3, 2), "wrap"
    wrong: Any = edge
    calls: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: halo_exchange(x, 2, 1, 1, group=None), "from -2 to 1"),
        (lambda: halo_exchange(x, 0, -1, 1, group=None), "are -1, 1 and 'zeros'"),
        (lambda: halo_exchange(x, 0, 1, 1, group=None, edges=wrong), "'wrap'"),
        (lambda: halo_exchange(x, 0, 1, 1, group=None, lengths=[4]), "holds 3 tokens, not 4"),
    ]
    for call, said in calls:
        with pytest.raises(ShapeError, match=said):
            call()


def test_bad_input_is_told() -> None:
    run_all(1, bad_calls)
