"""The load of a run before a tokenizer or torch is at hand: sizes of pictures from their headers, or an assumption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING

from mm_finetune.errors import ConfigError, DataError
from mm_finetune.planning.load import Load

if TYPE_CHECKING:
    from mm_datafmt import Sample
    from mm_finetune.config import TrainConfig

RECORDS = 1000  # that are looked at: a second's worth of headers
PATCH = 14


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Patches of a micro-batch, at most, and of a record on average.

    Attributes:
        source: where that is from, in words.
    """

    largest: int
    mean: float
    source: str


def assumed(config: TrainConfig, share: float, merge: int) -> Pictures:
    """A share of the tokens stands for pictures.

    Args:
        config: of the run.
        share: 0 to 1.
        merge: side of the square of patches that is a token.
    """
    # Both answers of a pair show the same pictures.
    tokens = micro_batch_tokens(config) // (2 if config.preference else 1)
    mean = config.data.seq_length * share * merge**2
    words = f"assumed: {share:.0%} of the tokens stand for pictures"
    return Pictures(largest=ceil(tokens * share) * merge**2, mean=mean, source=words)


def looked_at(config: TrainConfig, merge: int) -> Pictures | None:
    """The first records of the data set; None where it is not there, or can't be read.

    Args:
        config: of the run.
        merge: side of the square of patches that is a token.
    """
    from mm_datafmt import DataFormatError, read

    if config.preference or not config.data.path.is_file():
        return None
    try:
        samples = list(islice(read(config.data.path), min(RECORDS, config.data.max_samples or RECORDS)))
    except DataFormatError:
        return None
    if not samples:
        return None
    limits = _limits(config)
    loads = sorted((_patches(sample, config, limits, merge) for sample in samples), reverse=True)
    words = f"from the headers of the first {len(loads)} records of {config.data.path.name}"
    return Pictures(largest=_in_a_row(loads, config, merge), mean=sum(loads) / len(loads), source=words)


def micro_batch_tokens(config: TrainConfig) -> int:
    """Of the largest micro-batch: full rows."""
    return config.room or sequences(config) * config.data.seq_length


def sequences(config: TrainConfig) -> int:
    """Rows of a padded micro-batch; a pair has two."""
    return config.train.micro_batch_size * (2 if config.preference else 1)


def load_of(config: TrainConfig, pictures: Pictures, dp_size: int, micro_batches: int) -> Load:
    """The load of a run whose rows are full, and all of whose tokens carry loss."""
    packing = config.room is not None
    rows = 1 if packing else sequences(config)
    tokens = micro_batch_tokens(config)
    return Load(
        rows=rows,
        length=tokens // rows,
        loss_tokens=tokens,
        patches=pictures.largest,
        micro_batches=micro_batches,
        step_patches=ceil(pictures.mean * config.train.global_batch_size / dp_size),
        pieces=packing,
    )


def _in_a_row(loads: Sequence[int], config: TrainConfig, merge: int) -> int:
    """The most that comes together: the largest records, as many as a micro-batch takes."""
    if config.room is None:
        # Records are sorted by length, so the largest do meet.
        return sum(loads[: config.train.micro_batch_size])
    room, held = micro_batch_tokens(config), 0
    for load in loads:
        if (held + load) / merge**2 > room:
            break
        held += load
    return held


def _limits(config: TrainConfig) -> tuple[int, int]:
    """Smallest and largest picture in pixels, as :class:`mm_finetune.images.ImageReader` has them."""
    path = config.model.hf_dir / "preprocessor_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    size = settings.get("size") or {}
    low = config.data.min_pixels or settings.get("min_pixels") or size.get("shortest_edge") or 3136
    high = config.data.max_pixels or settings.get("max_pixels") or size.get("longest_edge") or 1003520
    return low, high


def _patches(sample: Sample, config: TrainConfig, limits: tuple[int, int], merge: int) -> int:
    from mm_datafmt import image_token_count
    from mm_finetune.images import image_size

    data = config.data
    root = data.dataset_dir or data.path.parent
    tokens = 0
    for name in sample.images:
        try:
            width, height = image_size(root / name)
            tokens += image_token_count(
                width, height, min_pixels=limits[0], max_pixels=limits[1], merge_size=merge, pixel_cap=data.pixel_cap
            )
        except (DataError, OSError, ValueError):
            continue  # a bad record is told of by the run, and by check
    # A video has at most this: frames in pairs, each as large as it may be.
    frames = ceil(data.video_maxlen / 2) * (data.video_max_pixels // PATCH**2) * len(sample.videos)
    return tokens * merge**2 + frames
