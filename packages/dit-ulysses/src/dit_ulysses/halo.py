"""Rows of the neighbours, for convolutions over a dimension that is spread over ranks."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ulysses.agreement import agree, telling
from dit_ulysses.errors import ShapeError
from dit_ulysses.peers import Peers
from dit_ulysses.sequence import dimension
from dit_ulysses.shares import Lengths, check_lengths, lengths_fact, spans
from dit_ulysses.wire import all_to_all


def halo_exchange(
    x: Tensor,
    dim: int,
    before: int,
    after: int,
    *,
    group: dist.ProcessGroup | None,
    lengths: Lengths | None = None,
    edges: Literal["zeros", "none"] = "zeros",
) -> Tensor:
    """Return this rank's rows between the last rows of those before it and the first rows of those after it.

    A convolution of kernel k = 2 h + 1 and stride 1, padded by h, is then ``conv(halo_exchange(x, dim, h, h))`` without
    padding in `dim`. With stride 2, shards start at even rows, and a kernel of 3 needs one row before and none after.
    Rows come from several ranks where shards are shorter than the halo. The gradient is that of the sum of the losses
    of all ranks: a row that was lent gets back what it did elsewhere.

    Args:
        x: the rows of this rank, of any shape.
        dim: that is spread over the ranks.
        before, after: rows that are wanted.
        group: the ranks; the whole job when None.
        lengths: rows of each rank, needed where they are not equal.
        edges: at both ends of the whole, "zeros", as the padding of a convolution, or "none": nothing is put there.

    Raises:
        ShapeError: the numbers do not fit, or not the tensor.
        GroupError, DisagreementError, LostRankError: as `ulysses_attention`.
    """
    peers = Peers.of(group, x)
    with telling(peers, "halo_exchange"):
        dim = dimension(x, dim)
        if before < 0 or after < 0 or edges not in ("zeros", "none"):
            raise ShapeError(
                f'before, after and edges are {before}, {after} and {edges!r}; numbers from 0 on and "zeros" or "none" '
                "are expected"
            )
        known = check_lengths(lengths, peers.size, peers.rank, x.shape[dim], "lengths")
    facts = {
        "function": "halo_exchange",
        "dim": dim,
        "before": before,
        "after": after,
        "edges": edges,
        "other sizes": [size for at, size in enumerate(x.shape) if at != dim],
        "dtype": x.dtype,
        **lengths_fact(lengths, known[0], "lengths"),
        "gradient": torch.is_grad_enabled() and x.requires_grad,
    }
    agree(peers, facts)
    return _exchanged(x, dim, before, after, known, peers, edges)


def _exchanged(
    x: Tensor, dim: int, before: int, after: int, lengths: tuple[int, ...], peers: Peers, edges: str
) -> Tensor:
    here = spans(lengths)
    start, end = here[peers.rank]
    rows = x.movedim(dim, 0)
    row = rows.shape[1:].numel()
    lent = [_wanted(here, peers.rank, reader, before, after) for reader in range(peers.size)]
    borrowed = [_wanted(here, owner, peers.rank, before, after) for owner in range(peers.size)]
    received = all_to_all(
        torch.cat([rows[first - start : last - start].reshape(-1) for first, last in lent]),
        [(last - first) * row for first, last in lent],
        [(last - first) * row for first, last in borrowed],
        peers,
        "halo",
    ).view(-1, *rows.shape[1:])
    above, below = min(before, start), min(after, sum(lengths) - end)
    parts = [received[:above], rows, received[above:]]
    if edges == "zeros":
        parts = [
            rows.new_zeros(before - above, *rows.shape[1:]),
            *parts,
            rows.new_zeros(after - below, *rows.shape[1:]),
        ]
    return torch.cat([part.movedim(0, dim) for part in parts], dim)


def _wanted(here: list[tuple[int, int]], owner: int, reader: int, before: int, after: int) -> tuple[int, int]:
    """The rows (start, end) of a rank that another one needs, of those that are `here` on each."""
    start, end = here[reader]
    wanted = {-1: (start - before, start), 0: (0, 0), 1: (end, end + after)}[(owner > reader) - (owner < reader)]
    first, last = max(wanted[0], here[owner][0]), min(wanted[1], here[owner][1])
    return (first, last) if first < last else (here[owner][0],) * 2
