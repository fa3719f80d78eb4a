"""Attention in one process, written out: what the parallel ones are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rounding of sums of a few dozen terms of size 1, in another order than the reference's: some dozen eps(fp32) = 1.2e-7.
FP32 = 1e-5
# q, k, v, the output of each block, the output and the gradients are rounded to bf16, eps 7.8e-3 of numbers up to 4.
BF16 = 6e-2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention, of sequences that are spread over ranks by `lengths` and `kv_lengths`."""

    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...] | None = None
    heads: int = 4
    kv_heads: int | None = None
    width: int = 8
    batch: int = 2
    mask: str | None = None
    is_causal: bool = False
    scale: float | None = None
    layout: Any = "BSND"
    dtype: torch.dtype = torch.float32

    def whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and the gradient of the output, of all tokens, in BNSD."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.heads)
        keys = sum(self.kv_lengths or self.lengths)
        q, grad = (self._random(self.heads, sum(self.lengths), generator) for _ in range(2))
        k, v = (self._random(self.kv_heads or self.heads, keys, generator) for _ in range(2))
        return q, k, v, grad

    def whole_mask(self) -> Tensor | None:
        """The mask of all tokens."""
        queries, keys = sum(self.lengths), sum(self.kv_lengths or self.lengths)
        generator = torch.Generator().manual_seed(7)
        if self.mask is None:
            return None
        if self.mask == "padding":  # the second of the batch has half of its keys only
            return (torch.arange(keys) < torch.tensor([keys, (keys + 1) // 2])[:, None])[:, None, None]
        shape = (self.batch, self.heads, queries, keys)
        kept = torch.rand(shape, generator=generator) < 0.6
        kept[:, :, : (queries + 2) // 3] &= torch.arange(keys) < 0  # a third of the queries sees nothing
        if self.mask == "bool":
            return kept
        added = torch.randn(1, self.heads, queries, keys, generator=generator)
        return added.masked_fill(~kept[:1], -torch.inf) if self.mask == "float" else added[:, :1, :1]

    def reference(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output and gradients, by autograd in fp64."""
        *inputs, grad = (tensor.double() for tensor in self.whole())
        q, k, v = (tensor.requires_grad_() for tensor in inputs)
        out = naive_attention(q, k, v, self.whole_mask(), self.is_causal, self.scale)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
        return out.detach(), dq, dk, dv

    def parts(self, rank: int) -> tuple[Tensor, ...]:
        """What a rank holds of `whole`, in the layout of the case."""
        q, k, v, grad = self.whole()
        return (self.part(q, rank), self.part(k, rank, keys=True), self.part(v, rank, keys=True), self.part(grad, rank))

    def part(self, whole_BNSD: Tensor, rank: int, *, keys: bool = False) -> Tensor:
        """A rank's tokens of a tensor."""
        lengths = (self.kv_lengths or self.lengths) if keys else self.lengths
        part = whole_BNSD[:, :, sum(lengths[:rank]) : sum(lengths[: rank + 1])]
        return (part if self.layout == "BNSD" else part.transpose(1, 2)).contiguous()

    def arguments(self) -> dict[str, Any]:
        """The others, the same on every rank."""
        return {
            "layout": self.layout,
            "lengths": self.lengths,
            "kv_lengths": self.kv_lengths,
            "mask": self.whole_mask(),
            "is_causal": self.is_causal,
            "scale": self.scale,
        }

    def _random(self, heads: int, tokens: int, generator: torch.Generator) -> Tensor:
        return torch.randn(self.batch, heads, tokens, self.width, generator=generator).to(self.dtype)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """``softmax(q·kᵀ·scale + mask)·v``, BNSD; 0 where a query sees nothing."""
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v


def errors(case: Case, rank: int, out: Tensor, gradients: tuple[Tensor, ...]) -> list[float]:
    """The largest error of a rank's output and of its gradients of q, k and v."""
    found = []
    for at, (tensor, whole) in enumerate(zip((out, *gradients), case.reference(), strict=True)):
        assert tensor.dtype == case.dtype
        expected = case.part(whole, rank, keys=at > 1)
        assert tensor.shape == expected.shape
        difference = (tensor - expected).abs()
        found.append(difference.max().item() if difference.numel() else 0.0)
    return found
