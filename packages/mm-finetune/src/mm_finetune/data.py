"""Records to batches: encoded, in a seeded order, padded to the longest of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_datafmt import DataFormatError, Sample, read
from mm_finetune.config import DataConfig
from mm_finetune.errors import ConfigError, DataError
from mm_finetune.images import ImageInputs, ImageReader
from mm_finetune.rope import mrope_positions
from mm_finetune.template import IGNORE, encode

CACHED_SAMPLES = 4096  # encoded samples kept: small data sets are decoded once, large ones are not held


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One record as the model sees it. Shapes: ``[tokens]``, positions ``[3, tokens]``."""

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    images: ImageInputs | None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch, padded on the right.

    Attributes:
        input_ids: ``[batch, tokens]`` int64.
        labels: ``[batch, tokens]`` int64, already shifted: the token that follows; 0 where there is no loss.
        loss_mask: ``[batch, tokens]`` float32, 1 where the label counts.
        position_ids: ``[3, batch, tokens]`` int64.
        pixel_values: ``[patches, 1176]`` float32 of all pictures, or None.
        image_grid_thw: ``[images, 3]`` int64, or None.
        tokens: tokens without padding.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


class Dataset:
    """Encoded records by number.

    Args:
        config: path, picture limits, length limit.
        hf_dir: the model folder: tokenizer and image processor.

    Raises:
        DataError: no record, or not a data set.
        ConfigError: no model in `hf_dir`.
    """

    def __init__(self, config: DataConfig, hf_dir: Path) -> None:
        # Looked at first: transformers would take a folder that is not there for the name of a download.
        if not (hf_dir / "config.json").is_file():
            raise ConfigError(f"{hf_dir} is no Hugging Face folder: it has no config.json; is model.hf_dir right?")
        from transformers import AutoConfig, AutoTokenizer

        self.config = config
        try:
            self.samples: list[Sample] = list(islice(read(config.path), config.max_samples))
        except DataFormatError as error:
            raise DataError(f"{error}; make the file with mm-datafmt convert") from error
        self.root = config.dataset_dir or config.path.parent
        self.tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
        self.read_images = ImageReader(hf_dir, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        model = AutoConfig.from_pretrained(hf_dir, local_files_only=True)
        self.image_token_id: int = model.image_token_id
        self.merge_size: int = model.vision_config.spatial_merge_size
        self._encoded = lru_cache(maxsize=CACHED_SAMPLES)(self._encode)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> EncodedSample:
        return self._encoded(number)

    def _encode(self, number: int) -> EncodedSample:
        sample = self.samples[number]
        images = self.read_images([self.root / path for path in sample.images]) if sample.images else None
        counts = images.token_counts if images else ()
        encoded = encode(sample.messages, tokenizer=self.tokenizer, image_token_counts=counts)
        length = len(encoded.input_ids)
        if length > self.config.seq_length:
            raise DataError(
                f"record {number} of {self.config.path} has {length} tokens, data.seq_length is"
                f" {self.config.seq_length}; raise it, lower data.max_pixels, or leave the record out"
            )
        grid = images.image_grid_thw if images else torch.zeros(0, 3, dtype=torch.long)
        return EncodedSample(
            input_ids=torch.tensor(encoded.input_ids),
            labels=torch.tensor(encoded.labels),
            positions=mrope_positions(
                encoded.input_ids, grid, image_token_id=self.image_token_id, merge_size=self.merge_size
            ),
            images=images,
        )

    def check(self) -> None:
        """Look at every record's pictures before the first step, without decoding them.

        Raises:
            DataError: lists every picture that is missing.
        """
        paths = ((n, self.root / path) for n, sample in enumerate(self.samples) for path in sample.images)
        missing = [f"{path} (record {n})" for n, path in paths if not path.is_file()]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise DataError(f"pictures missing: {', '.join(missing[:5])}{more}; is data.dataset_dir right?")


def order(count: int, *, seed: int, epoch: int) -> list[int]:
    """The record numbers of an epoch: a permutation that depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def step_numbers(count: int, step: int, *, global_batch_size: int, seed: int) -> list[int]:
    """The record numbers of a step (from 1), in order, whatever the number of processes."""
    first = (step - 1) * global_batch_size
    places = range(first, first + global_batch_size)
    epochs = {place // count: order(count, seed=seed, epoch=place // count) for place in (places[0], places[-1])}
    for epoch in range(places[0] // count, places[-1] // count):
        epochs.setdefault(epoch, order(count, seed=seed, epoch=epoch))
    return [epochs[place // count][place % count] for place in places]


def collate(samples: Sequence[EncodedSample]) -> Batch:
    """Pad to the longest sample and shift the labels by one."""
    longest = max(len(sample.input_ids) for sample in samples)

    def padded(tensors: list[Tensor], value: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(t, (0, longest - t.shape[-1]), value=value) for t in tensors])

    shifted = [torch.cat([sample.labels[1:], torch.tensor([IGNORE])]) for sample in samples]
    labels = padded(shifted, IGNORE)
    images = [sample.images for sample in samples if sample.images]
    return Batch(
        input_ids=padded([sample.input_ids for sample in samples], 0),
        labels=labels.clamp(min=0),
        loss_mask=(labels != IGNORE).float(),
        position_ids=padded([sample.positions for sample in samples], 0).transpose(0, 1).contiguous(),
        pixel_values=torch.cat([i.pixel_values for i in images]) if images else None,
        image_grid_thw=torch.cat([i.image_grid_thw for i in images]) if images else None,
        tokens=sum(len(sample.input_ids) for sample in samples),
    )
