"""Which key blocks each block of queries attends to: RainFusion 2, the selection of MindIE SD's `rf_v2` and `rf_v3`.

Each block of tokens is represented by its mean. A block of queries keeps the key blocks whose mean scores highest with
its own; the first frame and the text keep everything and are kept by everything.

Shape suffixes: B batch, N heads, S tokens, D channels of a head, Q blocks of queries, K blocks of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fused_ops.sparse.tiles import Latent


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The tokens of one side of attention in tile order, cut into blocks; the last one may be short.

    Attributes:
        tokens: video and text together.
        size: tokens of a block.
        first: how many leading blocks are always kept: those that hold a token of the first frame.
        text: the block from which on all are always kept: the first one that holds a token of the text.
    """

    tokens: int
    size: int
    first: int
    text: int

    @property
    def count(self) -> int:
        """The number of blocks."""
        return -(-self.tokens // self.size)

    @property
    def forced_count(self) -> int:
        """How many blocks are always kept."""
        return self.count - max(0, self.text - self.first)

    def forced(self, device: torch.device) -> Tensor:
        """Which blocks are always kept, bool [count]."""
        number = torch.arange(self.count, device=device)
        return (number < self.first) | (number >= self.text)

    def lengths(self, device: torch.device) -> Tensor:
        """The tokens of each block, int64 [count]."""
        return (self.tokens - self.size * torch.arange(self.count, device=device)).clamp(max=self.size)


def video_blocks(latent: Latent, txt_len: int, size: int, *, legacy: bool = False) -> Blocks:
    """Return the blocks of a video with its text behind it.

    MindIE SD takes the last ``ceil(txt_len / size)`` blocks for those of the text (`legacy`); when the video does not
    end at the end of a block, the text begins in an earlier one.
    """
    frames, height, width = latent
    video = frames * height * width
    tokens = video + txt_len
    count = -(-tokens // size)
    text = count - -(-txt_len // size) if legacy else video // size if txt_len else count
    return Blocks(tokens=tokens, size=size, first=-(-height * width // size), text=text)


def kept_count(count: int, sparsity: float, *, legacy: bool = False) -> int:
    """Return ``max(1, ceil(count · (1 - sparsity)))``: how many of `count` key blocks a block of queries keeps.

    A product that is a whole number but for its rounding is that number; not so in `legacy`, where 10 blocks at
    sparsity 0.7 keep 4.
    """
    wanted = count * (1 - sparsity)
    return max(1, math.ceil(wanted if legacy else round(wanted, 9)))


def least_density(q_blocks: Blocks, k_blocks: Blocks, kept: int) -> float:
    """Return the share of all pairs of blocks that is kept at least, whatever the numbers are."""
    rows, columns = q_blocks.forced_count / q_blocks.count, k_blocks.forced_count / k_blocks.count
    return rows + (1 - rows) * max(kept / k_blocks.count, columns)


def density(mask_BNQK: Tensor, q_blocks: Blocks, k_blocks: Blocks) -> Tensor:
    """Return the share of all pairs of tokens that takes part, a float32 tensor [] on the device of the mask."""
    q_share, k_share = (each.lengths(mask_BNQK.device).float() / each.tokens for each in (q_blocks, k_blocks))
    return (mask_BNQK * q_share[:, None] * k_share).sum((2, 3)).mean()


def pool_blocks(x_BNSD: Tensor, blocks: Blocks) -> Tensor:
    """Return the mean of each block of tokens, [B, N, blocks, D] in float32 or wider."""
    dtype = torch.float64 if x_BNSD.dtype == torch.float64 else torch.float32
    padded = F.pad(x_BNSD, (0, 0, 0, blocks.count * blocks.size - blocks.tokens))
    total = padded.unflatten(2, (blocks.count, blocks.size)).sum(3, dtype=dtype)
    pooled: Tensor = total / blocks.lengths(x_BNSD.device)[:, None]
    return pooled


@torch.no_grad()
def select_blocks(
    q_BNSD: Tensor, k_BNSD: Tensor, q_blocks: Blocks, k_blocks: Blocks, *, scale: float, kept: int, legacy: bool = False
) -> Tensor:
    """Return which key blocks each block of queries keeps.

    The score of a pair of blocks is ``scale · mean(q) · mean(k)``; the softmax over the key blocks of the published
    formula keeps their order, and is left out. Key blocks that tie with the last one kept are kept as well, and so is
    a score that is no number, which thereby shows in the result.

    Args:
        q_BNSD: queries in tile order.
        k_BNSD: keys in tile order; their heads divide those of the queries.
        q_blocks: of the queries.
        k_blocks: of the keys.
        scale: of attention.
        kept: key blocks that a block of queries keeps by its scores.
        legacy: the selection of the first batch entry holds for all, as in MindIE SD.

    Returns:
        bool [B, N, Q, K].
    """
    heads = q_BNSD.shape[1] // k_BNSD.shape[1]
    with torch.autocast(q_BNSD.device.type, enabled=False):
        k_BNKD = pool_blocks(k_BNSD, k_blocks).repeat_interleave(heads, dim=1)
        score_BNQK = pool_blocks(q_BNSD, q_blocks) @ k_BNKD.mT * scale
    last_kept = score_BNQK.topk(kept, dim=-1, sorted=True).values[..., -1:]
    chosen = ~(score_BNQK < last_kept)
    device = q_BNSD.device
    mask_BNQK = chosen | q_blocks.forced(device)[:, None] | k_blocks.forced(device)
    return mask_BNQK[:1].expand_as(mask_BNQK) if legacy else mask_BNQK
