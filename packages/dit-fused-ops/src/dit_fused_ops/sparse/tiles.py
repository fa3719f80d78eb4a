"""The order in which video tokens are cut into blocks: neighbours in the picture become neighbours in the sequence.

```
given:        [ text | frame 0, row by row | frame 1, row by row | … ]
tile order:   [ frame 0, tile by tile | frame 1, tile by tile | … | text ]
```
"""

from __future__ import annotations

import torch
from torch import Tensor

Latent = tuple[int, int, int]

TILE = 8  # rows and columns of a tile


def tile_order(latent: Latent, device: torch.device | None = None) -> Tensor:
    """Return, for each place in tile order, the number of the video token that stands there.

    A tile is 8 · 8 neighbouring tokens of one frame, row by row; the tiles of a frame follow each other row by row, as
    in RainFusion 2 (MindIE SD, `rf_v2`). When the height or width is no multiple of 8, frame 0 stays row by row, and of
    every other frame the tiles come first, then the rows below them over the full width, then the columns to the right
    of them.

    Args:
        latent: frames, height and width of the video in tokens.
        device: of the result.

    Returns:
        int64 [frames · height · width], a permutation.
    """
    frames, height, width = latent
    rows, columns = height - height % TILE, width - width % TILE
    number_THW = torch.arange(frames * height * width, device=device).view(frames, height, width)
    in_raster = 0 if (rows, columns) == (height, width) else 1
    tiled = number_THW[in_raster:]
    cut = tiled[:, :rows, :columns].reshape(len(tiled), rows // TILE, TILE, columns // TILE, TILE)
    parts = (cut.transpose(2, 3), tiled[:, rows:], tiled[:, :rows, columns:])
    by_frame = torch.cat([part.flatten(1) for part in parts], dim=1)
    return torch.cat((number_THW[:in_raster].flatten(), by_frame.flatten()))


def token_order(latent: Latent, txt_len: int, device: torch.device | None = None) -> Tensor:
    """Return the tile order of the sequence [text | video]: the video in tile order, then the text.

    Returns:
        int64 [frames · height · width + txt_len], a permutation; its `argsort` leads back.
    """
    text = torch.arange(txt_len, device=device)
    return torch.cat((tile_order(latent, device) + txt_len, text))
