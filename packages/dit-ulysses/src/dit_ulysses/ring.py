"""Ring attention (arXiv 2310.01889): queries stay, keys and values go round.

Every rank attends its queries with the block of keys that it has, while that block is already on its way to the next
rank. After as many steps as there are ranks every query has seen every key, and the blocks are merged by their
log-sum-exp. In the backward pass keys and values go round again, and their gradients after them, in fp32, until they
are home.

Shape suffixes: B batch, N query heads, H key heads, S queries of this rank, T keys of a block, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dit_ulysses.agreement import agree
from dit_ulysses.blocks import Block, BlockKernel, kernel_for, merge, wide
from dit_ulysses.errors import ShapeError
from dit_ulysses.inputs import Layout, check_attention_inputs, check_mask
from dit_ulysses.peers import Peers
from dit_ulysses.shares import Lengths, check_lengths, spans
from dit_ulysses.wire import Arriving, open_meters, shift


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    layout: Layout = "BSND",
    lengths: Lengths | None = None,
    kv_lengths: Lengths | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: BlockKernel | None = None,
) -> Tensor:
    """Return the attention of a sequence whose tokens are spread over the ranks: that of this rank's queries.

    ``softmax(q·kᵀ·scale + mask)·v`` over the keys of all ranks, for any number of heads, ranks and tokens; of others'
    keys no rank holds more than two blocks. A query that sees no key, because the mask hides all of them, has output 0
    and passes no gradient; there is no NaN. The gradient is that of the sum of the losses of all ranks. Every rank of
    the group has to call this, in the backward pass as well; gradients of gradients are refused.

    Sums are kept in fp32 whatever the dtype of the tensors. The order in which a rank adds up the blocks depends on
    where it is, so results on other numbers of ranks differ by rounding.

    Args:
        q: queries of this rank's tokens, in `layout`; B batch, S tokens, N heads, D channels.
        k, v: keys and values of this rank's tokens; their heads divide those of the queries, and are sent as they are.
        group: the ranks; the whole job when None.
        layout: "BSND" or "BNSD".
        lengths: tokens of each rank, in the order of the group; needed where they are not equal. 0 is a length.
        kv_lengths: those of keys and values in cross-attention; `lengths` when None.
        mask: as one process would take it: bool (True takes part) or float (added to the scores), 4 dimensions that
            broadcast to [B, N, S, T] of the whole sequences, the same on every rank. It gets no gradient.
        is_causal: query i sees the keys 0 to i of the whole sequence, and of those what the mask leaves. Blocks that
            are hidden are not computed; they are passed on all the same.
        scale: of the scores; ``D ** -0.5`` when None.
        kernel: what attends one block; the fastest of `dit_ulysses.blocks` that takes it when None. That is torch's
            flash attention for CPU or CUDA where there is no mask, and plain fp32 torch elsewhere: with masks, and on
            an NPU, where nothing of this has been run.

    Returns:
        A tensor like `q`.

    Raises:
        ShapeError: the tensors do not fit each other, or not `lengths`; the mask is of this rank's tokens only, or it
            requires a gradient.
        GroupError: the group cannot be used by this process or for these tensors.
        DisagreementError: the ranks were called with different things.
        LostRankError: a rank was lost.
    """
    peers = Peers.of(group, q, k, v, *(() if mask is None else (mask,)))
    tokens = read_tokens(q, k, v, layout, lengths, kv_lengths, mask, peers.size, peers.rank)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    agree(peers, {"function": "ring_attention", **tokens.facts, "is_causal": is_causal, "scale": scale})
    ring = _Ring(peers, tokens, mask, is_causal, scale, kernel)
    q_BNSD, k_BHTD, v_BHTD = (x if layout == "BNSD" else x.transpose(1, 2) for x in (q, k, v))
    out_BNSD: Tensor = _RingAttention.apply(ring, q_BNSD, k_BHTD, v_BHTD)
    return out_BNSD if layout == "BNSD" else out_BNSD.transpose(1, 2)


@dataclass(frozen=True)
class Tokens:
    """Who holds how many, checked.

    Attributes:
        lengths, kv_lengths: tokens of each rank.
        facts: what the ranks have to agree on.
    """

    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    facts: dict[str, object]


def read_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    lengths: Lengths | None,
    kv_lengths: Lengths | None,
    mask: Tensor | None,
    size: int,
    rank: int,
) -> Tokens:
    """Check what one of `size` ranks was called with, before anything is sent.

    Raises:
        ShapeError: see `ring_attention`.
    """
    check_attention_inputs(q, k, v, layout)
    here, kv_here = q.shape[layout.index("S")], k.shape[layout.index("S")]
    own = check_lengths(lengths, size, rank, here, "lengths")
    if kv_lengths is None and kv_here == here:
        kv_lengths = lengths
    elif kv_lengths is None and lengths is not None:
        raise ShapeError(f"keys have {kv_here} tokens here and queries {here}; give kv_lengths beside lengths")
    kv_own = check_lengths(kv_lengths, size, rank, kv_here, "kv_lengths")
    batch, heads, kv_heads, width = q.shape[0], q.shape[layout.index("N")], k.shape[layout.index("N")], q.shape[3]
    if mask is not None:
        if mask.requires_grad:
            raise ShapeError("the mask requires a gradient, and gets none here; give mask.detach()")
        check_mask(mask, batch, heads, sum(own), sum(kv_own))
    facts: dict[str, object] = {
        "layout": layout,
        "dtype": q.dtype,
        "batch": batch,
        "heads": heads,
        "key and value heads": kv_heads,
        "channels of a head": width,
        **({"tokens, without lengths": here} if lengths is None else {"lengths": list(own)}),
        **({"keys, without kv_lengths": kv_here} if kv_lengths is None else {"kv_lengths": list(kv_own)}),
        "mask": None if mask is None else f"{mask.dtype} {list(mask.shape)}",
        "gradient": torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    }
    return Tokens(own, kv_own, facts)


@dataclass(frozen=True, eq=False)
class _Ring:
    """One call, checked."""

    peers: Peers
    tokens: Tokens
    mask: Tensor | None
    is_causal: bool
    scale: float
    kernel: BlockKernel | None

    def visits(self, packed: Tensor, name: str, meters: Any = None) -> Iterator[tuple[int, Tensor]]:
        """Yield every rank and its keys and values, [2, B, H, T, D], this rank's first.

        The next ones are on their way while the caller works on those that it was given.
        """
        for step in range(self.peers.size):
            source = self.before(self.peers.rank, step)
            arriving, coming = Arriving(self.peers), packed
            if step + 1 < self.peers.size:
                coming = shift(packed, self.shape(packed, self.before(source)), self.peers, name, arriving, meters)
            yield source, packed
            arriving.wait()
            packed = coming

    def block(self, source: int) -> Block | None:
        """How the keys of a rank stand to the queries of this one; None where there is nothing to compute."""
        start, end = spans(self.tokens.lengths)[self.peers.rank]
        kv_start, kv_end = spans(self.tokens.kv_lengths)[source]
        if start == end or kv_start == kv_end or (self.is_causal and kv_start >= end):
            return None
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, start:end] if mask.shape[2] > 1 else mask
            mask = mask[..., kv_start:kv_end] if mask.shape[3] > 1 else mask
        crossed = self.is_causal and kv_end - 1 > start
        return Block(scale=self.scale, diagonal=start - kv_start if crossed else None, mask=mask)

    def attends(self, q_BNSD: Tensor, k_BHTD: Tensor, block: Block) -> BlockKernel:
        """What attends a block."""
        return self.kernel or kernel_for(q_BNSD, k_BHTD, block)

    def before(self, rank: int, steps: int = 1) -> int:
        """The rank that stands some steps before another."""
        return (rank - steps) % self.peers.size

    def shape(self, packed: Tensor, source: int) -> tuple[int, ...]:
        """Shape of a rank's packed keys and values."""
        return (*packed.shape[:3], self.tokens.kv_lengths[source], packed.shape[4])


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: _Ring, q_BNSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        ctx.ring, ctx.meters = ring, open_meters()
        out_BNSD = torch.zeros_like(q_BNSD, dtype=wide(q_BNSD.dtype))
        lse_BNS = out_BNSD.new_full(q_BNSD.shape[:3], -torch.inf)
        with torch.autocast(q_BNSD.device.type, enabled=False):  # it would take fp32 sums for its own
            for source, packed in ring.visits(torch.stack((k_BHTD, v_BHTD)), "ring"):
                if block := ring.block(source):
                    kernel = ring.attends(q_BNSD, packed[0], block)
                    lse_BNS = merge(out_BNSD, lse_BNS, *kernel.forward(q_BNSD, packed[0], packed[1], block))
        out_BNSD = out_BNSD.to(q_BNSD.dtype)
        ctx.save_for_backward(q_BNSD, k_BHTD, v_BHTD, out_BNSD, lse_BNS)
        return out_BNSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNSD: Tensor) -> Any:
        q_BNSD, k_BHTD, v_BHTD, out_BNSD, lse_BNS = ctx.saved_tensors
        with torch.autocast(q_BNSD.device.type, enabled=False):
            dq_BNSD, d_packed = _gradients(
                ctx.ring, grad_BNSD.contiguous(), q_BNSD, torch.stack((k_BHTD, v_BHTD)), out_BNSD, lse_BNS, ctx.meters
            )
        return None, dq_BNSD.to(q_BNSD.dtype), *d_packed.to(k_BHTD.dtype)


