"""How the samples of a step are laid into micro-batches: a matter of speed alone, the samples stay the same.

Everything here is a function of lengths that every process knows, so all of them make the same plan without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_finetune.errors import ConfigError

Row = tuple[int, ...]
"""Places of the samples of one micro-batch, in the list that was given."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Floating point operations of a forward pass, to deal samples evenly; two a multiplication with addition.

    Attributes:
        token: of each token, without attention.
        token_pair: of each pair of a token and one before it, in attention.
        patch: of each patch of the vision tower, merger included, attention inside windows too.
        patch_pair: of each pair of patches of one step of a grid, in the layers that attend to all of it.
    """

    token: float
    token_pair: float
    patch: float
    patch_pair: float

    @classmethod
    def of(cls, hf_config: Any) -> CostModel:
        """From transformers' ``Qwen2_5_VLConfig`` or ``Qwen2VLConfig``."""
        text, vision = hf_config.text_config, hf_config.vision_config
        hidden, heads = text.hidden_size, text.num_attention_heads
        head = getattr(text, "head_dim", None) or hidden // heads
        attention = 2 * hidden * head * (heads + text.num_key_value_heads)
        layer = attention + 3 * hidden * text.intermediate_size
        # Qwen2-VL's tower calls its width embed_dim, and has two matrices of four times that.
        wide = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None)
        block = 4 * wide**2 + (3 * wide * inner if inner else 8 * wide**2)
        merged = vision.spatial_merge_size**2
        merger = merged * wide**2 + wide * text.hidden_size
        full = len(getattr(vision, "fullatt_block_indexes", None) or range(vision.depth))
        window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
        return cls(
            token=2 * (text.num_hidden_layers * layer + hidden * text.vocab_size),
            token_pair=4 * text.num_hidden_layers * heads * head,
            patch=2 * (vision.depth * block + merger) + 4 * (vision.depth - full) * window * wide,
            patch_pair=4 * full * wide,
        )

    def __call__(self, tokens: int, patches: int = 0, largest: int = 0) -> float:
        """Cost of a sample.

        Args:
            tokens: its length.
            patches: of all its pictures and videos.
            largest: patches of the largest step of a grid; default: as if they were all one picture.
        """
        pairs = patches * (largest or patches)
        return self.token * tokens + self.token_pair * tokens**2 / 2 + self.patch * patches + self.patch_pair * pairs


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal samples to ranks so that their sums are about equal: the dearest first, to the rank that has least.

    Returns:
        For each rank its places, rising; none is empty where there are as many samples as ranks. The largest sum is at
        most 4/3 of the best possible one (Graham 1969, longest processing time first).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for place in sorted(range(len(costs)), key=lambda p: (-costs[p], p)):
        rank = min(range(ranks), key=lambda r: (sums[r], len(shares[r]), r))
        shares[rank].append(place)
        sums[rank] += costs[place]
    return [sorted(share) for share in shares]


def pack(lengths: Sequence[int], room: int) -> list[Row]:
    """Put samples into as few rows of `room` tokens as best fit decreasing finds, always the same ones.

    The longest sample goes first, each into the fullest row that still has room for it.

    Raises:
        ConfigError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        length = lengths[place]
        if length > room:
            raise ConfigError(f"a sample has {length} tokens, a row {room}; raise data.pack_length")
        fitting = [row for row, free in enumerate(left) if free >= length]
        if fitting:
            row = min(fitting, key=lambda r: (left[r], r))
            rows[row].append(place)
            left[row] -= length
        else:
            rows.append([place])
            left.append(room - length)
    return [tuple(row) for row in rows]


def micro_batches(lengths: Sequence[int], size: int) -> list[Row]:
    """Groups of `size` samples of about the same length, so that little is padded; the last may be smaller."""
    places = sorted(range(len(lengths)), key=lambda p: (-lengths[p], p))
    return [tuple(places[start : start + size]) for start in range(0, len(places), size)]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How steps are laid out.

    Attributes:
        ranks: data-parallel size.
        micro_batch_size: samples of a padded micro-batch.
        room: tokens of a packed row; None: padded micro-batches.
    """

    ranks: int = 1
    micro_batch_size: int = 1
    room: int | None = None

    def plan(self, lengths: Sequence[int], costs: Sequence[float]) -> list[list[Row]]:
        """For each data-parallel rank its micro-batches, as places in `lengths`; each place is in one of them.

        Padded micro-batches are dealt in equal numbers where their number allows it.

        Raises:
            ConfigError: there are too few samples for the ranks.
        """
        if self.room is None:
            planned = self._padded(lengths, costs)
        else:
            planned = [self._packed(share, lengths) for share in deal(costs, self.ranks)]
        if not all(planned):
            raise ConfigError(f"{len(lengths)} samples are too few for {self.ranks} data-parallel ranks")
        return planned

    def _padded(self, lengths: Sequence[int], costs: Sequence[float]) -> list[list[Row]]:
        rows = micro_batches(lengths, self.micro_batch_size)
        # A padded row costs as much as the longest of its batch.
        dear = [max(costs[place] for place in row) * len(row) for row in rows]
        dealt: list[list[Row]] = [[] for _ in range(self.ranks)]
        sums = [0.0] * self.ranks
        # In rounds of one for each rank: equal numbers, and the rank that has least gets the dearest of a round.
        for start in range(0, len(rows), self.ranks):
            poorest = sorted(range(self.ranks), key=lambda r: (sums[r], r))
            for rank, row in zip(poorest, range(start, min(start + self.ranks, len(rows))), strict=False):
                dealt[rank].append(rows[row])
                sums[rank] += dear[row]
        return dealt

    def _packed(self, share: Sequence[int], lengths: Sequence[int]) -> list[Row]:
        rows = pack([lengths[place] for place in share], self.room or 0)
        return [tuple(share[place] for place in row) for row in rows]
