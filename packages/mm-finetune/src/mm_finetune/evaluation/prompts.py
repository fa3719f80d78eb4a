"""A question as the model reads it: tokens and pixels, the same as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mm_finetune.config import DataConfig
from mm_finetune.data.encoder import Encoder, Grid
from mm_finetune.errors import ConfigError, DataError
from mm_finetune.evaluation.questions import Question
from mm_finetune.images import ImageInputs
from mm_finetune.template import encode_prompt
from mm_finetune.videos import VideoInputs, read_header


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A question without its pixels: what headers tell."""

    question: Question
    input_ids: list[int]
    images: tuple[Grid, ...] = ()
    videos: tuple[Grid, ...] = ()
    second_per_grid: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question as the model reads it; None without pictures, without videos.

    Attributes:
        positions: ``[3, tokens]``, as in training.
    """

    input_ids: list[int]
    positions: Tensor
    images: ImageInputs | None = None
    videos: VideoInputs | None = None


class PromptReader:
    """Reads questions for one model.

    Args:
        hf_dir: the model folder: tokenizer and image processor.
        data: limits of pictures and videos, of a training run; default: those of the model folder.

    Raises:
        ConfigError: no model in `hf_dir`, or limits that contradict each other.
    """

    def __init__(self, hf_dir: Path, data: DataConfig | None = None) -> None:
        if not (hf_dir / "config.json").is_file():
            raise ConfigError(f"{hf_dir} has no config.json; give the folder of a Qwen2.5-VL model")
        # The encoder of a run, so that pictures are read as there; the records of the run are not looked at.
        self.encoder = Encoder(data or DataConfig(path=Path()), hf_dir)
        self.tokenizer = self.encoder.tokenizer

    def outline(self, question: Question) -> Outline:
        """Tokens, and the grids of pictures and videos from their headers.

        Raises:
            DataError: the question or a file can't be used.
        """
        encoder = self.encoder
        images = tuple(encoder.images.grid(*picture.size(), picture.name) for picture in question.pictures)
        plans = [encoder.videos.plan(read_header(path), str(path)) for path in question.videos]
        videos = tuple(plan.grid for plan in plans)
        ids = encode_prompt(
            question.messages,
            tokenizer=self.tokenizer,
            image_token_counts=self._tokens(images),
            video_token_counts=self._tokens(videos),
        )
        seconds = tuple(plan.second_per_grid for plan in plans)
        return Outline(question=question, input_ids=ids, images=images, videos=videos, second_per_grid=seconds)

    def read(self, outline: Outline) -> Prompt:
        """The whole question.

        Raises:
            DataError: a picture or video can't be read, or is another one than when it was looked at.
        """
        images, videos = outline.images, outline.videos
        return Prompt(
            input_ids=outline.input_ids,
            positions=self.encoder.positions(outline.input_ids, images, videos, outline.second_per_grid),
            images=ImageInputs(self._pictures(outline), _tensor(images), self._tokens(images)) if images else None,
            videos=VideoInputs(self._videos(outline), _tensor(videos), outline.second_per_grid) if videos else None,
        )

    def _pictures(self, outline: Outline) -> Tensor:
        read = []
        for picture, grid in zip(outline.question.pictures, outline.images, strict=True):
            patches, found = self.encoder.images.patches(picture.read(), picture.name)
            _require_grid(picture.name, grid, found[0].tolist())
            read.append(patches)
        return torch.cat(read)

    def _videos(self, outline: Outline) -> Tensor:
        read = []
        for path, grid in zip(outline.question.videos, outline.videos, strict=True):
            patches, found = self.encoder.videos.patches(path)
            _require_grid(str(path), grid, found)
            read.append(patches)
        return torch.cat(read)

    def _tokens(self, grids: Sequence[Grid]) -> tuple[int, ...]:
        return tuple(t * h * w // self.encoder.images.merge_size**2 for t, h, w in grids)


def limits_of(data: DataConfig) -> DataConfig:
    """Of a run's data section what pictures and videos become; the rest is as usual."""
    names = (
        "min_pixels", "max_pixels", "pixel_cap", "resample",
        "video_fps", "video_maxlen", "video_min_pixels", "video_max_pixels",
    )  # fmt: skip
    return replace(DataConfig(path=Path()), **{name: getattr(data, name) for name in names})


def _tensor(grids: Sequence[Grid]) -> Tensor:
    return torch.tensor(grids, dtype=torch.long).view(-1, 3)


def _require_grid(name: str, expected: Grid, found: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise DataError(f"{name} has changed meanwhile: it was {expected} patches, it is {tuple(found)}")
