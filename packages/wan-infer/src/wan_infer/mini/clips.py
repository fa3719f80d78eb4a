"""What wan-mini knows: short clips of a handwritten digit that moves through the picture, and their captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64  # pixels, both ways
FRAMES = 17
DIGIT_SIZE = 28  # pixels
SPEED = 2  # pixels a frame

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CAPTIONS = (
    "the digit {digit} moves {direction}",
    "the digit {digit} moves {direction}",  # twice: it is what the documentation says
    "a {digit} moving {direction}",
    "the handwritten number {name} goes {direction}",
    "{name} slides to the {direction}",
    "a video of the digit {digit} that moves {direction}.",
)


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        video: [3, FRAMES, SIZE, SIZE] in [-1, 1].
        digit: 0 to 9.
        direction: a key of `DIRECTIONS`.
        caption: what it shows, in words.
    """

    video: Tensor
    digit: int
    direction: str
    caption: str


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 handwritten digits as float32 [1797, DIGIT_SIZE, DIGIT_SIZE] in [0, 1], and labels.

    They are the test half of the UCI set "Optical Recognition of Handwritten Digits", 8 × 8 pixels each.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    large = F.interpolate(images, size=(DIGIT_SIZE, DIGIT_SIZE), mode="bicubic", align_corners=False)
    return large[:, 0].clamp(0, 1), torch.from_numpy(data.target)


def draw_clips(generator: torch.Generator) -> Iterator[Clip]:
    """Draw clips with random digits, directions, places and captions, without end."""
    images, labels = digits()
    while True:
        index = _pick(len(images), generator)
        digit, direction = int(labels[index]), list(DIRECTIONS)[_pick(len(DIRECTIONS), generator)]
        caption = _CAPTIONS[_pick(len(_CAPTIONS), generator)]
        yield Clip(
            video=draw_video(images[index], direction, generator),
            digit=digit,
            direction=direction,
            caption=caption.format(digit=digit, name=_NAMES[digit], direction=direction),
        )


def draw_video(image: Tensor, direction: str, generator: torch.Generator) -> Tensor:
    """Move `image` [DIGIT_SIZE, DIGIT_SIZE] through a black picture; [3, FRAMES, SIZE, SIZE] in [-1, 1].

    It crosses the picture from side to side, at a random height or column.
    """
    rows, columns = DIRECTIONS[direction]
    room = SIZE - DIGIT_SIZE
    travel = SPEED * (FRAMES - 1)
    early, across = _pick(room - travel + 1, generator), _pick(room + 1, generator)
    video = torch.zeros(FRAMES, SIZE, SIZE)
    for frame in range(FRAMES):
        along = early + SPEED * frame
        along = along if rows + columns > 0 else room - along
        row, column = (along, across) if rows else (across, along)
        video[frame, row : row + DIGIT_SIZE, column : column + DIGIT_SIZE] = image
    return (video * 2 - 1).expand(3, -1, -1, -1)


def captions() -> list[str]:
    """Every caption there is."""
    return [
        caption.format(digit=digit, name=_NAMES[digit], direction=direction)
        for caption in dict.fromkeys(_CAPTIONS)
        for digit in range(10)
        for direction in DIRECTIONS
    ]


def _pick(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
