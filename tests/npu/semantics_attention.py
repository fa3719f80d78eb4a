"""Attention by the vendor's published formula, in plain float32 torch, and its training operator.

    out = softmax(scale · q·kᵀ, masked positions left out) · v

What the documents leave open comes out as NaN, so that no caller can rely on it: rows without any key when the operator
was not told to expect them, stretches beyond a given length, statistics that were not asked for.

Source: op-plugin, `docs/zh/custom_APIs/torch_npu`, npu_fusion_attention.

Shape suffixes: B batch, S tokens (Q of the query, K of the keys), N heads, D channels of a head, H = N·D, T tokens of
all sequences one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npu.semantics_refusal import NotModelled, require, require_one_of, require_unused

INT_MAX = 2**31 - 1
TRIANGLE = (2048, 2048)  # the compressed causal mask always has that shape
STATISTICS = 8  # softmax_max and softmax_sum repeat each number that often
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


@dataclass(frozen=True)
class Attended:
    """`out_BNQD`, and of each row the greatest score and the sum of exp(score - greatest), [B, N, Q, 1]; float32."""

    out_BNQD: Tensor
    greatest: Tensor
    total: Tensor

    @property
    def lse(self) -> Tensor:
        """log Σ exp(score), [B, N, Q, 1]."""
        return self.greatest + self.total.log()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Greatest and total as the training operator returns them, [B, N, Q, 8]."""
        greatest, total = (x.detach().expand(*x.shape[:-1], STATISTICS) for x in (self.greatest, self.total))
        return greatest, total


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, masked: Tensor | None, *, rescue: bool) -> Attended:
    """The formula, of BNSD tensors; keys may have fewer heads. A row without a key gives 0 with `rescue`, else NaN."""
    k, v = (each.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = scale * (q.float() @ k.mT)
    if masked is not None:
        scores = scores.masked_fill(masked, -torch.inf)
    greatest = scores.detach().amax(-1, keepdim=True)
    empty = greatest == -torch.inf
    weights = (scores - greatest.masked_fill(empty, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    out = weights / total.masked_fill(empty, 1) @ v
    return Attended(
        out if rescue else out.masked_fill(empty, torch.nan),
        greatest.masked_fill(empty, torch.nan),
        total.masked_fill(empty, torch.nan),
    )


def to_BNSD(x: Tensor, layout: str, heads: int) -> Tensor:
    """Bring a tensor of a batched layout to BNSD."""
    require(heads > 0, f"{heads} heads")
    if layout in ("BSH", "SBH"):
        require(x.dim() == 3 and x.shape[-1] % heads == 0, f"{layout} tensor {list(x.shape)} of {heads} heads")
        x = x.reshape(*x.shape[:2], heads, -1)
        return x.transpose(1, 2) if layout == "BSH" else x.permute(1, 2, 0, 3)
    require(x.dim() == 4, f"{layout} tensor {list(x.shape)}")
    x = x if layout == "BNSD" else x.transpose(1, 2)
    require(x.shape[1] == heads, f"{layout} tensor has {x.shape[1]} heads, said are {heads}")
    return x


def from_BNSD(x: Tensor, layout: str) -> Tensor:
    """Bring a BNSD tensor to a batched layout."""
    if layout == "BNSD":
        return x
    if layout == "SBH":
        return x.permute(2, 0, 1, 3).flatten(2)
    return x.transpose(1, 2) if layout == "BSND" else x.transpose(1, 2).flatten(2)


def outside_band(q_len: int, k_len: int, before: int, after: int, *, bottom_right: bool) -> Tensor:
    """True where a key is more than `before` in front of its query or more than `after` behind it, [Q, K]."""
    row = torch.arange(q_len)[:, None] + (k_len - q_len if bottom_right else 0)
    column = torch.arange(k_len)[None, :]
    return (column < row - before) | (column > row + after)


@functools.cache
def _triangle() -> Tensor:
    return torch.ones(TRIANGLE, dtype=torch.bool).triu(1)


def masked_positions(mask: Tensor | None, mode: int, before: int, after: int, q_len: int, k_len: int) -> Tensor | None:
    """Where the vendor's `sparse_mode` leaves scores out; None: nowhere. Without a mask no mode has an effect."""
    require_one_of("sparse_mode", mode, (0, 1, 2, 3, 4))
    if mask is None:
        return None
    if mode == 0:
        return mask.bool() | outside_band(q_len, k_len, before, after, bottom_right=False)
    if mode == 1:
        return mask.bool()
    require(
        bool((mask.bool() == _triangle()).all()), f"sparse_mode {mode} wants the mask that is True above the diagonal"
    )
    before, after = (before, after) if mode == 4 else (INT_MAX, 0)
    return outside_band(q_len, k_len, before, after, bottom_right=mode != 2)


def check_mask(
    mask: Tensor | None,
    mode: int,
    dtypes: Sequence[object],
    shapes: Sequence[tuple[int, ...]],
    triangles: Sequence[tuple[int, ...]],
) -> None:
    """The mask must have one of the dtypes and shapes; a compressed one that of a triangle."""
    if mask is not None:
        require_one_of("dtype of atten_mask", mask.dtype, dtypes)
        require_one_of("shape of atten_mask", tuple(mask.shape), shapes if mode in (0, 1) else triangles)


def check_heads(q_heads: int, k_heads: int) -> None:
    """Up to 256 query heads, a multiple of the key heads."""
    require(0 < q_heads <= 256 and q_heads % k_heads == 0, f"{q_heads} query heads, {k_heads} key heads")


def check_alike(q: Tensor, k: Tensor, v: Tensor, dtypes: Sequence[object]) -> None:
    """One dtype of those; key and value of one shape."""
    for name, each in (("query", q), ("key", k), ("value", v)):
        require_one_of(f"dtype of {name}", each.dtype, dtypes)
        require(each.dtype == q.dtype, f"query is {q.dtype}, {name} is {each.dtype}")
    require(k.shape == v.shape, f"key {list(k.shape)}, value {list(v.shape)}")


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = INT_MAX,
    next_tockens: int = INT_MAX,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """`npu::npu_fusion_attention`; the training operator. Without dropout `gen_mask_parallel` and `sync` do nothing."""
    require_unused(pse=pse, padding_mask=padding_mask, prefix=prefix, sink=sink, dropout_mask=dropout_mask)
    if keep_prob != 1 or seed or offset:
        raise NotModelled("dropout")
    require_one_of("input_layout", input_layout, ("BSH", "SBH", "BSND", "BNSD", "TND"))
    require_one_of("inner_precise", inner_precise, (0, 1, 2))
    check_alike(query, key, value, FLOATS)
    how = _Fusion(head_num, atten_mask, scale, pre_tockens, next_tockens, sparse_mode, inner_precise == 2)
    if input_layout == "TND":
        require(actual_seq_qlen is not None and actual_seq_kvlen is not None, "TND wants both lists of lengths")
        out, statistics = how.sequences(query, key, value, actual_seq_qlen or (), actual_seq_kvlen or ())
        require_one_of("softmax_layout", softmax_layout, ("", "TND"))
        if softmax_layout == "":  # the numbers then stand in the order N, T, D whatever the shape says
            greatest, total = (each.transpose(0, 1).reshape(each.shape) for each in statistics)
            statistics = greatest, total
    else:
        require(actual_seq_qlen is None and actual_seq_kvlen is None, f"lengths are for TND, not {input_layout}")
        require_one_of("softmax_layout", softmax_layout, ("",))
        out, statistics = how.batch(query, key, value, input_layout)
    return out.to(query.dtype), *statistics, query.new_empty(0), 0, 0, 0


@dataclass(frozen=True)
class _Fusion:
    heads: int
    mask: Tensor | None
    scale: float
    before: int
    after: int
    mode: int
    rescue: bool

    def batch(self, q: Tensor, k: Tensor, v: Tensor, layout: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = to_BNSD(q, layout, self.heads)
        k_heads = k.shape[-1] // q.shape[-1] if layout in ("BSH", "SBH") else k.shape[layout.index("N")]
        require(k_heads > 0, f"key {list(k.shape)} has no head of {q.shape[-1]} channels")
        k, v = (to_BNSD(each, layout, k_heads) for each in (k, v))
        b, n, q_len, _ = q.shape
        k_len = k.shape[2]
        shapes = ((b, n, q_len, k_len), (b, 1, q_len, k_len), (1, 1, q_len, k_len), (q_len, k_len))
        check_mask(self.mask, self.mode, (torch.bool, torch.uint8), shapes, (TRIANGLE,))
        attended = self._attend(q, k, v, self.mask)
        return from_BNSD(attended.out_BNQD, layout), attended.statistics()

    def sequences(
        self, q: Tensor, k: Tensor, v: Tensor, q_ends: Sequence[int], k_ends: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        require(q.dim() == k.dim() == 3, f"TND query {list(q.shape)}, key {list(k.shape)}")
        require(q.shape[1] == self.heads, f"query has {q.shape[1]} heads, said are {self.heads}")
        q_bounds, k_bounds = bounds(q_ends, q.shape[0]), bounds(k_ends, k.shape[0])
        require(len(q_bounds) == len(k_bounds), f"{len(q_bounds)} sequences of queries, {len(k_bounds)} of keys")
        longest = tuple(max(stop - start for start, stop in each) for each in (q_bounds, k_bounds))
        check_mask(self.mask, self.mode, (torch.bool, torch.uint8), (longest,), (TRIANGLE,))
        outs, all_greatest, all_total = [], [], []
        for (q_start, q_stop), (k_start, k_stop) in zip(q_bounds, k_bounds, strict=True):
            parts = (q[q_start:q_stop], k[k_start:k_stop], v[k_start:k_stop])
            mask = self.mask
            if mask is not None and self.mode in (0, 1):
                mask = mask[: q_stop - q_start, : k_stop - k_start]
            q_one, k_one, v_one = (part.transpose(0, 1)[None] for part in parts)
            attended = self._attend(q_one, k_one, v_one, mask)
            outs.append(attended.out_BNQD[0].transpose(0, 1))
            greatest, total = (each[0].transpose(0, 1) for each in attended.statistics())
            all_greatest.append(greatest)
            all_total.append(total)
        return torch.cat(outs), (torch.cat(all_greatest), torch.cat(all_total))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Attended:
        require(q.shape[-1] == k.shape[-1] <= 768, f"query has {q.shape[-1]} channels, key {k.shape[-1]}")
        require(q.shape[0] == k.shape[0], f"batch of {q.shape[0]} queries, {k.shape[0]} keys")
        check_heads(q.shape[1], k.shape[1])
        masked = masked_positions(mask, self.mode, self.before, self.after, q.shape[2], k.shape[2])
        # The one case in which the operator is documented to find empty rows by itself.
        finds_empty_rows = self.mode == 3 and q.shape[2] > k.shape[2]
        return attend(q, k, v, self.scale, masked, rescue=self.rescue or finds_empty_rows)


def bounds(ends: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """(start, stop) of each sequence from cumulative lengths; the last must be the number of tokens."""
    starts = [0, *ends[:-1]]
    ascending = list(ends) == sorted(ends)
    require(ascending and bool(ends) and ends[-1] == tokens, f"lengths {list(ends)} of {tokens} tokens")
    return list(zip(starts, ends, strict=True))
