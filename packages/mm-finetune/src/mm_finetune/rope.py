"""Multimodal rotary positions (M-RoPE) of Qwen2.5-VL for text and pictures.

Text counts up on all three axes together. A picture stands at one time; its merged patches take row
and column numbers on the other two axes; the text behind it goes on after the largest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def mrope_positions(
    input_ids: Sequence[int], image_grid_thw: Tensor, *, image_token_id: int, merge_size: int = 2
) -> Tensor:
    """Positions of one sample.

    Args:
        input_ids: the sample's tokens.
        image_grid_thw: ``[images, 3]``: each picture's grid of patches (time, height, width), in order.
        image_token_id: the token that stands once for each merged patch.
        merge_size: patches a side that become one token.

    Returns:
        ``[3, tokens]`` int64: time, height, width.

    Raises:
        ValueError: the runs of image tokens are not those of the grids.
    """
    parts: list[Tensor] = []
    start = 0
    grids = iter(image_grid_thw.tolist())
    for is_image, run in groupby(input_ids, key=lambda token: token == image_token_id):
        length = len(list(run))
        if is_image:
            part = _grid(next(grids, [0, 0, 0]), merge_size)
            if part.shape[1] != length:
                raise ValueError(f"{length} image tokens stand together, but the picture has {part.shape[1]}")
        else:
            part = torch.arange(length).expand(3, length)
        parts.append(part + start)
        start += int(part.max()) + 1
    if next(grids, None) is not None:
        raise ValueError("there are more pictures than runs of image tokens")
    return torch.cat(parts, dim=1)


def _grid(thw: Sequence[int], merge_size: int) -> Tensor:
    """``[3, tokens]`` of one picture, from 0; a still picture's time is 0 throughout."""
    t, h, w = thw[0], thw[1] // merge_size, thw[2] // merge_size
    zeros = torch.zeros(t, h, w, dtype=torch.long)
    return torch.stack([zeros, zeros + torch.arange(h)[:, None], zeros + torch.arange(w)]).flatten(1)
