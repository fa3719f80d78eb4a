"""Where the patches of pictures lie: the order in which the vision tower takes them, their windows and positions.

Patches come picture after picture, frame after frame, and in a frame by the squares of ``merge x merge`` that become a
token each. Qwen2.5-VL's tower takes these squares window after window (its report, arXiv 2502.13923, section 2.1.1);
Qwen2-VL's, which has no windows, as they come.

Shape suffixes: T patches of all pictures, M squares, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from mm_finetune.engine.attention import Rows

Grid: TypeAlias = Sequence[int]
"""Frames, and rows and columns of patches in each."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Of the pictures of a micro-batch, on the device.

    Attributes:
        order_M: the squares in the tower's order; None: as they come.
        back_M: where each square is in that order.
        windows: what patches attend to in most layers.
        frames: what they attend to in the others.
        rotary: cosines and sines ``[T, D]``.
    """

    order_M: Tensor | None
    back_M: Tensor | None
    windows: Rows
    frames: Rows
    rotary: tuple[Tensor, Tensor]

    def ordered(self, x: Tensor, merge: int) -> Tensor:
        """Patches ``[T, …]`` in the tower's order."""
        if self.order_M is None:
            return x
        squares: Tensor = x.unflatten(0, (-1, merge**2))
        return squares[self.order_M].flatten(0, 1)

    def restored(self, x_M: Tensor) -> Tensor:
        """Squares ``[M, …]`` as they came."""
        return x_M if self.back_M is None else x_M[self.back_M]


def geometry(
    grids: Sequence[Grid], *, merge: int, window: int, head_dim: int, theta: float, device: torch.device
) -> Geometry:
    """Of pictures.

    Args:
        grids: of the pictures and videos.
        merge: side of a square that becomes a token, in patches.
        window: side of a window, in squares; 0: there are none.
        head_dim: D.
        theta: the longest wavelength of the rotary embedding, over 2 pi.
        device: where tensors go.
    """
    orders, windows, frames, places = [], [0], [0], []
    for count, height, width in grids:
        frame = _frame(height, width, merge, window)
        for _ in range(count):
            orders.append(frame.order + frames[-1] // merge**2)
            windows += [windows[-1] + end for end in frame.ends]
            frames.append(frames[-1] + height * width)
            places.append(frame.places)
    order = torch.cat(orders)
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2))
    angles = (torch.cat(places).to(device)[:, :, None] * frequencies.to(device)).flatten(1).repeat(1, 2)
    return Geometry(
        order_M=order.to(device) if window else None,
        back_M=order.argsort().to(device) if window else None,
        windows=_rows(windows, device),
        frames=_rows(frames, device),
        rotary=(angles.cos(), angles.sin()),
    )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A frame: the order of its squares, where its windows end in patches, row and column of each patch, in order."""

    order: Tensor
    ends: tuple[int, ...]
    places: Tensor


@lru_cache(maxsize=1024)
def _frame(height: int, width: int, merge: int, window: int) -> _Frame:
    rows, columns = height // merge, width // merge
    side = window or max(rows, columns)
    row, column = (each.flatten() for each in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    numbers = row // side * -(-columns // side) + column // side
    order = numbers.argsort(stable=True)
    inside = torch.cartesian_prod(torch.arange(merge), torch.arange(merge))
    places = merge * torch.stack([row, column], 1)[order, None] + inside
    lengths = (numbers.bincount() * merge**2).tolist()
    return _Frame(order=order, ends=tuple(accumulate(lengths)), places=places.flatten(0, 1))


def _rows(bounds: Sequence[int], device: torch.device) -> Rows:
    return Rows(bounds=tuple(bounds), cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device))
