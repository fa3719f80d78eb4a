"""Ulysses (arXiv 2309.14509): heads are shared out instead of tokens while attention is computed.

Each rank holds some tokens of all heads. One exchange gives it all tokens of some heads, the caller's attention works
on those as it would in one process, and a second exchange gives every rank its tokens back.

Inside, sequences come first: what arrives from the ranks is then one tensor, whatever their lengths, and queries, keys
and values lie beside each other in one buffer and are looked at in place. Nothing is copied on arrival.

Shape suffixes: S tokens of queries and T of keys (s, t: those of one rank), B batch, N query heads (n: of one rank),
H heads of what is packed, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ulysses.agreement import agree, telling
from dit_ulysses.errors import ShapeError
from dit_ulysses.inputs import FROM_SBND, TO_SBND, Joint, Layout, check_attention_inputs, check_joint, check_mask
from dit_ulysses.peers import Peers
from dit_ulysses.shares import HeadShare, Lengths, check_lengths, head_shares, lengths_fact
from dit_ulysses.wire import Arriving, all_to_all, exchange, exchange_packed, open_meters

Attention = Callable[..., Tensor]  # (q, k, v) or, with a mask, (q, k, v, mask)

_PACKED = 1 << 18  # bytes of queries for one rank; measured on gloo, see benchmarks/ulysses.py

_JOINT = ("joint queries", "joint keys", "joint values")


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    attention: Attention,
    layout: Layout = "BSND",
    lengths: Lengths | None = None,
    kv_lengths: Lengths | None = None,
    mask: Tensor | None = None,
    joint: Joint | None = None,
    joint_at: Literal["front", "rear"] = "front",
    chunks: int = 1,
) -> Any:
    """Return the attention of a sequence whose tokens are spread over the ranks: that of this rank's queries.

    Forward and backward are exact for any number of heads, of ranks and of tokens. The gradient is that of the sum of
    the losses of all ranks; of `joint` and of a learned `mask`, which all ranks hold, each gets the part of its heads,
    and the sum over the ranks is the whole. Every rank of the group has to call it, in the backward pass as well.

    Args:
        q: queries of this rank's tokens, in `layout`; B batch, S tokens, N heads, D channels.
        k, v: keys and values of this rank's tokens; their heads divide those of the queries.
        group: the ranks; the whole job when None.
        attention: what computes it, called with q, k and v of all tokens and some heads, in `layout`, and with the mask
            where there is one. Fewer key heads than query heads come only where they came in. Not called on ranks
            that have no head.
        layout: "BSND" or "BNSD".
        lengths: tokens of each rank, in the order of the group; needed where they are not equal.
        kv_lengths: those of keys and values in cross-attention; `lengths` when None. Where every rank holds all keys,
            as those of a text, nothing has to be exchanged: call your attention.
        mask: as one process would take it, broadcastable to [B, N, S, T] of whole sequences, the same on every rank;
            only its heads are cut.
        joint: queries, keys and values of tokens that every rank holds, such as those of a text, with all heads.
        joint_at: whether they stand before or after the others.
        chunks: parts that the heads of a rank are sent in: while one is attended, the next is on its way. More than
            one helps only where the wire is slow beside the kernel: measure.

    Returns:
        A tensor like `q`; with `joint`, that and the attention of the joint queries, the same on every rank.

    Raises:
        ShapeError: the tensors do not fit each other, or not `lengths`.
        GroupError: the group cannot be used by this process or for these tensors.
        DisagreementError: the ranks were called with different things.
        LostRankError: a rank was lost.
    """
    peers = Peers.of(group, q, k, v, *(joint or ()))
    with telling(peers, "ulysses_attention"):
        call = _read(peers, q, k, v, layout, lengths, kv_lengths, mask, joint, joint_at, chunks)
    agree(peers, call.facts())
    inputs = [tensor.permute(TO_SBND[layout]) for tensor in (q, k, v)]
    started = [call.scatter_heads(inputs, shares) for shares in call.shares]
    parts, joint_parts = [], []
    for (tensors, arriving), shares in zip(started, call.shares, strict=True):
        arriving.wait()
        out_SBND = call.attend(attention, *tensors, shares[peers.rank])
        if call.joint is not None:
            out_SBND, joint_out = call.split_joint(out_SBND)
            joint_parts.append(call.gather_heads(joint_out, shares, replicated=True))
        parts.append(call.gather_heads(out_SBND, shares))
    out = call.assemble(parts)
    return out if call.joint is None else (out, call.assemble(joint_parts))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """One call, checked."""

    peers: Peers
    layout: Layout
    batch: int
    heads: int
    kv_heads: int
    width: int
    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    mask: Tensor | None
    joint: Joint | None
    joint_at: str
    shares: list[list[HeadShare]]
    dtype: torch.dtype
    trained: tuple[str, ...]  # what a gradient is wanted of
    given: tuple[bool, bool]  # whether lengths and kv_lengths were

    def facts(self) -> dict[str, object]:
        """What has to be the same on all ranks."""
        return {
            "function": "ulysses_attention",
            "layout": self.layout,
            "dtype": self.dtype,
            "batch": self.batch,
            "heads": self.heads,
            "key and value heads": self.kv_heads,
            "channels of a head": self.width,
            **lengths_fact(self.lengths if self.given[0] else None, self.lengths[0], "lengths"),
            **lengths_fact(self.kv_lengths if self.given[1] else None, self.kv_lengths[0], "kv_lengths"),
            "mask": None if self.mask is None else list(self.mask.shape),
            "joint tokens": None if self.joint is None else [self._joint_length(tensor) for tensor in self.joint],
            "joint_at": self.joint_at,
            "chunks": len(self.shares),
            "gradient of": list(self.trained),
        }

    def scatter_heads(
        self, inputs: Sequence[Tensor], shares: Sequence[HeadShare]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Arriving]:
        """Start sending every rank its heads of this rank's tokens; return [S, B, n, D] on arrival."""
        arriving, (q_SBND, k_SBND, v_SBND) = Arriving(self.peers), inputs
        queries = [(share.start, share.end) for share in shares]
        keys = [(share.kv_start, share.kv_end) for share in shares]
        if self.packs:
            return _ScatterHeads.apply(
                self.peers, self.lengths, (queries, keys, keys), arriving, q_SBND, k_SBND, v_SBND
            ), arriving
        (q_SBnD,) = _ScatterHeads.apply(self.peers, self.lengths, (queries,), arriving, q_SBND)
        (k_SBnD,) = _ScatterHeads.apply(self.peers, self.kv_lengths, (keys,), arriving, k_SBND)
        (v_SBnD,) = _ScatterHeads.apply(self.peers, self.kv_lengths, (keys,), arriving, v_SBND)
        return (q_SBnD, k_SBnD, v_SBnD), arriving

    @property
    def packs(self) -> bool:
        """Whether queries, keys and values go in one exchange; the same on all ranks.

        That saves two latencies. Large ones are better off alone: while one is sent, the next is copied together.
        """
        size = max(self.lengths) * self.batch * self.heads * self.width * self.dtype.itemsize // self.peers.size
        return self.lengths == self.kv_lengths and size <= _PACKED

    def attend(self, attention: Attention, q_SBND: Tensor, k_SBND: Tensor, v_SBND: Tensor, share: HeadShare) -> Tensor:
        """Return the attention of some heads and all tokens, [S, B, n, D]."""
        if self.joint is not None:
            spans_of_heads = ((share.start, share.end), *[(share.kv_start, share.kv_end)] * 2)
            q_SBND, k_SBND, v_SBND = (
                self._with_joint(tensor, joint.permute(TO_SBND[self.layout])[:, :, start:end])
                for tensor, joint, (start, end) in zip(
                    (q_SBND, k_SBND, v_SBND), self.joint, spans_of_heads, strict=True
                )
            )
        if not share.heads or not q_SBND.shape[0]:
            # No elements; it keeps the place of all in the backward pass, that every rank has to go through.
            learned = [self.mask] if "mask" in self.trained and self.mask is not None else []
            return q_SBND + sum(tensor.sum() for tensor in (k_SBND, v_SBND, *learned))
        if share.index is not None:
            index = torch.tensor(share.index, device=k_SBND.device)
            k_SBND, v_SBND = k_SBND.index_select(2, index), v_SBND.index_select(2, index)
        back = FROM_SBND[self.layout]
        arguments = [tensor.permute(back) for tensor in (q_SBND, k_SBND, v_SBND)]
        if self.mask is not None:
            arguments.append(self.mask[:, share.start : share.end] if self.mask.shape[1] > 1 else self.mask)
        out = attention(*arguments)
        if out.shape[:-1] != arguments[0].shape[:-1]:
            raise ShapeError(
                f"the attention returned {list(out.shape)} for queries {list(arguments[0].shape)} in the layout "
                f"{self.layout}; the same shape is expected"
            )
        return out.permute(TO_SBND[self.layout])

    def split_joint(self, out_SBND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the spread tokens and those of the joint ones."""
        assert self.joint is not None, "there are joint tokens"
        joint, spread = self._joint_length(self.joint[0]), sum(self.lengths)
        if self.joint_at == "front":
            return out_SBND[joint:], out_SBND[:joint]
        return out_SBND[:spread], out_SBND[spread:]

    def gather_heads(
        self, out_SBND: Tensor, shares: Sequence[HeadShare], *, replicated: bool = False
    ) -> tuple[list[Tensor], Arriving]:
        """Start sending every rank its tokens of this rank's heads, or all of them; return [s, B, n, D] by rank."""
        arriving, (rank, size) = Arriving(self.peers), (self.peers.rank, self.peers.size)
        rows = [out_SBND.shape[0]] * size if replicated else list(self.lengths)
        row = self.batch * out_SBND.shape[-1]
        flat = out_SBND.reshape(-1).repeat(size) if replicated else out_SBND.reshape(-1)
        out = [count * row * shares[rank].heads for count in rows]
        into = [rows[rank] * row * share.heads for share in shares]
        received = all_to_all(flat, out, into, self.peers, "attention to tokens", arriving=arriving)
        pieces = zip(received.split(into), shares, strict=True)
        shape = (rows[rank], self.batch)
        return [piece.view(*shape, share.heads, out_SBND.shape[-1]) for piece, share in pieces], arriving

    def assemble(self, parts: Sequence[tuple[list[Tensor], Arriving]]) -> Tensor:
        """Return all heads of this rank's tokens, in the layout of the call."""
        for _, arriving in parts:
            arriving.wait()
        by_rank = [piece for of_rank in zip(*(pieces for pieces, _ in parts), strict=True) for piece in of_rank]
        return torch.cat(by_rank, dim=2).permute(FROM_SBND[self.layout])

    def _with_joint(self, tensor: Tensor, joint: Tensor) -> Tensor:
        return torch.cat([joint, tensor] if self.joint_at == "front" else [tensor, joint])

    def _joint_length(self, tensor: Tensor) -> int:
        return tensor.shape[self.layout.index("S")]


class _ScatterHeads(torch.autograd.Function):
    """Tensors [s, B, H, D] of this rank's tokens to some heads of all tokens, [S, B, h, D], through one buffer."""

    @staticmethod
    def forward(
        ctx: Any, peers: Peers, lengths: tuple[int, ...], heads: Any, arriving: Arriving, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.shapes, ctx.meters = (peers, lengths, heads), [t.shape for t in tensors], open_meters()
        _, batch, _, width = tensors[0].shape
        here, rank = lengths[peers.rank], peers.rank
        packed = [sum(end - start for start, end in of_rank) for of_rank in zip(*heads, strict=True)]
        out = [here * batch * width * count for count in packed]
        into = [length * batch * width * packed[rank] for length in lengths]

        def pack(of: int, piece: Tensor) -> None:
            chosen = [of_tensor[of] for of_tensor in heads]
            _copy(piece.view(here, batch, packed[of], width), chosen, tensors, into=True)

        received = exchange_packed(pack, tensors[0], out, into, peers, "tokens to heads", arriving)
        whole = received.view(sum(lengths), batch, packed[rank], width)
        return tuple(whole.split([of[rank][1] - of[rank][0] for of in heads], dim=2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        peers, lengths, heads = ctx.plan
        _, batch, _, width = ctx.shapes[0]
        here, rank = lengths[peers.rank], peers.rank
        packed = [sum(end - start for start, end in of_rank) for of_rank in zip(*heads, strict=True)]
        out = [length * batch * width * packed[rank] for length in lengths]
        into = [here * batch * width * count for count in packed]
        sent = torch.cat(gradients, dim=2).reshape(-1)
        arriving = Arriving(peers)
        received = exchange(sent, out, into, peers, "tokens to heads, backward", arriving, ctx.meters)
        arriving.wait()
        found = [received.new_zeros(shape) for shape in ctx.shapes]
        for piece, of_rank, count in zip(received.split(into), zip(*heads, strict=True), packed, strict=True):
            _copy(piece.view(here, batch, count, width), of_rank, found, into=False)
        return None, None, None, None, *found


def _copy(packed: Tensor, heads: Sequence[tuple[int, int]], tensors: Sequence[Tensor], *, into: bool) -> None:
    """Copy heads of tensors beside each other into one, or add them back."""
    at = 0
    for tensor, (start, end) in zip(tensors, heads, strict=True):
        part = packed[:, :, at : at + end - start]
        if into:
            part.copy_(tensor[:, :, start:end])
        else:
            tensor[:, :, start:end] += part  # several ranks may have had one key head
        at += end - start


def _read(
    peers: Peers,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    lengths: Lengths | None,
    kv_lengths: Lengths | None,
    mask: Tensor | None,
    joint: Joint | None,
    joint_at: str,
    chunks: int,
) -> _Call:
    """Check a call before anything is sent."""
    check_attention_inputs(q, k, v, layout)
    if joint_at not in ("front", "rear"):
        raise ShapeError(f'joint_at is {joint_at!r}; "front" or "rear" is expected')
    if chunks < 1:
        raise ShapeError(f"chunks is {chunks}; a whole number from 1 on is expected")
    tokens, at_heads = layout.index("S"), layout.index("N")
    here, kv_here = q.shape[tokens], k.shape[tokens]
    own = check_lengths(lengths, peers.size, peers.rank, here, "lengths")
    if kv_lengths is None and kv_here == here:
        kv_lengths = lengths
    elif kv_lengths is None and lengths is not None:
        raise ShapeError(f"keys have {kv_here} tokens here and queries {here}; give kv_lengths beside lengths")
    kv_own = check_lengths(kv_lengths, peers.size, peers.rank, kv_here, "kv_lengths")
    extra = (0, 0) if joint is None else check_joint(joint, q, k, layout)
    if mask is not None:
        check_mask(mask, q.shape[0], q.shape[at_heads], sum(own) + extra[0], sum(kv_own) + extra[1])
    return _Call(
        peers=peers,
        layout=layout,
        batch=q.shape[0],
        heads=q.shape[at_heads],
        kv_heads=k.shape[at_heads],
        width=q.shape[3],
        lengths=own,
        kv_lengths=kv_own,
        mask=mask,
        joint=joint,
        joint_at=joint_at,
        shares=head_shares(q.shape[at_heads], k.shape[at_heads], peers.size, chunks),
        dtype=q.dtype,
        trained=_trained({"q": q, "k": k, "v": v, "mask": mask, **dict(zip(_JOINT, joint or (), strict=False))}),
        given=(lengths is not None, kv_lengths is not None),
    )


def _trained(tensors: dict[str, Tensor | None]) -> tuple[str, ...]:
    if not torch.is_grad_enabled():
        return ()
    return tuple(name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad)
