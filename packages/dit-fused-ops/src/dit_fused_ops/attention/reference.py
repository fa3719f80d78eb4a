"""What attention is, in plain float32 torch: the truth that every backend is held against.

Shape suffixes: B batch, S query tokens, T key tokens, N query heads, K key heads (K divides N), D channels of a head,
E channels of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

Window = tuple[int, int]
UNBOUNDED: Window = (-1, -1)


def attention_naive(
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = UNBOUNDED,
    key_lengths: Tensor | None = None,
    softcap: float = 0.0,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale · q kᵀ + bias) v`` and the logarithm of the softmax's denominator.

    From Attention Is All You Need (arXiv 1706.03762). A query that sees no key gets 0, and a logarithm of -inf.

    Args:
        q_BNSD: queries.
        k_BKTD: keys; N / K neighbouring query heads share one of their heads (arXiv 2305.13245).
        v_BKTE: values.
        mask: broadcasts to [B, N, S, T]; True or non-zero keeps a key, a floating one is added to the scores.
        scale: of the scores; ``D ** -0.5`` without it.
        is_causal: a query sees no key after its position.
        window: a query sees this many keys before and after its position; -1 is no bound.
        key_lengths: [B], of each batch entry the first so many keys are seen.
        softcap: c > 0 turns each scaled score s into ``c · tanh(s / c)`` (Gemma 2, arXiv 2408.00118).
        positions: [S], where the queries stand among the keys; without it the last query stands at the last key.

    Returns:
        ([B, N, S, E], [B, N, S]) in float32, or float64 for float64 input.
    """
    dtype = torch.float64 if q_BNSD.dtype == torch.float64 else torch.float32
    return attention_math(
        q_BNSD.to(dtype),
        k_BKTD.to(dtype),
        v_BKTE.to(dtype),
        mask,
        scale=q_BNSD.shape[-1] ** -0.5 if scale is None else scale,
        window=causal_window(window) if is_causal else window,
        key_lengths=key_lengths,
        softcap=softcap,
        positions=positions,
    )


def attention_math(
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    window: Window,
    key_lengths: Tensor | None = None,
    softcap: float = 0.0,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_naive` with products in the dtype of the input; the softmax is float32 or wider all the same."""
    keys, groups = k_BKTD.shape[2], q_BNSD.shape[1] // k_BKTD.shape[1]
    if groups > 1:
        k_BKTD, v_BKTE = (each.repeat_interleave(groups, dim=1) for each in (k_BKTD, v_BKTE))
    scores = (q_BNSD * scale) @ k_BKTD.mT
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(mask == 0, -torch.inf)
    if positions is None:
        positions = query_positions(q_BNSD.shape[2], keys, q_BNSD.device)
    visible = visible_keys(positions, keys, window, key_lengths)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights, lse = _softmax(scores)
    return weights.to(v_BKTE.dtype) @ v_BKTE, lse


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, and the logarithm of their denominator; 0 and -inf, with finite gradients, where every score is -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    greatest = scores.detach().amax(-1, keepdim=True)
    empty = greatest == -torch.inf
    greatest = greatest.masked_fill(empty, 0)
    powers = (scores - greatest).exp()
    total = powers.sum(-1, keepdim=True).masked_fill(empty, 1)
    lse = (greatest + total.log()).masked_fill(empty, -torch.inf)
    return powers / total, lse.squeeze(-1)


def causal_window(window: Window) -> Window:
    """The same window without the keys after the query."""
    return (window[0], 0)


def query_positions(queries: int, keys: int, device: torch.device) -> Tensor:
    """Where the queries stand among the keys: the last one at the last key, [S]."""
    return torch.arange(queries, device=device) + (keys - queries)


def visible_keys(positions: Tensor, keys: int, window: Window, key_lengths: Tensor | None) -> Tensor | None:
    """Which keys window and lengths leave visible: True is visible, [B or 1, 1, S or 1, T]; None: all."""
    if window == UNBOUNDED and key_lengths is None:
        return None
    before, after = window
    column = torch.arange(keys, device=positions.device)
    parts = []
    if before >= 0:
        parts.append((column >= positions[:, None] - before)[None, None])
    if after >= 0:
        parts.append((column <= positions[:, None] + after)[None, None])
    if key_lengths is not None:
        parts.append((column < key_lengths[:, None])[:, None, None])
    visible = parts[0]
    for part in parts[1:]:
        visible = visible & part
    return visible
