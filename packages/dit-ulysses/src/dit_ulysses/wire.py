"""Everything that goes over the wire goes through here, and is counted: one collective, and one exchange of neighbours.

`all_to_all` moves any number of elements from every rank to every other, and is its own adjoint with the counts turned
round. Shards, heads, halos, whole sequences: all are such an exchange of flat pieces, so the rest of the package holds
no other collective, and any backend that has ``all_to_all_single`` runs it (gloo, nccl, hccl).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ulysses.lost import naming_the_lost
from dit_ulysses.peers import Peers

Counts = Sequence[int]  # elements for, or from, each rank

_METERS: ContextVar[tuple[WireMeter, ...]] = ContextVar("meters that are open", default=())


class WireMeter:
    """Counts the bytes that this rank sends to others while it is open; what stays on the rank is no traffic.

    ::

        with WireMeter() as meter:
            ulysses_attention(q, k, v, …)
        print(meter.report())

    A backward pass counts where its forward pass did.

    Attributes:
        sent: bytes by what they were sent for.
        calls: how often.
    """

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.sent.values())

    def report(self) -> str:
        """Return a table."""
        rows = [(name, str(self.calls[name]), f"{self.sent[name]:,}") for name in self.sent]
        rows.append(("total", str(sum(self.calls.values())), f"{self.total:,}"))
        return "\n".join(f"{name:<24} {calls:>7} calls {sent:>16} bytes" for name, calls, sent in rows)

    def __enter__(self) -> WireMeter:
        _METERS.set((*_METERS.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _METERS.set(tuple(meter for meter in _METERS.get() if meter is not self))

    def _add(self, name: str, sent: int) -> None:
        self.sent[name] = self.sent.get(name, 0) + sent
        self.calls[name] = self.calls.get(name, 0) + 1


class Arriving:
    """What is on its way: wait before you look."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._work: list[tuple[dist.Work, Sequence[int]]] = []

    def add(self, work: dist.Work | None, waited_for: Sequence[int]) -> None:
        """Wait for this as well, that these ranks, in the numbers of the whole job, take part in."""
        if work is not None:
            self._work.append((work, waited_for))

    def wait(self) -> None:
        """Return when everything is there.

        Raises:
            LostRankError: a rank was lost.
        """
        while self._work:
            work, waited_for = self._work.pop(0)
            with naming_the_lost(self._peers, waited_for):
                work.wait()


def all_to_all(
    sent: Tensor, counts_out: Counts, counts_in: Counts, peers: Peers, name: str, *, arriving: Arriving | None = None
) -> Tensor:
    """Send a piece to every rank and return what came, in the order of the ranks; differentiable.

    Args:
        sent: flat, the pieces for rank 0, 1, … after each other.
        counts_out: elements of each.
        counts_in: elements from each rank. What one sends, the other has to expect.
        peers: the ranks.
        name: what meters count it as.
        arriving: collects what has to be waited for; without it, the result is there on return.

    Raises:
        LostRankError: a rank was lost.
    """
    waiting = arriving or Arriving(peers)
    received: Tensor = _AllToAll.apply(sent, tuple(counts_out), tuple(counts_in), peers, name, waiting)
    if arriving is None:
        waiting.wait()
    return received


def exchange(
    sent: Tensor, counts_out: Counts, counts_in: Counts, peers: Peers, name: str, arriving: Arriving, meters: Any = None
) -> Tensor:
    """Start `all_to_all`, outside of autograd; `meters` are those that were open in the forward pass."""
    sent = sent.contiguous()
    received = sent.new_empty(sum(counts_in))
    _count_pieces(name, sent, counts_out, peers, meters)
    if _goes_in_pairs(peers):
        pieces = sent.split(list(counts_out))
        _exchange_in_pairs(pieces.__getitem__, received, counts_out, counts_in, peers, arriving)
        received.split(list(counts_in))[peers.rank].copy_(pieces[peers.rank])
        return received
    with naming_the_lost(peers, peers.names):
        work = dist.all_to_all_single(
            received, sent, list(counts_in), list(counts_out), group=peers.group, async_op=True
        )
    arriving.add(work, peers.names)
    return received


