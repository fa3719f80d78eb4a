"""What the vendor's inference operators for dense attention compute; what the documents leave open is NaN.

Sources: op-plugin, `docs/zh/custom_APIs/torch_npu`: npu_prompt_flash_attention, npu_fused_infer_attention_score.
`mindiesd::la` has no public document: what is modelled is how MindIE SD calls it.

Shape suffixes: as in `semantics_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu.semantics_attention import (
    HALVES,
    INT_MAX,
    TRIANGLE,
    Attended,
    attend,
    check_alike,
    check_heads,
    check_mask,
    from_BNSD,
    masked_positions,
    to_BNSD,
)
from npu.semantics_refusal import VendorRefuses, require, require_one_of, require_unused

LASER_TOKENS, LASER_CHANNELS = 256, 128


@dataclass(frozen=True)
class _Inference:
    """What the two inference operators share.

    `bounds_without_mask`: whether the bounds hold without a mask; and for a single query, which is decoding to the
    operator that has both kinds, and knows no modes and bounds there.
    """

    layouts: tuple[str, ...]
    layout: str
    heads: int
    k_heads: int
    mask: Tensor | None
    scale: float
    before: int
    after: int
    mode: int
    q_lengths: Sequence[int] | None
    k_lengths: Sequence[int] | None
    bounds_without_mask: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, rescue: bool) -> tuple[Attended, str]:
        """The result, and the layout in which it is wanted."""
        require_one_of("input_layout", self.layout, self.layouts)
        check_alike(q, k, v, HALVES)
        for name, each in (("query", q), ("key", k), ("value", v), ("atten_mask", self.mask)):
            require(each is None or each.is_contiguous(), f"{name} is not contiguous")
        given, _, wanted = self.layout.partition("_")
        q = to_BNSD(q, given, self.heads)
        k, v = (to_BNSD(each, given, self.k_heads or self.heads) for each in (k, v))
        require(q.shape[-1] == k.shape[-1] <= 512, f"query has {q.shape[-1]} channels, key {k.shape[-1]}")
        require(q.shape[-1] * q.element_size() % 16 == 0, f"a head of {q.shape[-1]} channels is not 16-byte aligned")
        check_heads(q.shape[1], k.shape[1])
        attended = attend(q, k, v, self.scale, self._masked(q, k), rescue=rescue)
        beyond = ~within(self.q_lengths, *q.shape[::2])[:, None, :, None]
        parts = (attended.out_BNQD, attended.greatest, attended.total)
        return Attended(*(each.masked_fill(beyond, torch.nan) for each in parts)), wanted or given

    def _masked(self, q: Tensor, k: Tensor) -> Tensor | None:
        b, q_len, k_len = q.shape[0], q.shape[2], k.shape[2]
        shared = (b, k_len) if q_len == 1 else (q_len, k_len)
        shapes = (shared, *((x, q_len, k_len) for x in (1, b)), *((x, 1, q_len, k_len) for x in (1, b)))
        mode = 1 if q_len == 1 and not self.bounds_without_mask else self.mode
        triangles = tuple((1,) * ones + TRIANGLE for ones in range(3))
        check_mask(self.mask, mode, (torch.bool, torch.int8, torch.uint8), shapes, triangles)
        mask = self.mask
        if mask is not None and mode in (0, 1):
            mask = mask.view(-1, 1, q_len, k_len)
        elif mask is None and self.bounds_without_mask:
            mask = torch.zeros(q_len, k_len, dtype=torch.bool)
        masked = masked_positions(mask, mode, self.before, self.after, q_len, k_len)
        if self.k_lengths is None:
            return masked
        beyond = ~within(self.k_lengths, b, k_len)[:, None, None, :]
        return beyond if masked is None else beyond | masked


def within(lengths: Sequence[int] | None, b: int, tokens: int) -> Tensor:
    """True where a token is within the length of its batch entry, [B, S]; one length may serve all."""
    if lengths is None:
        return torch.ones(b, tokens, dtype=torch.bool)
    require(len(lengths) == 1 or len(lengths) >= b, f"{len(lengths)} lengths for a batch of {b}")
    require(all(0 <= length <= tokens for length in lengths), f"lengths {list(lengths)} of {tokens} tokens")
    chosen = torch.tensor(lengths[:b] if len(lengths) > 1 else [lengths[0]] * b)
    return torch.arange(tokens) < chosen[:, None]


def npu_prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    sparse_mode: int = 0,
    **unused: Any,
) -> Tensor:
    """`npu::npu_prompt_flash_attention`; inference. `next_tokens` is 0 unless it is said: no later key is then seen.

    Whether that holds without a mask too, the documents disagree; here it does, so that a caller has to say it.
    """
    require_unused(**unused)
    attention = _Inference(
        layouts=("BSH", "BSND", "BNSD", "BNSD_BSND"),
        layout=input_layout,
        heads=num_heads,
        k_heads=num_key_value_heads,
        mask=atten_mask,
        scale=scale_value,
        before=pre_tokens,
        after=next_tokens,
        mode=sparse_mode,
        q_lengths=actual_seq_lengths,
        k_lengths=actual_seq_lengths_kv,
        bounds_without_mask=True,
    )
    attended, layout = attention(query, key, value, rescue=False)
    return from_BNSD(attended.out_BNQD, layout).to(query.dtype)


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = INT_MAX,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    softmax_lse_flag: bool = False,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """`npu::npu_fused_infer_attention_score`; inference, can be captured in a graph, returns log Σ exp when asked."""
    require_unused(**unused)
    require_one_of("inner_precise", inner_precise, (0, 1, 2, 3))
    attention = _Inference(
        layouts=("BSH", "BSND", "BNSD", "BNSD_BSND"),
        layout=input_layout,
        heads=num_heads,
        k_heads=num_key_value_heads,
        mask=atten_mask,
        scale=scale,
        before=pre_tokens,
        after=next_tokens,
        mode=sparse_mode,
        q_lengths=actual_seq_lengths,
        k_lengths=actual_seq_lengths_kv,
    )
    attended, layout = attention(query, key, value, rescue=inner_precise in (2, 3))
    lse = attended.lse if softmax_lse_flag else query.new_empty(0, dtype=torch.float32)
    return from_BNSD(attended.out_BNQD, layout).to(query.dtype), lse


def la(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None = None,
    alibi_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    scale_value: float = 1.0,
    head_num: int = 2,
    input_layout: str = "BNSD",
    keep_prob: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = 1,
    is_highPrecision: bool = True,
) -> tuple[Tensor, Tensor]:
    """`mindiesd::la`, "laser attention": float16, whole tiles; the result stands second.

    `pre_tokens` says how many keys at the end are padding, unless it is the greatest int.
    """
    require_unused(atten_mask=atten_mask, alibi_mask=alibi_mask, drop_mask=drop_mask)
    for name, value_, legal in (("input_layout", input_layout, "BNSD"), ("keep_prob", keep_prob, 1.0)):
        require_one_of(name, value_, (legal,))
    require_one_of("next_tokens", next_tokens, (1,))
    require_one_of("is_highPrecision", is_highPrecision, (True,))
    check_alike(query, key, value, (torch.float16,))
    b, n, q_len, d = query.shape
    k_len = key.shape[2]
    require(key.shape == (b, n, k_len, d) and n == head_num, f"query {list(query.shape)}, key {list(key.shape)}")
    require(d == LASER_CHANNELS and q_len % LASER_TOKENS == k_len % LASER_TOKENS == 0, f"query {list(query.shape)}")
    padding = 0 if pre_tokens == INT_MAX else pre_tokens
    if not 0 <= padding < LASER_TOKENS:
        raise VendorRefuses(f"pre_tokens is {pre_tokens}")
    attended = attend(query, key, value, scale_value, torch.arange(k_len) >= k_len - padding, rescue=False)
    return query.new_full((b, n, q_len), torch.nan), attended.out_BNQD.to(query.dtype)
