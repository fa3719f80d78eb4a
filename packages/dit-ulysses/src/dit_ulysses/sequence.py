"""Whole sequences to shards of them and back, differentiable, of any length."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ulysses.agreement import agree, telling
from dit_ulysses.errors import ShapeError
from dit_ulysses.peers import Peers
from dit_ulysses.shares import Lengths, check_lengths, lengths_fact, shares, spans
from dit_ulysses.wire import Arriving, exchange, open_meters

Gradient = Literal["same", "sum"]


def sequence_lengths(tokens: int, ranks: int) -> tuple[int, ...]:
    """Return how many tokens each rank gets when nothing else is said: 10 on 4 ranks are 3, 3, 2, 2."""
    return shares(tokens, ranks)


def split_sequence(x: Tensor, dim: int, *, group: dist.ProcessGroup | None, lengths: Lengths | None = None) -> Tensor:
    """Return this rank's part of a tensor that every rank holds. Nothing is sent; the backward pass gathers.

    Args:
        x: the whole, the same on every rank.
        dim: that is split.
        group: the ranks; the whole job when None.
        lengths: of each rank's part; `sequence_lengths` when None.

    Raises:
        ShapeError: the lengths are not one for each rank, or do not add up.
        GroupError: the group cannot be used by this process or for this tensor.
    """
    peers = Peers.of(group, x)
    dim = dimension(x, dim)
    lengths = shares(x.shape[dim], peers.size) if lengths is None else tuple(lengths)
    if len(lengths) != peers.size or sum(lengths) != x.shape[dim] or min(lengths) < 0:
        raise ShapeError(
            f"lengths is {list(lengths)}; {peers.size} numbers are expected, that add up to the {x.shape[dim]} of "
            f"dimension {dim}"
        )
    part: Tensor = _Split.apply(x, dim, lengths, peers)
    return part


def gather_sequence(
    x: Tensor,
    dim: int,
    *,
    group: dist.ProcessGroup | None,
    lengths: Lengths | None = None,
    gradient: Gradient = "same",
) -> Tensor:
    """Return the whole that this rank's part belongs to, the same on every rank; the inverse of `split_sequence`.

    Args:
        x: the part of this rank.
        dim: that was split.
        group: the ranks; the whole job when None.
        lengths: of each rank's part, needed where they are not equal.
        gradient: "same" where every rank goes on to compute the same loss, and each takes its part of its gradient;
            "sum" where each rank computes another part of the loss, and the gradients are added up.

    Raises:
        ShapeError: the part has another length than `lengths` says.
        GroupError, DisagreementError, LostRankError: as `ulysses_attention`.
    """
    peers = Peers.of(group, x)
    dim = dimension(x, dim)
    if gradient not in ("same", "sum"):
        raise ShapeError(f'gradient is {gradient!r}; "same" or "sum" is expected')
    with telling(peers, "gather_sequence"):
        known = check_lengths(lengths, peers.size, peers.rank, x.shape[dim], "lengths")
    facts = {
        "function": "gather_sequence",
        "dim": dim,
        "other sizes": [size for at, size in enumerate(x.shape) if at != dim],
        "dtype": x.dtype,
        **lengths_fact(lengths, known[0], "lengths"),
        "gradient": gradient if torch.is_grad_enabled() and x.requires_grad else None,
    }
    agree(peers, facts)
    whole: Tensor = _Gather.apply(x, dim, known, peers, gradient)
    return whole


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, lengths: tuple[int, ...], peers: Peers) -> Tensor:
        ctx.plan, ctx.meters = (dim, lengths, peers), open_meters()
        return x.narrow(dim, spans(lengths)[peers.rank][0], lengths[peers.rank]).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dim, lengths, peers = ctx.plan
        return _gathered(gradient, dim, lengths, peers, "split, backward", ctx.meters), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, lengths: tuple[int, ...], peers: Peers, gradient: Gradient) -> Tensor:
        ctx.plan, ctx.gradient, ctx.meters = (dim, lengths, peers), gradient, open_meters()
        return _gathered(x, dim, lengths, peers, "gather")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dim, lengths, peers = ctx.plan
        if ctx.gradient == "same":
            found = gradient.narrow(dim, spans(lengths)[peers.rank][0], lengths[peers.rank]).contiguous()
        else:
            found = _scattered_sum(gradient, dim, lengths, peers, "gather, backward", ctx.meters)
        return found, None, None, None, None


def _gathered(x: Tensor, dim: int, lengths: tuple[int, ...], peers: Peers, name: str, meters: Any = None) -> Tensor:
    """Every rank's part, after each other."""
    first = x.movedim(dim, 0).contiguous()
    row = first.shape[1:].numel()
    arriving = Arriving(peers)
    received = exchange(
        first.reshape(-1).repeat(peers.size),
        [first.numel()] * peers.size,
        [length * row for length in lengths],
        peers,
        name,
        arriving,
        meters,
    )
    arriving.wait()
    return received.view(sum(lengths), *first.shape[1:]).movedim(0, dim).contiguous()


def _scattered_sum(x: Tensor, dim: int, lengths: tuple[int, ...], peers: Peers, name: str, meters: Any) -> Tensor:
    """This rank's part of the sum over all ranks."""
    first = x.movedim(dim, 0).contiguous()
    row, here = first.shape[1:].numel(), lengths[peers.rank]
    arriving = Arriving(peers)
    counts = [length * row for length in lengths]
    received = exchange(first.reshape(-1), counts, [here * row] * peers.size, peers, name, arriving, meters)
    arriving.wait()
    return received.view(peers.size, here, *first.shape[1:]).sum(0).movedim(0, dim).contiguous()


def dimension(x: Tensor, dim: int) -> int:
    """Return `dim` counted from the front; raise ShapeError where there is none."""
    if not -x.ndim <= dim < x.ndim:
        raise ShapeError(f"dim is {dim}; the tensor is {list(x.shape)}, so it is from {-x.ndim} to {x.ndim - 1}")
    return dim % x.ndim
