"""Attention once more, pair by pair in float64, without a line of the package; calls to compare; what tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.dispatch import Backend, Op
from dit_fused_ops.dispatch.backend import C

# The inputs are the same numbers in each dtype. Half precision rounds scores of size 4 (eager keeps products in the
# dtype), weights and result: some units in the last place, 2^-8 of bfloat16 and 2^-11 of float16. float32 sums a few
# dozen terms of size 1 in another order.
ERROR = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}


def loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    lengths: Sequence[int] | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of BNSD tensors: a loop over queries and keys; the mask broadcasts to [B, N, S, T]."""
    (B, N, S, D), (K, T), E = q.shape, k.shape[1:3], v.shape[3]
    out = torch.zeros(B, N, S, E, dtype=torch.float64)
    lse = torch.full((B, N, S), -math.inf, dtype=torch.float64)
    if mask is not None:
        mask = mask[:, None] if mask.dim() == 3 else mask
        mask = torch.broadcast_to(mask, (B, N, S, T))
    for b in range(B):
        for n in range(N):
            keys, values = k[b, n * K // N].double(), v[b, n * K // N].double()
            for s in range(S):
                scores = {}
                for t in range(T):
                    ahead = t - (s + T - S)
                    if (causal and ahead > 0) or (window[0] >= 0 and -ahead > window[0]):
                        continue
                    if (window[1] >= 0 and ahead > window[1]) or (lengths is not None and t >= lengths[b]):
                        continue
                    score = float(q[b, n, s].double() @ keys[t]) * (D**-0.5 if scale is None else scale)
                    score = softcap * math.tanh(score / softcap) if softcap else score
                    if mask is not None and mask.is_floating_point():
                        score += float(mask[b, n, s, t])
                    elif mask is not None and not mask[b, n, s, t]:
                        continue
                    if score > -math.inf:
                        scores[t] = score
                if scores:
                    total = math.fsum(math.exp(score) for score in scores.values())
                    lse[b, n, s] = math.log(total)
                    out[b, n, s] = sum(math.exp(score) / total * values[t] for t, score in scores.items())
    return out, lse


@dataclass(frozen=True)
class Case:
    """Sizes of one call, and its arguments; the mask, if there is one, as a shape and a kind."""

    B: int = 2
    N: int = 4
    K: int = 4
    S: int = 5
    T: int = 7
    D: int = 8
    E: int = 8
    mask: tuple[int, ...] | None = None
    kind: str = "bool"
    causal: bool = False
    window: tuple[int, int] | None = None
    lengths: tuple[int, ...] | None = None
    scale: float | None = None

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v in BNSD and the mask; the first query of a selecting mask sees nothing."""
        source = torch.Generator().manual_seed(seed)
        shapes = ((self.B, self.N, self.S, self.D), (self.B, self.K, self.T, self.D), (self.B, self.K, self.T, self.E))
        q, k, v = (torch.randn(shape, generator=source).to(dtype) for shape in shapes)
        if self.mask is None:
            return q, k, v, None
        keep = torch.rand(self.mask, generator=source) > 0.4
        keep[..., 0, :] = False
        if self.kind == "bool":
            return q, k, v, keep
        if self.kind == "int":
            return q, k, v, keep.to(torch.int32) * 3
        bias = torch.randn(self.mask, generator=source)
        return q, k, v, bias.masked_fill(~keep, -torch.inf) if self.kind == "bias with -inf" else bias

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords of attention_forward."""
        return {"is_causal": self.causal, "window": self.window, "key_lengths": self.lengths, "scale": self.scale}

    def expected(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the loops say."""
        window = self.window or (-1, -1)
        return loops(q, k, v, mask=mask, scale=self.scale, causal=self.causal, window=window, lengths=self.lengths)


CASES = {
    "plain": Case(),
    "odd sizes": Case(B=1, N=3, K=3, S=13, T=9, D=5, E=5),
    "one token": Case(S=1, T=1),
    "causal": Case(S=6, T=6, causal=True),
    "causal, more keys": Case(causal=True),
    "causal, more queries": Case(S=7, T=4, causal=True),
    "window": Case(window=(2, 1)),
    "window to the left": Case(window=(3, -1)),
    "window and causal": Case(window=(2, 3), causal=True),
    "window that leaves out one key": Case(S=3, T=3, window=(1, -1)),
    "window that leaves out the last key": Case(S=3, T=3, window=(-1, 1)),
    "one query in a window": Case(S=1, window=(2, -1)),
    "window, more queries": Case(S=9, T=4, window=(1, 2)),
    "lengths": Case(lengths=(3, 0)),
    "lengths and causal": Case(lengths=(5, 7), causal=True),
    "mask of queries and keys": Case(mask=(5, 7)),
    "mask a batch entry": Case(mask=(2, 5, 7)),
    "mask of keys": Case(mask=(2, 1, 1, 7)),
    "mask a head": Case(mask=(1, 4, 5, 7)),
    "whole mask": Case(mask=(2, 4, 5, 7)),
    "mask of whole numbers": Case(mask=(2, 1, 5, 7), kind="int"),
    "bias of keys": Case(mask=(1, 1, 1, 7), kind="bias"),
    "bias": Case(mask=(2, 4, 5, 7), kind="bias"),
    "bias with -inf": Case(mask=(2, 1, 5, 7), kind="bias with -inf"),
    "bias, causal, lengths": Case(mask=(5, 7), kind="bias", causal=True, lengths=(7, 2)),
    "mask, window, lengths": Case(mask=(2, 1, 5, 7), window=(3, 1), lengths=(4, 6)),
    "scale": Case(scale=2),
    "shared heads": Case(K=2),
    "one key head": Case(K=1, mask=(2, 1, 5, 7), causal=True),
    "wide values": Case(E=12),
    "narrow values, masked": Case(E=3, mask=(2, 5, 7)),
    "no key": Case(T=0),
    "no query": Case(S=0),
}

# Of the second no query, of the third no key, of the last neither.
Q_BOUNDS, K_BOUNDS = [0, 3, 3, 5, 9, 9], [0, 2, 4, 4, 9, 9]


def make_sequences(
    q_tokens: int,
    k_tokens: int,
    *,
    N: int = 4,
    K: int = 2,
    D: int = 8,
    E: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of sequences one after the other."""
    source = torch.Generator().manual_seed(seed)
    shapes = ((q_tokens, N, D), (k_tokens, K, D), (k_tokens, K, E))
    q, k, v = (torch.randn(shape, generator=source).to(dtype) for shape in shapes)
    return q, k, v


def expected_sequences(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Sequence[int], k_bounds: Sequence[int], **arguments: Any
) -> tuple[Tensor, Tensor]:
    """What the loops say of each sequence."""
    outs, lses = [], []
    for (q_first, q_last), (k_first, k_last) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        parts = (q[q_first:q_last], k[k_first:k_last], v[k_first:k_last])
        queries, keys, values = (part.transpose(0, 1)[None] for part in parts)
        out, lse = loops(queries, keys, values, **arguments)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def backend_of(op: Op[C], name: str) -> Backend[C]:
    """The backend, which the op must have."""
    backend = op.backend(name)
    assert backend is not None
    return backend


def refusal(op: Op[C], name: str, call: C) -> str | None:
    """Why the backend of this name refuses the call."""
    return backend_of(op, name).refuses(call)


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same tensors with heads and tokens exchanged."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Assert that they differ by no more than the arithmetic of `dtype` does."""
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted, atol=ERROR[dtype], rtol=ERROR[dtype])
