"""Small data sets with pictures, for the tests of the data side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mm_finetune.config import DataConfig
from mm_finetune.data import Dataset

SIZES = [(56, 56), (120, 80), (30, 200), (300, 300)]


def picture(path: Path, size: tuple[int, int], seed: int = 0) -> str:
    """Write a picture of noise; returns its name."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.name


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def record(folder: Path, number: int) -> dict[str, Any]:
    """Text alone, or one to three pictures and one or two answers."""
    count = number % 4
    names = [picture(folder / f"{number}-{n}.png", SIZES[(number + n) % 4], seed=number) for n in range(count)]
    messages = turns("<image>" * count + f"\nWhat is number {number}?", f"It is {number}." + " Yes." * (number % 5))
    if number % 3 == 0:
        messages += turns("And then?", f"Then comes {number + 1}.")
    return {"messages": messages, "images": names, "videos": []}


def write(folder: Path, records: list[dict[str, Any]]) -> DataConfig:
    """The data set, and a configuration that keeps its cache beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(records))
    return DataConfig(path=folder / "train.json", cache_dir=folder / "cache", seq_length=512)


def world(folder: Path, count: int = 12) -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, [record(folder, number) for number in range(count)])


def dataset(config: DataConfig, mini: Path) -> Dataset:
    return Dataset(config, mini / "hf")