def exchange_packed(
    pack: Callable[[int, Tensor], None],
    like: Tensor,
    counts_out: Counts,
    counts_in: Counts,
    peers: Peers,
    name: str,
    arriving: Arriving,
) -> Tensor:
    """As `exchange`, of pieces that do not lie ready: `pack(rank, piece)` writes them.

    Where it can be, one is sent while the next is written, and what stays here is written where it is wanted.
    """
    if not _goes_in_pairs(peers):
        sent = like.new_empty(sum(counts_out))
        for rank, piece in enumerate(sent.split(list(counts_out))):
            pack(rank, piece)
        return exchange(sent, counts_out, counts_in, peers, name, arriving)

    def packed(rank: int) -> Tensor:
        piece = like.new_empty(counts_out[rank])
        pack(rank, piece)
        return piece

    received = like.new_empty(sum(counts_in))
    _count_pieces(name, like, counts_out, peers, None)
    _exchange_in_pairs(packed, received, counts_out, counts_in, peers, arriving)
    pack(peers.rank, received.split(list(counts_in))[peers.rank])
    return received


def _count_pieces(name: str, like: Tensor, counts_out: Counts, peers: Peers, meters: Any) -> None:
    count(name, (sum(counts_out) - counts_out[peers.rank]) * like.element_size(), meters)


def _goes_in_pairs(peers: Peers) -> bool:
    # Gloo's own collective serves one rank after the other, in a thread of its own; in pairs, all are served at once.
    return peers.size == 1 or dist.get_backend(peers.group) == dist.Backend.GLOO


def _exchange_in_pairs(
    piece_out: Callable[[int], Tensor],
    received: Tensor,
    counts_out: Counts,
    counts_in: Counts,
    peers: Peers,
    arriving: Arriving,
) -> None:
    pieces_in = received.split(list(counts_in))
    for step in range(1, peers.size):
        to, of = (peers.rank + step) % peers.size, (peers.rank - step) % peers.size
        if counts_in[of]:
            with naming_the_lost(peers, (peers.names[of],)):
                arriving.add(dist.irecv(pieces_in[of], peers.names[of], peers.group), (peers.names[of],))
        if counts_out[to]:
            piece = piece_out(to)
            with naming_the_lost(peers, (peers.names[to],)):
                arriving.add(dist.isend(piece, peers.names[to], peers.group), (peers.names[to],))


def shift(
    sent: Tensor, shape: Sequence[int], peers: Peers, name: str, arriving: Arriving, meters: Any = None
) -> Tensor:
    """Start sending a tensor to the next rank of a ring; return what will hold that of the rank before.

    Args:
        sent: contiguous; it must not be written to before it has arrived.
        shape: of what comes.
        peers, name, arriving, meters: as those of `exchange`.
    """
    received = torch.empty(tuple(shape), dtype=sent.dtype, device=sent.device)
    after, before = (peers.names[(peers.rank + step) % peers.size] for step in (1, -1))
    count(name, sent.numel() * sent.element_size(), meters)
    operations = [
        dist.P2POp(dist.isend, sent, after, peers.group),
        dist.P2POp(dist.irecv, received, before, peers.group),
    ]
    with naming_the_lost(peers, (after, before)):
        started = dist.batch_isend_irecv(operations)
    # Some backends make one of the two.
    for work, waited_for in zip(
        started, ((after,), (before,)) if len(started) == 2 else ((after, before),), strict=True
    ):
        arriving.add(work, waited_for)
    return received


def open_meters() -> tuple[WireMeter, ...]:
    """The meters that are open; a forward pass hands them to its backward pass."""
    return _METERS.get()


def count(name: str, sent: int, meters: Sequence[WireMeter] | None = None) -> None:
    """Add bytes to the open meters, or to those that were open in the forward pass."""
    for meter in _METERS.get() if meters is None else meters:
        meter._add(name, sent)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sent: Tensor,
        counts_out: tuple[int, ...],
        counts_in: tuple[int, ...],
        peers: Peers,
        name: str,
        arriving: Arriving,
    ) -> Tensor:
        ctx.turned, ctx.meters = (counts_in, counts_out, peers, f"{name}, backward"), open_meters()
        return exchange(sent, counts_out, counts_in, peers, name, arriving)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        counts_out, counts_in, peers, name = ctx.turned
        arriving = Arriving(peers)
        returned = exchange(gradient, counts_out, counts_in, peers, name, arriving, ctx.meters)
        arriving.wait()
        return returned, None, None, None, None, None
