"""Multimodal rotary positions (M-RoPE) of Qwen2.5-VL for text, pictures and videos.

Text counts up on all three axes together. A picture stands at one time; its merged patches take row
and column numbers on the other two axes; the text behind it goes on after the largest of them. The time of a
video's patches advances by the tokens a second that the model was made for (Qwen2.5-VL technical report, 2.1.3).

Text behind a video goes on after the largest number of all three axes, time included. So does the code of the model's
authors in transformers 4 (pull request 35569), and so do vLLM and MindSpeed MM. transformers 5 (seen in 5.24) looks at
rows and columns alone: the text behind a video that lasts longer than it is high or wide gets numbers that the video
has already, while generation still counts on from the largest of all. That is taken for a mistake and not followed;
all other positions are the same. ``eval`` and ``infer`` give transformers these positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def mrope_positions(
    input_ids: Sequence[int],
    image_grid_thw: Tensor,
    *,
    image_token_id: int,
    merge_size: int = 2,
    video_grid_thw: Tensor | None = None,
    video_token_id: int | None = None,
    second_per_grid_ts: Sequence[float] = (),
    tokens_per_second: float = 2,
) -> Tensor:
    """Positions of one sample.

    Args:
        input_ids: the sample's tokens.
        image_grid_thw: ``[images, 3]``: each picture's grid of patches (time, height, width), in order.
        image_token_id: the token that stands once for each merged patch.
        merge_size: patches a side that become one token.
        video_grid_thw: ``[videos, 3]``, None for no videos.
        video_token_id: the token that stands once for each merged patch of a video.
        second_per_grid_ts: for each video the seconds between two steps of its grid.
        tokens_per_second: time steps of the model in a second (``vision_config.tokens_per_second``).

    Returns:
        ``[3, tokens]`` int64: time, height, width.

    Raises:
        ValueError: the runs of image or video tokens are not those of the grids.
    """
    videos = [] if video_grid_thw is None else video_grid_thw.tolist()
    if len(videos) != len(second_per_grid_ts):
        raise ValueError(f"{len(videos)} videos, but {len(second_per_grid_ts)} of second_per_grid_ts")
    spans = {
        image_token_id: iter([(grid, 0.0) for grid in image_grid_thw.tolist()]),
        video_token_id: iter(zip(videos, second_per_grid_ts, strict=True)),
    }
    parts: list[Tensor] = []
    start = 0
    for token, run in groupby(input_ids, key=lambda token: token if token in spans else None):
        length = len(list(run))
        if token is None:
            part = torch.arange(length).expand(3, length)
        else:
            grid, seconds = next(spans[token], ([0, 0, 0], 0.0))
            part = _grid(grid, merge_size, tokens_per_second * seconds)
            if part.shape[1] != length:
                raise ValueError(f"{length} image tokens stand together, but the picture has {part.shape[1]}")
        parts.append(part + start)
        start += int(part.max()) + 1
    if any(next(left, None) is not None for left in spans.values()):
        raise ValueError("there are more pictures than runs of image tokens")
    return torch.cat(parts, dim=1)


def _grid(thw: Sequence[int], merge_size: int, interval: float) -> Tensor:
    """``[3, tokens]`` of one picture or video, from 0; times are cut to whole steps after the multiplication."""
    t, h, w = thw[0], thw[1] // merge_size, thw[2] // merge_size
    zeros = torch.zeros(t, h, w, dtype=torch.long)
    times = (torch.arange(t) * torch.tensor(interval)).long()
    return torch.stack(
        [zeros + times[:, None, None], zeros + torch.arange(h)[:, None], zeros + torch.arange(w)]
    ).flatten(1)
