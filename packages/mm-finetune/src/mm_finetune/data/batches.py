"""Encoded samples side by side: padded to the longest, or packed into one row.

Shapes: B rows, S tokens of the longest row, N samples of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mm_finetune.images import ImageInputs
from mm_finetune.template import IGNORE
from mm_finetune.videos import VideoInputs

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One record as the model sees it.

    Attributes:
        input_ids: ``[tokens]`` int64.
        labels: ``[tokens]`` int64: the token itself where it carries loss, else -100. Not shifted.
        positions: ``[3, tokens]`` int64.
        images: its pictures, or None. Their pixels may be left out: an empty tensor.
        videos: its videos, or None; the same.
        weights: ``[tokens]`` float32: what each label weighs; default: 1.
        number: the record's number, -1 for none.
        lengths: of the sequences that the record is made of, one behind the other, each with all pictures; empty: it
            is one.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    images: ImageInputs | None = None
    videos: VideoInputs | None = None
    weights: Tensor | None = None
    number: int = -1
    lengths: tuple[int, ...] = ()

    def sequences(self) -> list[EncodedSample]:
        """The sequences of the record, each by itself."""
        if not self.lengths:
            return [self]
        ids, labels = self.input_ids.split(self.lengths), self.labels.split(self.lengths)
        positions = self.positions.split(self.lengths, dim=1)
        weights = [None] * len(ids) if self.weights is None else self.weights.split(self.lengths)
        return [
            replace(self, input_ids=i, labels=la, positions=p, weights=w, lengths=())
            for i, la, p, w in zip(ids, labels, positions, weights, strict=True)
        ]

    def silenced(self) -> EncodedSample:
        """The same without loss."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: rows padded on the right, or one row of packed samples.

    Attributes:
        input_ids: ``[B, S]`` int64.
        labels: ``[B, S]`` int64, already shifted: the token that follows; 0 where there is no loss.
        loss_mask: ``[B, S]`` float32, what the label weighs in the loss, mostly 1 or 0.
        position_ids: ``[3, B, S]`` int64; they start anew with each packed sample.
        pixel_values: ``[patches, 1176]`` float32 of all pictures, or None: there are none, or this process needs none.
        image_grid_thw: ``[images, 3]`` int64, or None for no pictures.
        tokens: tokens without padding.
        cu_seqlens: ``[N + 1]`` int32: where each packed sample begins, and the end of the row; None for padded rows.
            A token attends to its own sample alone.
        pixel_values_videos: ``[patches, 1176]`` float32 of all videos, or None as above.
        video_grid_thw: ``[videos, 3]`` int64, or None for no videos.
        image_order: which pictures the sequences show, one after the other, where several show the same; empty: each
            picture stands once, in order.
        video_order: the same of videos.
        numbers: the record of each sequence, in the order of the rows; a record of several stands there as often.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    tokens: int
    cu_seqlens: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    image_order: tuple[int, ...] = ()
    video_order: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def without_pixels(self) -> Batch:
        """The same batch for a process that embeds no pictures; the grids stay."""
        return replace(self, pixel_values=None, pixel_values_videos=None)


def collate(samples: Sequence[EncodedSample], *, packed: bool = False) -> Batch:
    """Lay samples into a micro-batch and shift their labels by one.

    Args:
        samples: at least one; the sequences of a record stay beside each other.
        packed: one behind the other in one row, instead of one below the other.
    """
    samples = [sequence for sample in samples for sequence in sample.sequences()]
    ids = [sample.input_ids for sample in samples]
    labels = [_next(sample.labels, IGNORE) for sample in samples]
    weights = [_next(torch.ones(len(s.labels)) if s.weights is None else s.weights, 0.0) for s in samples]
    positions = [sample.positions for sample in samples]
    lengths = [len(tokens) for tokens in ids]
    lay = _one_row if packed else _rows
    laid_labels = lay(labels, IGNORE)
    return Batch(
        input_ids=lay(ids, 0),
        labels=laid_labels.clamp(min=0),
        loss_mask=lay(weights, 0).float() * (laid_labels != IGNORE),
        position_ids=lay(positions, 0).transpose(0, 1).contiguous(),
        tokens=sum(lengths),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int() if packed else None,
        numbers=tuple(sample.number for sample in samples),
        **_media(samples),
    )


def _next(values: Tensor, last: float) -> Tensor:
    """Shifted to the left by one; the last token predicts nothing, so no label crosses into the next sample."""
    return torch.cat([values[1:], values.new_full((1,), last)])


def _rows(tensors: Sequence[Tensor], value: int) -> Tensor:
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([torch.nn.functional.pad(t, (0, longest - t.shape[-1]), value=value) for t in tensors])


def _one_row(tensors: Sequence[Tensor], value: int) -> Tensor:
    return torch.cat(list(tensors), dim=-1)[None]


def _media(samples: Sequence[EncodedSample]) -> dict[str, Any]:
    images, image_order = _once([sample.images for sample in samples if sample.images], "image_grid_thw")
    videos, video_order = _once([sample.videos for sample in samples if sample.videos], "video_grid_thw")
    return {
        "pixel_values": torch.cat([one.pixel_values for one in images]) if images else None,
        "image_grid_thw": torch.cat([one.image_grid_thw for one in images]) if images else None,
        "pixel_values_videos": torch.cat([one.pixel_values_videos for one in videos]) if videos else None,
        "video_grid_thw": torch.cat([one.video_grid_thw for one in videos]) if videos else None,
        "image_order": image_order,
        "video_order": video_order,
    }


def _once(media: Sequence[T], grid: str) -> tuple[list[T], tuple[int, ...]]:
    """What the sequences of a record share, one time; and where in it the pictures of each sequence are."""
    places: dict[int, range] = {}
    unique, end = [], 0
    for one in media:
        if id(one) not in places:
            unique.append(one)
            places[id(one)] = range(end, end := end + len(getattr(one, grid)))
    order = tuple(number for one in media for number in places[id(one)])
    return unique, () if len(unique) == len(media) else order
