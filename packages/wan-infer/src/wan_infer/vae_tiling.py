"""Encoding and decoding large frames tile by tile, so that memory follows the tile and not the frame.

Neighbouring tiles overlap. What lies near the edge of a tile is thrown away, and in the middle quarter of the overlap
the two are blended linearly. It is an approximation: a tile sees nothing beyond its edge, neither through the
convolutions, which reach some 17 latents far in the published shape, nor through the attention of the middle block,
which sees all.

The error was measured with random weights (base_dim 16, otherwise the published shape), smooth latents of 24x40
(bicubic from 5x7), 2 frames, tiles of at most 24. Root mean square of the difference to `vae.decode`, and its maximum,
over the standard deviation of the video: overlap 4: 12 % and 2.3; overlap 8: 3.5 % and 1.1; overlap 12: 1.1 % and 0.25.
Trained weights were not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from wan_infer.errors import RequestError
from wan_infer.vae import RGB, WanVae


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How frames are cut; counted in rows and columns of latents, 8 pixels each.

    Attributes:
        size: the largest edge of a tile; the tiles of a frame are about equally large.
        overlap: what two neighbours share, at most half of `size`.

    Raises:
        RequestError: the two do not fit each other.
    """

    size: int = 48
    overlap: int = 12

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= 2 * self.overlap <= self.size:
            raise RequestError(
                f"tiles overlap by 0 to half their size, but size is {self.size} and overlap {self.overlap}"
            )

    def spans(self, length: int) -> list[slice]:
        """Return the tiles along an edge of the given length."""
        count = max(1, -(-(length - self.overlap) // (self.size - self.overlap)))
        step = max(-(-(length - self.overlap) // count), self.overlap, 1)
        starts = range(0, max(length - self.overlap, 1), step)
        return [slice(start, min(start + step + self.overlap, length)) for start in starts]


def decode_tiled(
    vae: WanVae, latents: Tensor, tiling: Tiling | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Decode a video one tile after the other; memory holds the stream of one tile and the video itself.

    How far that is from `vae.decode` is said at the top of this module.

    Args:
        vae: the decoder.
        latents: normalised, [B, z, T, h, w].
        tiling: how frames are cut; by default 48 latents with an overlap of 12.
        device: where the video is put together, the CPU for instance; by default where the latents are.

    Returns:
        [B, 3, 4 (T - 1) + 1, 8 h, 8 w] in [-1, 1].

    Raises:
        RequestError: the latents have another shape.
    """
    vae.check_latents(latents)
    stride, (batch, _, count, rows, columns) = vae.config.spatial_stride, latents.shape
    size = (batch, RGB, 1 + vae.config.temporal_stride * (count - 1), stride * rows, stride * columns)
    video = torch.zeros(size, dtype=vae.dtype, device=device or latents.device)
    for window, place, weight in _tiles(rows, columns, tiling or Tiling(), scale_out=stride):
        done = 0
        for frames in vae.decode_stream(latents[..., window[0], window[1]]):
            part = video[:, :, done : done + frames.shape[2], place[0], place[1]]
            part += (frames * weight.to(frames)).to(part.device)
            done += frames.shape[2]
    return video


def decode_tiled_stream(vae: WanVae, latents: Tensor, tiling: Tiling | None = None) -> Iterator[Tensor]:
    """Yield the frames of :func:`decode_tiled` as they are decoded: 1, then 4 for every further frame of latents.

    Every tile's stream stays open, so this saves only what a chunk needs while it is decoded, not the frames that the
    causal convolutions remember: where memory is short and the video fits, :func:`decode_tiled` takes less.

    Raises:
        RequestError: the latents have another shape.
    """
    vae.check_latents(latents)
    return _blend_streams(vae, latents, tiling or Tiling())


def encode_tiled(vae: WanVae, video: Tensor, tiling: Tiling | None = None) -> Tensor:
    """Encode a video one tile after the other; shapes and errors of `vae.encode`."""
    vae.check_video(video)
    stride, (rows, columns) = vae.config.spatial_stride, (size // vae.config.spatial_stride for size in video.shape[3:])
    latents: Tensor | None = None
    for window, place, weight in _tiles(rows, columns, tiling or Tiling(), scale_in=stride):
        part = vae.encode(video[..., window[0], window[1]])
        if latents is None:
            latents = part.new_zeros(*part.shape[:3], rows, columns)
        latents[..., place[0], place[1]] += part * weight.to(part)
    assert latents is not None, "there is at least one tile"
    return latents


def _blend_streams(vae: WanVae, latents: Tensor, tiling: Tiling) -> Iterator[Tensor]:
    stride, (rows, columns) = vae.config.spatial_stride, latents.shape[3:]
    tiles = _tiles(rows, columns, tiling, scale_out=stride)
    streams = [vae.decode_stream(latents[..., window[0], window[1]]) for window, _, _ in tiles]
    for parts in zip(*streams, strict=True):
        frames = parts[0].new_zeros(*parts[0].shape[:3], stride * rows, stride * columns)
        for part, (_, place, weight) in zip(parts, tiles, strict=True):
            frames[..., place[0], place[1]] += part * weight.to(part)
        yield frames


Window = tuple[slice, slice]


def _tiles(
    rows: int, columns: int, tiling: Tiling, *, scale_in: int = 1, scale_out: int = 1
) -> list[tuple[Window, Window, Tensor]]:
    """Return of every tile the window of the input, the window of the output, and the weights of the output."""
    edges = [list(zip(spans, _ramps(spans, scale_out), strict=True)) for spans in map(tiling.spans, (rows, columns))]
    return [
        (
            (_scaled(row, scale_in), _scaled(column, scale_in)),
            (_scaled(row, scale_out), _scaled(column, scale_out)),
            row_weight[:, None] * column_weight,
        )
        for (row, row_weight), (column, column_weight) in product(*edges)
    ]


def _ramps(spans: list[slice], scale: int) -> list[Tensor]:
    """Return the weights of every tile along an edge: where two tiles overlap, 3/8 of one, a ramp, 3/8 of the other."""
    weights = [torch.ones(scale * (span.stop - span.start)) for span in spans]
    for left, right in pairwise(range(len(spans))):
        shared = scale * (spans[left].stop - spans[right].start)
        rise = ((torch.arange(shared) + 0.5 - shared / 2) / max(shared / 4, 1) + 0.5).clamp(0, 1)
        weights[left][len(weights[left]) - shared :] *= 1 - rise
        weights[right][:shared] *= rise
    return weights


def _scaled(span: slice, by: int) -> slice:
    return slice(by * span.start, by * span.stop)
