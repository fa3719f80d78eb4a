"""One record to tokens, labels, positions and pixels; the first three without looking at a pixel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_datafmt import Sample
from mm_finetune.config import DataConfig
from mm_finetune.data.batches import EncodedSample
from mm_finetune.data.faults import records_of, require_read
from mm_finetune.data.truncation import Shortened, shorten
from mm_finetune.errors import ConfigError, DataError
from mm_finetune.images import ImageInputs, ImageReader, image_size
from mm_finetune.rope import mrope_positions
from mm_finetune.template import Encoded, LabelRules, Segment, labelled, segments, tokenize, turns
from mm_finetune.videos import VideoInputs, VideoReader, read_header

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Media:
    """The grids of a record's pictures and videos, before anything is cut off, from headers alone."""

    images: tuple[Grid, ...] = ()
    videos: tuple[Grid, ...] = ()
    second_per_grid: tuple[float, ...] = ()


class Encoder:
    """Encodes records for one model and one set of limits. Safe to use from several threads.

    Args:
        config: limits and rules.
        hf_dir: the model folder: tokenizer and image processor.

    Raises:
        ConfigError: no model in `hf_dir`, or limits that contradict each other.
    """

    def __init__(self, config: DataConfig, hf_dir: Path) -> None:
        # Looked at first: transformers would take a folder that is not there for the name of a download.
        if not (hf_dir / "config.json").is_file():
            raise ConfigError(f"{hf_dir} is no Hugging Face folder: it has no config.json; is model.hf_dir right?")
        from transformers import AutoConfig, AutoTokenizer

        self.config = config
        self.root = config.dataset_dir or config.path.parent
        self.rules = LabelRules(mask_history=config.mask_history, train_on_prompt=config.train_on_prompt)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
        steps = {"pixel_cap": config.pixel_cap, "resample": config.resample}
        self.images = ImageReader(hf_dir, min_pixels=config.min_pixels, max_pixels=config.max_pixels, **steps)  # type: ignore[arg-type]
        low = min(self.images.min_pixels, config.video_max_pixels)
        low = low if config.video_min_pixels is None else config.video_min_pixels
        frames = ImageReader(hf_dir, min_pixels=low, max_pixels=config.video_max_pixels)
        self.videos = VideoReader(frames, fps=config.video_fps, maxlen=config.video_maxlen)
        self.hf_config: Any = AutoConfig.from_pretrained(hf_dir, local_files_only=True)
        self.patch_width = self.images.patch_width
        self._merged = self.images.merge_size**2

    def records(self) -> Iterator[Sample]:
        """The records of the data set.

        Raises:
            DataFormatError: it is none that mm-datafmt knows.
        """
        return records_of(self.config.path)

    def fingerprint(self) -> str:
        """Digest of all that the length of a record depends on, besides the record."""
        config = self.config
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        settings = (
            self.images.settings, self.videos.settings, self.rules, config.seq_length, config.truncate,
            str(self.root.absolute()),
        )  # fmt: skip
        return hashlib.blake2b(f"{settings}{words}".encode(), digest_size=16).hexdigest()

    def media(self, sample: Sample) -> Media:
        """Look at the headers of a record's files.

        Raises:
            DataError: one is missing, damaged or of an impossible shape.
        """
        if sample.audios:
            raise DataError("the record has sound, which Qwen2.5-VL does not hear; leave the record out")
        images = [self.images.grid(*image_size(path), str(path)) for path in self.paths(sample.images)]
        plans = [self.videos.plan(read_header(path), str(path)) for path in self.paths(sample.videos)]
        return Media(tuple(images), tuple(p.grid for p in plans), tuple(p.second_per_grid for p in plans))

    def paths(self, names: Sequence[str]) -> list[Path]:
        """Where files of a record are."""
        return [self.root / name for name in names]

    def segments(self, sample: Sample) -> list[Segment]:
        """The texts of a record that are tokenised by themselves.

        Raises:
            DataError: the record could not be read, or its turns or placeholders are wrong.
        """
        require_read(sample)
        return segments(sample.messages, images=len(sample.images), videos=len(sample.videos))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts, of one record or many."""
        return tokenize(texts, self.tokenizer)

    def conversation(
        self, pieces: Sequence[Segment], ids: Sequence[Sequence[int]], media: Media
    ) -> tuple[Shortened, Encoded]:
        """The turns that fit, and their tokens.

        Raises:
            DataError: the text itself holds tokens that stand for pictures.
        """
        made = turns(pieces, ids, self.tokenizer, self._tokens(media.images), self._tokens(media.videos))
        short = shorten(made, self.config.seq_length, self.config.truncate)
        return short, labelled(short.turns, self.rules)

    def encode(self, sample: Sample, media: Media, number: int, *, pixels: bool) -> EncodedSample:
        """Encode a record.

        Args:
            sample: the record.
            media: the grids of its files; they decide, whatever the files have become meanwhile.
            number: of the record.
            pixels: read the pictures; else their pixels are left out.

        Raises:
            DataError: the record or a file can't be used.
        """
        pieces = self.segments(sample)
        short, encoded = self.conversation(pieces, self.tokenize([piece.text for piece in pieces]), media)
        grids = media.images[: short.images], media.videos[: short.videos]
        seconds = media.second_per_grid[: short.videos]
        ends = [*accumulate(encoded.lengths, initial=0)] if encoded.lengths else [0, len(encoded.input_ids)]
        positions = [self.positions(encoded.input_ids[a:b], *grids, seconds) for a, b in pairwise(ends)]
        return EncodedSample(
            input_ids=torch.tensor(encoded.input_ids),
            labels=torch.tensor(encoded.labels),
            positions=torch.cat(positions, dim=1),
            images=self._images(sample, grids[0], pixels) if grids[0] else None,
            videos=self._videos(sample, grids[1], media, pixels) if grids[1] else None,
            weights=torch.tensor(encoded.weights) if set(encoded.weights) - {0.0, 1.0} else None,
            number=number,
            lengths=encoded.lengths,
        )

    def positions(
        self, input_ids: Sequence[int], images: Sequence[Grid], videos: Sequence[Grid], seconds: Sequence[float]
    ) -> Tensor:
        """``[3, tokens]``: see :func:`mm_finetune.rope.mrope_positions`.

        Args:
            input_ids: of one conversation.
            images: the grids of its pictures.
            videos: of its videos.
            seconds: for each video those between two steps of its grid.
        """
        config = self.hf_config
        # Qwen2-VL knows no seconds: each step of a video's grid is one step in time.
        rate = getattr(config.vision_config, "tokens_per_second", None)
        return mrope_positions(
            input_ids,
            _grids(images),
            image_token_id=config.image_token_id,
            merge_size=self.images.merge_size,
            video_grid_thw=_grids(videos),
            video_token_id=config.video_token_id,
            second_per_grid_ts=[1.0] * len(seconds) if rate is None else seconds,
            tokens_per_second=1 if rate is None else rate,
        )

    def _tokens(self, grids: Sequence[Grid]) -> list[int]:
        return [t * h * w // self._merged for t, h, w in grids]

    def _images(self, sample: Sample, grids: Sequence[Grid], pixels: bool) -> ImageInputs:
        read = []
        for path, grid in zip(self.paths(sample.images), grids, strict=False):
            if pixels:
                patches, found = self.images.read(path)
                _require_grid(path, grid, tuple(found[0].tolist()))
                read.append(patches)
        return ImageInputs(self._joined(read), _grids(grids), tuple(self._tokens(grids)))

    def _videos(self, sample: Sample, grids: Sequence[Grid], media: Media, pixels: bool) -> VideoInputs:
        read = []
        for path, grid in zip(self.paths(sample.videos), grids, strict=False):
            if pixels:
                patches, found = self.videos.patches(path)
                _require_grid(path, grid, found)
                read.append(patches)
        return VideoInputs(self._joined(read), _grids(grids), media.second_per_grid[: len(grids)])

    def _joined(self, read: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(read)) if read else torch.empty(0, self.patch_width)


def _grids(grids: Sequence[Grid]) -> Tensor:
    return torch.tensor(grids, dtype=torch.long).view(-1, 3)


def _require_grid(path: Path, expected: Grid, found: tuple[int, ...]) -> None:
    if tuple(expected) != tuple(found):
        raise DataError(f"{path} has changed during the run: {found} patches instead of {tuple(expected)}")
