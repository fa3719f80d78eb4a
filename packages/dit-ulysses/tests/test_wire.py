from __future__ import annotations

import threading
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import run_all
from torch import Tensor

from dit_ulysses import WireMeter, gather_sequence, split_sequence, ulysses_attention
from dit_ulysses.peers import Peers
from dit_ulysses.shares import shares
from dit_ulysses.wire import Arriving, all_to_all, shift


def values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q * 2 + k + v


def run(tokens: int, heads: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int], int]:
    """What a meter counts in the two passes of an attention, and what torch is given to send."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    lengths = shares(tokens, ranks)
    seen = [0]
    real = dist.isend  # gloo's way

    def counting(sent: Tensor, *arguments: Any) -> Any:
        if sent.dtype == dtype:  # the agreement is of bytes
            seen[0] += sent.numel() * sent.element_size()
        return real(sent, *arguments)

    x = torch.randn(2, lengths[rank], heads, 4, dtype=dtype, requires_grad=True)
    with patch.object(dist, "isend", counting):
        with WireMeter() as meter:
            out = ulysses_attention(x, x, x, group=None, attention=values, lengths=lengths)
        forward = dict(meter.sent)
        out.backward(torch.ones_like(out))
    return forward, meter.sent, seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 4])
def test_bytes_are_those_of_the_formula(ranks: int, dtype: torch.dtype) -> None:
    tokens, heads = 16, 8
    channels = 2 * heads * 4  # with the batch
    wanted = 4 * (tokens * channels // ranks) * (ranks - 1) // ranks * dtype.itemsize
    for forward, both, seen in run_all(ranks, run, tokens, heads, dtype):
        assert sum(forward.values()) == wanted
        assert sum(both.values()) == 2 * wanted  # the backward pass sends as much, to the meter of its forward pass
        assert seen == 2 * wanted


@pytest.mark.parametrize("ranks", [3, 8])
def test_uneven_sizes_send_only_what_others_need(ranks: int) -> None:
    tokens, heads = 19, 5
    lengths, shared = shares(tokens, ranks), shares(heads, ranks)
    for rank, (forward, both, seen) in enumerate(run_all(ranks, run, tokens, heads, torch.float32)):
        row = 2 * 4 * 4
        heads_out = 3 * lengths[rank] * (heads - shared[rank]) * row
        tokens_out = (tokens - lengths[rank]) * shared[rank] * row
        assert forward == {"tokens to heads": heads_out, "attention to tokens": tokens_out}
        assert both["tokens to heads, backward"] == 3 * tokens_out
        assert both["attention to tokens, backward"] == heads_out // 3
        assert seen == sum(both.values())


def meters() -> tuple[list[int], str]:
    part = torch.zeros(2, 4)
    with WireMeter() as outer:
        gather_sequence(part, 0, group=None)
        with WireMeter() as inner:
            gather_sequence(part, 0, group=None)
        other: list[int] = []
        thread = threading.Thread(target=lambda: other.append(len(WireMeter().sent)))
        thread.start()
        thread.join()
    gather_sequence(part, 0, group=None)
    return [outer.total, inner.total], outer.report()


def test_meters_nest_and_report() -> None:
    for totals, report in run_all(2, meters):
        assert totals == [64, 32]
        *_, gathered, total = report.splitlines()
        assert gathered.split() == ["gather", "2", "calls", "64", "bytes"]
        assert total.split() == ["total", "2", "calls", "64", "bytes"]


def backward_in_a_thread() -> int:
    x = torch.zeros(2, 4, requires_grad=True)
    with WireMeter() as meter:
        out = split_sequence(x, 0, group=None)
    thread = threading.Thread(target=out.sum().backward)  # an accelerator's backward pass is in one of its own
    thread.start()
    thread.join()
    return meter.total


def test_a_backward_pass_counts_where_its_forward_pass_did() -> None:
    assert run_all(2, backward_in_a_thread) == [16, 16]


def pieces(counts: list[list[int]]) -> None:
    peers = Peers.of(None)
    rank, ranks = peers.rank, peers.size
    out, into = counts[rank], [row[rank] for row in counts]
    sent = torch.cat([torch.full((out[to],), 10.0 * rank + to) for to in range(ranks)]).requires_grad_()
    received = all_to_all(sent, out, into, peers, "test")
    assert received.tolist() == [10.0 * of + rank for of in range(ranks) for _ in range(into[of])]
    (gradient,) = torch.autograd.grad((received * (rank + 1)).sum(), sent)
    assert gradient.tolist() == [to + 1.0 for to in range(ranks) for _ in range(out[to])]


def test_pieces_arrive_and_their_gradients_return() -> None:
    run_all(3, pieces, [[1, 0, 2], [3, 1, 0], [0, 4, 0]])
    run_all(1, pieces, [[3]])


def around(sizes: list[int]) -> None:
    peers, arriving = Peers.of(None), Arriving(Peers.of(None))
    before = (peers.rank - 1) % peers.size
    with WireMeter() as meter:
        received = shift(torch.full((sizes[peers.rank],), float(peers.rank)), (sizes[before],), peers, "ring", arriving)
    arriving.wait()
    assert received.tolist() == [float(before)] * sizes[before]
    assert meter.sent == {"ring": 4 * sizes[peers.rank]}


@pytest.mark.parametrize("sizes", [[2, 2], [1, 2, 3], [3, 1, 4, 1, 5, 2, 6, 1]], ids=str)
def test_a_ring_turns(sizes: list[int]) -> None:
    run_all(len(sizes), around, sizes)
