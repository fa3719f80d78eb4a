"""Ulysses and ring together (arXiv 2405.07719): heads are exchanged in the rows of a mesh, keys go round its columns.

Ulysses sends less and wants a fast wire; a ring has no limit by the number of heads and hides what it sends. On a mesh
("ring", "ulysses") of R rows and U columns, rank (r, u) holds shard ``r · U + u`` of the sequence: neighbours on one
node make a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dit_ulysses.agreement import agree
from dit_ulysses.blocks import BlockKernel
from dit_ulysses.errors import DisagreementError, GroupError
from dit_ulysses.inputs import Layout
from dit_ulysses.peers import Peers
from dit_ulysses.ring import read_tokens, ring_attention
from dit_ulysses.shares import Lengths, head_shares
from dit_ulysses.ulysses import Attention, ulysses_attention

_NAMES = ("ring", "ulysses")


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    layout: Layout = "BSND",
    lengths: Lengths | None = None,
    kv_lengths: Lengths | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: BlockKernel | None = None,
) -> Tensor:
    """Return the attention of a sequence that is spread over a mesh: that of this rank's queries.

    As `ring_attention`, in numbers, masks, gradients and what it refuses: it is `ulysses_attention` of each row, whose
    attention is a ring. The ranks of a column have the same heads, so where there are fewer heads than columns, whole
    columns only send and receive. Where key heads do not split evenly, a rank repeats those that it needs before they
    go round.

    Args:
        q, k, v: of this rank's tokens, in `layout`; see `ring_attention`.
        mesh: two dimensions, ("ring", "ulysses"), its ranks ascending along both; ``mesh["ring", "ulysses"]`` of a
            larger one.
        layout: "BSND" or "BNSD".
        lengths: tokens of all ranks, row by row; needed where they are not equal.
        kv_lengths: those of keys and values in cross-attention; `lengths` when None.
        mask: of the whole sequences, the same on every rank.
        is_causal, scale, kernel: as those of `ring_attention`.

    Returns:
        A tensor like `q`.

    Raises:
        GroupError: the mesh is another one, or this process is not in it.
        ShapeError, DisagreementError, LostRankError: as `ring_attention`.
    """
    ring, ulysses = _peers(mesh, q, k, v)
    rows, columns, row = ring.size, ulysses.size, ring.rank
    tokens = read_tokens(q, k, v, layout, lengths, kv_lengths, mask, rows * columns, row * columns + ulysses.rank)
    _agree(ring, ulysses, {"function": "usp_attention", **tokens.facts, "is_causal": is_causal, "scale": scale})
    by_row, kv_by_row = (
        [tuple(of[at * columns : (at + 1) * columns]) for at in range(rows)]
        for of in (tokens.lengths, tokens.kv_lengths)
    )
    if mask is not None and mask.shape[1] > 1:
        at_heads = layout.index("N")
        share = head_shares(q.shape[at_heads], k.shape[at_heads], columns)[0][ulysses.rank]
        mask = mask[:, share.start : share.end]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(
            *(q, k, v),
            group=ring.group,
            layout=layout,
            lengths=[sum(of_row) for of_row in by_row],
            kv_lengths=[sum(of_row) for of_row in kv_by_row],
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            kernel=kernel,
        )

    return _row_attention(q, k, v, ulysses, layout, by_row[row], kv_by_row[row], attention)


def _row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    peers: Peers,
    layout: Layout,
    lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    attention: Attention,
) -> Tensor:
    """Ulysses in one row, whose attention is `attention` on every rank that has a head."""
    tokens = layout.index("S")

    def without_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attention(q.narrow(tokens, 0, 0), k, v), torch.zeros_like(q)], dim=tokens)

    # Ulysses does not attend where there is no query, but the other rows wait for the keys of this one: a row without
    # queries enters with one that is made up, and taken out again before the ring.
    empty = not any(lengths)
    if empty:
        lengths = (1, *lengths[1:])
        made_up = q.new_zeros([1 if at == tokens else size for at, size in enumerate(q.shape)])
        q = torch.cat([q, made_up], dim=tokens) if peers.rank == 0 else q
    out: Tensor = ulysses_attention(
        *(q, k, v),
        group=peers.group,
        attention=without_last if empty else attention,
        layout=layout,
        lengths=lengths,
        kv_lengths=kv_lengths,
    )
    return out.narrow(tokens, 0, 0) if empty else out


def _peers(mesh: DeviceMesh, *tensors: Tensor) -> tuple[Peers, Peers]:
    """Return the column and the row of this process."""
    wanted = (
        'a DeviceMesh of two dimensions, ("ring", "ulysses"), is expected; take mesh["ring", "ulysses"] of a larger one'
    )
    if not isinstance(mesh, DeviceMesh):
        raise GroupError(f"mesh is a {type(mesh).__name__}; {wanted}")
    if mesh.mesh_dim_names != _NAMES:
        raise GroupError(f"the dimensions of the mesh are {mesh.mesh_dim_names}; {wanted}")
    # The ranks of a group are in ascending order; in another mesh a shard's place would not be that in the group.
    if any(bool((mesh.mesh.diff(dim=dim) <= 0).any()) for dim in (0, 1)):
        raise GroupError(f"the mesh is {mesh.mesh.tolist()}; ranks that ascend along both dimensions are expected")
    if mesh.get_coordinate() is None:
        raise GroupError(f"this process is not in the mesh {mesh.mesh.tolist()}; a mesh is for its own ranks only")
    ring, ulysses = (Peers.of(mesh.get_group(name), *tensors) for name in _NAMES)
    return ring, ulysses


def _agree(ring: Peers, ulysses: Peers, facts: dict[str, object]) -> None:
    """As `agree` for a whole mesh: a row that does not agree is known to every column, so no rank is left waiting."""
    trouble: DisagreementError | None = None
    try:
        agree(ulysses, facts)
    except DisagreementError as error:
        trouble = error
    agree(ring, {**facts, "in a row": "agreed" if trouble is None else trouble})
    if trouble is not None:
        raise trouble
