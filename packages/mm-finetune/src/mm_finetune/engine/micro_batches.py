"""What the engine does to micro-batches before they run: loss weights, and sizes that the layout asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mm_finetune.data import Batch


def loss_weights(batch: Batch, loss: str) -> tuple[Tensor, Tensor]:
    """The weight of each token's loss, and what the sum over the global batch is divided by.

    Args:
        batch: its ``loss_mask`` weighs tokens.
        loss: ``token``: every token counts as it is weighed; ``sample``: each sample's weights sum to 1.

    Returns:
        ``[batch, tokens]`` and a scalar: the sum of the weights, or the number of samples that carry loss.
    """
    if loss == "token":
        return batch.loss_mask, batch.loss_mask.sum()
    sums = sequence_sums(batch, batch.loss_mask)
    carried = batch.loss_mask / sums.clamp(min=1e-12)[sequence_numbers(batch)]
    return carried, (sums > 0).sum().to(sums.dtype)


def padded(batch: Batch, multiple: int) -> Batch:
    """A number of tokens that sequence parallelism can cut; in a packed row the padding is a sample of its own."""
    tokens = batch.input_ids.shape[1]
    missing = -tokens % multiple
    if not missing:
        return batch
    changed: dict[str, Any] = {
        name: pad(getattr(batch, name), (0, missing))
        for name in ("input_ids", "labels", "loss_mask", "position_ids")
    }  # fmt: skip
    if batch.cu_seqlens is not None:
        end = batch.cu_seqlens.new_tensor([tokens + missing])
        changed["cu_seqlens"] = torch.cat([batch.cu_seqlens, end])
    return replace(batch, **changed)


def topped_up(batches: Sequence[Batch], multiple: int) -> list[Batch]:
    """As many micro-batches as the interleaved pipeline takes; those added hold one token without loss."""
    return [*batches, *[_blank(batches[0])] * (-len(batches) % multiple)]


def _blank(batch: Batch) -> Batch:
    changed: dict[str, Any] = {
        name: torch.zeros_like(getattr(batch, name)[..., :1, :1])
        for name in ("input_ids", "labels", "loss_mask", "position_ids")
    }  # fmt: skip
    absent = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "cu_seqlens")
    changed |= dict.fromkeys(absent)
    return replace(batch, **changed, image_order=(), video_order=(), tokens=0, numbers=())


def sequence_sums(batch: Batch, values: Tensor) -> Tensor:
    """``[sequences]``: the sum of `values` ``[batch, tokens]`` over the tokens of each."""
    count = batch.input_ids.shape[0] if batch.cu_seqlens is None else len(batch.cu_seqlens) - 1
    return values.new_zeros(count).scatter_add_(0, sequence_numbers(batch).flatten(), values.flatten())


def sequence_numbers(batch: Batch) -> Tensor:
    """``[batch, tokens]``: which sequence of the micro-batch each token belongs to."""
    rows, tokens = batch.input_ids.shape
    device = batch.input_ids.device
    if batch.cu_seqlens is None:
        return torch.arange(rows, device=device)[:, None].expand(rows, tokens)
    return torch.bucketize(torch.arange(tokens, device=device), batch.cu_seqlens[1:], right=True)[None]
