"""PEFT adapters of the tiny Qwen2.5-VL, made tensor by tensor from PEFT's documented names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import LLM_LAYERS, VIT_LAYERS, Tensors, config, tensors
from torch import Tensor

RANK = 2
LANGUAGE = [
    *(f"model.layers.{i}.self_attn.{p}_proj" for i in range(LLM_LAYERS) for p in "qkvo"),
    *(f"model.layers.{i}.mlp.{p}_proj" for i in range(LLM_LAYERS) for p in ("gate", "up", "down")),
]
VISION = [
    *(f"visual.blocks.{i}.attn.{p}" for i in range(VIT_LAYERS) for p in ("qkv", "proj")),
    *(f"visual.blocks.{i}.mlp.{p}_proj" for i in range(VIT_LAYERS) for p in ("gate", "up", "down")),
]
PLAIN = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "bias": "none", "target_modules": ["q_proj"]}


def new_name(module: str) -> str:
    """A module's name in the memory of transformers >= 4.52."""
    if module.startswith("visual."):
        return "model." + module
    return "model.language_model." + module.removeprefix("model.") if module.startswith("model.") else module


def adapter(modules: list[str], *, seed: int = 1) -> Tensors:
    """Small whole numbers over 8: their products and sums are exact in every float."""
    generator = torch.Generator().manual_seed(seed)
    base = tensors()

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 8

    made = {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        made[f"{module}.lora_A.weight"] = numbers(RANK, columns)
        made[f"{module}.lora_B.weight"] = numbers(rows, RANK)
    return made


def save_adapter(
    folder: Path,
    made: Tensors,
    *,
    prefix: str = "base_model.model.",
    rename: Callable[[str], str] = str,
    with_base: bool = True,
    **changes: Any,
) -> Path:
    """Write PEFT's folder; with the base model's ``config.json`` in it, as published."""
    folder.mkdir(parents=True)
    save_file({prefix + rename(name): t for name, t in made.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **changes}))
    if with_base:
        (folder / "config.json").write_text(json.dumps(config(tied=False, nested=False)))
    return folder


def saved(folder: Path) -> Tensors:
    """An adapter's tensors."""
    found: Tensors = load_file(folder / "adapter_model.safetensors")
    return found


def whole_change(made: Mapping[str, Tensor], module: str) -> Tensor:
    """B @ A."""
    return made[f"{module}.lora_B.weight"] @ made[f"{module}.lora_A.weight"]
