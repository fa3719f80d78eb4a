"""Rotary positions in three dimensions (RoFormer, arXiv 2104.09864, applied to frame, row and column)."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0

# Where torch multiplies complex numbers natively; elsewhere the same product is written out.
_COMPLEX_DEVICES = frozenset({"cpu", "cuda"})


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


def apply_rope(x_BSND: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring channels (2i, 2i+1) of every head by the angle of the token; dtype and shape stay.

    Args:
        x_BSND: queries or keys, [B, S, N, D].
        table: of `rope_table`, [S, D / 2, 2].
    """
    pairs = x_BSND.float().unflatten(-1, (-1, 2))
    rotate = _rotate_complex if x_BSND.device.type in _COMPLEX_DEVICES else rotate_written_out
    return rotate(pairs, table[:, None]).flatten(-2).to(x_BSND.dtype)


def rotate_written_out(pairs: Tensor, turns: Tensor) -> Tensor:
    """Return (a + bi)(cos + i sin) for pairs [..., 2] and turns [..., 2], in real arithmetic."""
    a, b = pairs.unbind(-1)
    cos, sin = turns.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _rotate_complex(pairs: Tensor, turns: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))


def _turns(size: int, pairs: int) -> Tensor:
    """Cosine and sine of one axis, [size, pairs, 2]."""
    frequencies = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.outer(torch.arange(size, dtype=torch.float64), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()
