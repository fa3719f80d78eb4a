"""What rotary position embedding is, in plain float32 torch: the truth that every backend is held against.

Shape suffixes: B batch, S tokens, N heads, D channels of a head, R rotated channels (R ≤ D).
"""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("rotated_half", "rotated_interleaved")


def rotary_naive(x: Tensor, cos: Tensor, sin: Tensor, mode: str = "rotated_half") -> Tensor:
    """Return ``x · cos + rotate(x) · sin`` of the first R channels, and the others as they are.

    From RoFormer (arXiv 2104.09864). ``rotate`` turns a pair of channels (a, b) into (-b, a). The pairs are
    (i, i + R/2) in "rotated_half" and (2i, 2i + 1) in "rotated_interleaved".

    Args:
        x: any shape [..., D].
        cos: full width R, the cosine of a pair at both of its channels; broadcastable to [..., R].
        sin: the same of the sine.
        mode: which channels are a pair.

    Returns:
        float32, or float64 where one of the tensors is, of the shape of `x`.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, cos.dtype) else torch.float32
    x, cos, sin = x.to(dtype), cos.to(dtype), sin.to(dtype)
    turning, passing = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    return torch.cat((turning * cos + rotate_pairs(turning, mode) * sin, passing), dim=-1)


def rotate_pairs(x: Tensor, mode: str) -> Tensor:
    """Turn each pair (a, b) of the last dimension into (-b, a); which channels are a pair, `mode` says."""
    if mode == "rotated_half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), dim=-1).flatten(-2)


def full_width(table: Tensor, mode: str) -> Tensor:
    """Widen a table [..., R/2], one column for each pair, to the [..., R] of `rotary_naive`."""
    return torch.cat((table, table), dim=-1) if mode == "rotated_half" else table.repeat_interleave(2, dim=-1)