def _gradients(
    ring: _Ring, grad_BNSD: Tensor, q_BNSD: Tensor, packed: Tensor, out_BNSD: Tensor, lse_BNS: Tensor, meters: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of this rank's queries, and of its keys and values, [2, B, H, T, D].

    Each rank adds its part to the gradient of the block that it works on, and sends it after the block. What the owner
    itself adds stays there, so gradients take one step less than a whole turn, the last one to their owner.
    """
    dq_BNSD = torch.zeros_like(q_BNSD, dtype=wide(q_BNSD.dtype))
    own = torch.zeros_like(packed, dtype=dq_BNSD.dtype)
    arriving, coming, sent = Arriving(ring.peers), None, None
    for source, visiting in ring.visits(packed, "ring, backward", meters):
        part = torch.zeros_like(visiting, dtype=dq_BNSD.dtype)
        if block := ring.block(source):
            kernel = ring.attends(q_BNSD, visiting[0], block)
            dq, part[0], part[1] = kernel.backward(
                grad_BNSD, q_BNSD, visiting[0], visiting[1], out_BNSD, lse_BNS, block
            )
            dq_BNSD += dq
        if source == ring.peers.rank:
            own = part
            continue
        arriving.wait()
        sent = part if coming is None else part.add_(coming)  # held until it has left
        after = ring.shape(packed, ring.before(source))
        coming = shift(sent, after, ring.peers, "ring, gradients home", arriving, meters)
    arriving.wait()
    return dq_BNSD, own if coming is None else own.add_(coming)
