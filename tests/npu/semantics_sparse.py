"""What the vendor's block-sparse attention operators compute: a block of queries sees some blocks of keys.

A block of queries that sees none comes out as NaN: no document says what it should be.

Sources: op-plugin, `docs/zh/custom_APIs/torch_npu/torch_npu-npu_block_sparse_attention.md`; ops-transformer,
`attention/rain_fusion_attention/docs/aclnnRainFusionAttention.md`.

Shape suffixes: B batch, S tokens (Q of the query, K of the keys), N heads, D channels, X blocks of queries, Y of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npu.semantics_attention import HALVES, Attended, attend
from npu.semantics_refusal import NotModelled, require, require_one_of, require_unused

LAYOUTS = ("TND", "BNSD")


def _blocks(tokens: int, size: int) -> int:
    return -(-tokens // size)


@dataclass(frozen=True)
class _Batch:
    """Batch entries of either layout, each with its own lengths."""

    layout: str
    q: Tensor
    k: Tensor
    v: Tensor
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layouts: tuple[str, str],
        lengths: tuple[Sequence[int] | None, Sequence[int] | None],
    ) -> _Batch:
        require_one_of("q_input_layout", layouts[0], LAYOUTS)
        require(layouts[0] == layouts[1], f"layouts are {layouts[0]} and {layouts[1]}; they must be equal")
        for name, each in (("query", q), ("key", k), ("value", v)):
            require_one_of(f"dtype of {name}", each.dtype, HALVES)
            require(each.dtype == q.dtype, f"query is {q.dtype}, {name} is {each.dtype}")
            require(each.dim() == len(layouts[0]), f"{name} {list(each.shape)} is not {layouts[0]}")
        require(k.shape == v.shape and k.shape[-1] == q.shape[-1], f"query {list(q.shape)}, key {list(k.shape)}")
        q_lengths, k_lengths = (cls._lengths(x, layouts[0], each) for x, each in zip((q, k), lengths, strict=True))
        require(len(q_lengths) == len(k_lengths), f"lengths {q_lengths} and {k_lengths}")
        return cls(layouts[0], q, k, v, q_lengths, k_lengths)

    @staticmethod
    def _lengths(x: Tensor, layout: str, lengths: Sequence[int] | None) -> tuple[int, ...]:
        """The length of each batch entry; they are no cumulative ones."""
        if layout == "TND":
            require(lengths is not None and sum(lengths) == x.shape[0], f"lengths {lengths} of {x.shape[0]} tokens")
        elif lengths is None:
            return (x.shape[2],) * x.shape[0]
        given = tuple(lengths or ())
        require(layout == "TND" or len(given) == x.shape[0], f"{len(given)} lengths for a batch of {x.shape[0]}")
        require(layout == "TND" or max(given) <= x.shape[2], f"lengths {given} of {x.shape[2]} tokens")
        return given

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries and of keys; the same axis in both layouts."""
        return self.q.shape[1], self.k.shape[1]

    @property
    def longest(self) -> tuple[int, int]:
        """What the number of blocks is counted by."""
        if self.layout == "BNSD":
            return self.q.shape[2], self.k.shape[2]
        return max(self.q_lengths), max(self.k_lengths)

    def entries(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Query, key and value of each batch entry, [1, N, S, D]."""
        for entry, lengths in enumerate(zip(self.q_lengths, self.k_lengths, strict=True)):
            of_each = ((self.q, 0, self.q_lengths), (self.k, 1, self.k_lengths), (self.v, 1, self.k_lengths))
            if self.layout == "BNSD":
                yield tuple(x[entry : entry + 1, :, : lengths[which]] for x, which, _ in of_each)  # type: ignore[misc]
            else:
                starts = [(x, sum(all_[:entry]), lengths[which]) for x, which, all_ in of_each]
                yield tuple(x[start : start + n].transpose(0, 1)[None] for x, start, n in starts)  # type: ignore[misc]

    def gather(self, parts: list[Tensor]) -> Tensor:
        """Put [1, N, S, D] results together in the layout; what lies beyond a length is NaN."""
        if self.layout == "TND":
            return torch.cat([part[0].transpose(0, 1) for part in parts])
        tokens = self.q.shape[2]
        padded = [torch.nn.functional.pad(p, (0, 0, 0, tokens - p.shape[2]), value=torch.nan) for p in parts]
        return torch.cat(padded)


def _attend_blocks(batch: _Batch, seen_BNXY: list[Tensor], block: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Result and log Σ exp, in the layout of the batch."""
    results: list[Attended] = []
    for (q, k, v), seen_NXY in zip(batch.entries(), seen_BNXY, strict=True):
        spread = seen_NXY.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
        results.append(attend(q, k, v, scale, ~spread[None, :, : q.shape[2], : k.shape[2]], rescue=False))
    out = batch.gather([each.out_BNQD for each in results]).to(batch.q.dtype)
    return out, batch.gather([each.lse for each in results]).detach()


def _check_block(block: Sequence[int], multiple: int) -> None:
    require(len(block) >= 2 and min(block) > 0, f"block shape {list(block)} must have two positive sizes")
    require(block[1] % multiple == 0, f"block shape {list(block)}: blocks of keys are multiples of {multiple}")


def _check_precision(inner_precise: int, dtype: torch.dtype, legal: tuple[int, ...] = (0, 1)) -> None:
    require_one_of("inner_precise", inner_precise, legal)
    require(not (inner_precise == 1 and dtype == torch.bfloat16), "bfloat16 wants inner_precise=0")


def _masked_blocks(
    batch: _Batch, mask: Tensor, block: Sequence[int], k_heads: int, scale: float, *, lse: bool
) -> tuple[Tensor, Tensor]:
    n, said = batch.heads[0], (batch.heads[1], k_heads)
    require(said[0] == said[1] and n % k_heads == 0, f"{n} query heads, {said[0]} key heads, said are {said[1]}")
    require_one_of("channels of a head", batch.q.shape[-1], (64, 128))
    blocks = tuple(_blocks(tokens, size) for tokens, size in zip(batch.longest, block, strict=False))
    require_one_of("shape of block_sparse_mask", tuple(mask.shape), ((len(batch.q_lengths), n, *blocks),))
    require_one_of("dtype of block_sparse_mask", mask.dtype, (torch.int8,))
    require(bool(((mask == 0) | (mask == 1)).all()), "block_sparse_mask holds something else than 0 and 1")
    out, of_rows = _attend_blocks(batch, list(mask.bool()), block, scale)
    return out, of_rows if lse else torch.full_like(of_rows, torch.nan)


def npu_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_sparse_mask: Tensor,
    block_shape: Sequence[int],
    *,
    q_input_layout: str = "TND",
    kv_input_layout: str = "TND",
    num_key_value_heads: int = 1,
    scale_value: float = 0.0,
    inner_precise: int = 1,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    softmax_lse_flag: int | None = 0,
) -> tuple[Tensor, Tensor]:
    """`npu::npu_block_sparse_attention`; the mask holds 1 where a block is seen. The scale is 0 unless it is said."""
    lengths = (actual_seq_lengths, actual_seq_lengths_kv)
    batch = _Batch.of(query, key, value, (q_input_layout, kv_input_layout), lengths)
    _check_block(block_shape, 128)
    _check_precision(inner_precise, query.dtype)
    require_one_of("softmax_lse_flag", softmax_lse_flag, (0, 1))
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        trains = batch.layout == "BNSD" and batch.heads[0] == batch.heads[1] and query.shape[-1] == 128
        require(trains, "gradients only for BNSD, as many key heads as query heads, 128 channels")
    return _masked_blocks(
        batch, block_sparse_mask, block_shape, num_key_value_heads, scale_value, lse=softmax_lse_flag == 1
    )


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_sparse_mask: Tensor | None = None,
    block_shape: Sequence[int] = (128, 128),
    q_input_layout: str = "BNSD",
    kv_input_layout: str = "BNSD",
    num_key_value_heads: int = 1,
    scale_value: float = 1.0,
    inner_precise: int = 0,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    softmax_lse_flag: int = 0,
    q_dequant_scale: Tensor | None = None,
    k_dequant_scale: Tensor | None = None,
    v_dequant_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mindiesd::block_sparse_attention`: the same formula, other defaults."""
    require_unused(q_scale=q_dequant_scale, k_scale=k_dequant_scale, v_scale=v_dequant_scale)
    if block_sparse_mask is None:
        raise NotModelled("no block_sparse_mask")
    lengths = (actual_seq_lengths, actual_seq_lengths_kv)
    batch = _Batch.of(query, key, value, (q_input_layout, kv_input_layout), lengths)
    _check_block(block_shape, 128)
    require(block_shape[0] % 128 == 0, f"block shape {list(block_shape)}: blocks of queries are multiples of 128")
    _check_precision(inner_precise, query.dtype, (0, 1, 4))
    return _masked_blocks(
        batch, block_sparse_mask, block_shape, num_key_value_heads, scale_value, lse=softmax_lse_flag == 1
    )


def rainfusionattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    select_idx: Tensor,
    select_num_idx: Tensor,
    blockshape: Sequence[int],
    attn_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    q_input_layout: str = "TND",
    kv_input_layout: str = "TND",
    head_num: int = 1,
    mask_type: int = 0,
    scale: float = 1.0,
    inner_precise: int = 1,
    block_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """`mindiesd::rainfusionattention`: for each block of queries and head, an ascending list of blocks of keys."""
    require_unused(attn_mask=attn_mask, block_table=block_table)
    require_one_of("mask_type", mask_type, (0,))
    require_one_of("block_size", block_size, (0,))
    require(actual_seq_qlen is not None and actual_seq_kvlen is not None, "both lists of lengths are mandatory")
    batch = _Batch.of(query, key, value, (q_input_layout, kv_input_layout), (actual_seq_qlen, actual_seq_kvlen))
    require(batch.heads == (head_num, head_num), f"heads {batch.heads}, said are {head_num}")
    _check_block(blockshape, 1)
    _check_precision(inner_precise, query.dtype)
    out, _ = _attend_blocks(batch, _listed(batch, select_idx, select_num_idx, blockshape), blockshape, scale)
    statistics = query.shape[:-1] if batch.layout == "BNSD" else query.shape
    return out, query.new_full(statistics, torch.nan)


def _listed(batch: _Batch, index_XNY: Tensor, count_XN: Tensor, block: Sequence[int]) -> list[Tensor]:
    """The blocks that are seen, [N, X, Y] of each batch entry; their lists stand one after the other."""
    rows = [_blocks(length, block[0]) for length in batch.q_lengths]
    columns = [_blocks(length, block[1]) for length in batch.k_lengths]
    n = batch.heads[0]
    require_one_of("shape of select_idx", tuple(index_XNY.shape), ((sum(rows), n, max(columns)),))
    require_one_of("shape of select_num_idx", tuple(count_XN.shape), ((sum(rows), n),))
    for name, each in (("select_idx", index_XNY), ("select_num_idx", count_XN)):
        require_one_of(f"dtype of {name}", each.dtype, (torch.int64,))
    listed = torch.arange(index_XNY.shape[2]) < count_XN[..., None]
    require(bool(((index_XNY == -1) == ~listed).all()), "select_idx is -1 exactly behind the listed blocks")
    steps = index_XNY.diff(dim=-1)[listed[..., 1:]]
    require(bool((steps > 0).all()), "the blocks of a list must ascend")
    seen = torch.zeros(*index_XNY.shape[:2], index_XNY.shape[2] + 1, dtype=torch.bool)
    seen.scatter_(2, index_XNY.where(listed, seen.shape[2] - 1), True)
    entries = torch.split(seen[..., :-1], rows)
    return [entry[..., :width].transpose(0, 1) for entry, width in zip(entries, columns, strict=True)]
