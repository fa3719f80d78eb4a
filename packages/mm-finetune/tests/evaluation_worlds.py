"""A model that says something else about everything, and questions to ask it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mm_datafmt import Message, Sample


def lively_model(mini: Path, folder: Path) -> Path:
    """The mini model with weights so large that every picture and position changes what it says."""
    shutil.copytree(mini / "hf", folder)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.dim() > 1:
            scale = 0.02 if "patch_embed" in name else 1.5 * tensor[0].numel() ** -0.5
            weights[name] = torch.randn(tensor.shape, generator=generator) * scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pictures(mini: Path) -> list[str]:
    folder = mini / "data/images"
    return [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*.png"))]


def samples(mini: Path) -> list[Sample]:
    """Prompts of different lengths: digits, crops, two pictures, none, an earlier turn."""
    names = pictures(mini)
    digits, crops = names[:60], names[60:]

    def sample(*contents: str, images: tuple[str, ...] = ()) -> Sample:
        turns = zip(["user", "assistant"] * len(contents), contents, strict=False)
        return Sample(messages=tuple(Message(role=role, content=text) for role, text in turns), images=images)

    return [
        sample("<image>\nWhich digit is this?", "7", images=(digits[0],)),
        sample("No picture here, but a longer question about the weather in autumn?", "wet"),
        sample("<image>\nWhich photograph is this a part of?", "moon", images=(crops[0],)),
        sample("First <image>, then <image>\nWhich?", "both", images=(crops[5], digits[1])),
        sample("<image>\nHm?", "Yes.", "And <image>?", "No.", images=(digits[2], crops[100])),
        sample("<image>\nWhich digit is this?", "3", images=(digits[3],)),
    ]


def write_records(path: Path, entries: Sequence[Sample], answers: Sequence[str] | None = None) -> Path:
    """Records with other answers, or with their own."""
    values = []
    for number, sample in enumerate(entries):
        turns = [{"role": message.role, "content": message.content} for message in sample.messages]
        turns[-1]["content"] = turns[-1]["content"] if answers is None else answers[number]
        values.append({"messages": turns, "images": list(sample.images)})
    path.write_text(json.dumps(values))
    return path
