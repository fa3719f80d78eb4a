"""Rotary positions in three dimensions (RoFormer, arXiv 2104.09864, applied to frame, row and column)."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def rope_table(grid: tuple[int, int, int], head_dim: int = 128, *, device: torch.device | str | None = None) -> Tensor:
    """Return cosine and sine of every angle, float32 [frames·rows·columns, head_dim / 2, 2].

    The pairs of a head are shared out as Wan2.1 does: with s = head_dim // 6, rows and columns take s pairs each and
    frames the rest, in the order frame, row, column. Pair i of n of an axis turns by position · 10000^(-i/n). Angles
    are computed in float64.

    Args:
        grid: tokens along frames, rows and columns.
        head_dim: channels of a head, even; 128 in all published models.
        device: where the table is wanted.
    """
    spatial = head_dim // 6
    pairs = (head_dim // 2 - 2 * spatial, spatial, spatial)
    axes = [_turns(size, count).to(device) for size, count in zip(grid, pairs, strict=True)]
    shape = [(-1, 1, 1), (1, -1, 1), (1, 1, -1)]
    spread = [axis.view(*where, *axis.shape[1:]).expand(*grid, -1, -1) for axis, where in zip(axes, shape, strict=True)]
    return torch.cat(spread, dim=3).flatten(0, 2)


def _turns(size: int, pairs: int) -> Tensor:
    """Cosine and sine of one axis, [size, pairs, 2]."""
    frequencies = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.outer(torch.arange(size, dtype=torch.float64), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()
