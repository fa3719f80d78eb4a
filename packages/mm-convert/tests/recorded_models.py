"""Tiny models under the names and shapes of their own library, which are recorded beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import Tensors


@dataclass(frozen=True)
class Recorded:
    """A recorded model: ``config.json``, and shapes by name as saved and as held in memory."""

    config: dict[str, Any]
    saved: dict[str, list[int]]
    in_memory: dict[str, list[int]]

    @classmethod
    def named(cls, model: str) -> Recorded:
        text = (Path(__file__).parent / "recorded" / f"{model}.json").read_text(encoding="utf-8")
        content = json.loads(text)
        return cls(content["config"], content["saved"], content["in_memory"])

    def tied(self) -> Recorded:
        """The same model with a tied output layer, of which no file holds a copy."""
        saved, in_memory = (
            {n: s for n, s in shapes.items() if n != "lm_head.weight"} for shapes in (self.saved, self.in_memory)
        )
        return Recorded(self.config | {"tie_word_embeddings": True}, saved, in_memory)

    def flat(self) -> Recorded:
        """The same model with the ``config.json`` of older releases: no ``text_config``."""
        config = {**self.config["text_config"], **{k: v for k, v in self.config.items() if k != "text_config"}}
        return Recorded(config, self.saved, self.in_memory)

    def write(self, directory: Path, *, in_memory: bool = False) -> Path:
        """Make a checkpoint folder of two shards, with random tensors."""
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(self.config))
        made = random_tensors(self.in_memory if in_memory else self.saved)
        weight_map = {name: f"model-{k % 2 + 1:05d}-of-00002.safetensors" for k, name in enumerate(made)}
        for file in set(weight_map.values()):
            save_file({n: t for n, t in made.items() if weight_map[n] == file}, directory / file, {"format": "pt"})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory


def random_tensors(shapes: dict[str, list[int]]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def load_hf(directory: Path) -> Tensors:
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}
