"""A LoRA adapter of PEFT put into the weights of a model: ``W + scale * B A`` (arXiv 2106.09685), no library needed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_finetune.errors import CheckpointError
from mm_finetune.selection import holders

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What would need another formula, with the value that needs none.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
}
# Names of models before transformers 4.52, and those of now.
_OLDER = ((r"^model\.layers\.", "model.language_model.layers."), (r"^visual\.", "model.visual."))


@torch.no_grad()
def merge_adapter(model: Any, folder: Path) -> None:
    """Add an adapter to a model's weights, computed in float32; layers that it trained in full take their places.

    Args:
        model: of transformers; changed in place.
        folder: what PEFT's ``save_pretrained`` writes.

    Raises:
        CheckpointError: no such folder, an adapter that is more than LoRA, or one of another model.
    """
    config, tensors = _read(folder)
    modules = dict(model.named_modules())
    halves: dict[str, dict[str, Tensor]] = {}
    wholes: dict[tuple[str, str], Tensor] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.(?:default\.)?weight", key)
        whole = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(weight|bias)", key)
        if found is not None:
            halves.setdefault(_present(found[1], modules), {})[found[2]] = tensor.float()
        elif whole is not None and _is_saved(config, whole[1]):
            wholes[_present(whole[1], modules), whole[2]] = tensor
        else:
            raise CheckpointError(f"{folder / WEIGHTS} holds {key}, which is no part of a LoRA adapter")
    _replace(model, modules, config, wholes, folder)
    for name, pair in halves.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or pair.keys() != {"lora_A", "lora_B"}:
            raise CheckpointError(f"the adapter in {folder} is of another model: {name} is not a layer of this one")
        a, b = pair["lora_A"], pair["lora_B"]
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise CheckpointError(
                f"the adapter in {folder} is of another model: {name} is {b.shape[0]} x {a.shape[1]} there,"
                f" {weight.shape[0]} x {weight.shape[1]} here"
            )
        weight.copy_(weight.float() + _scale(config, name, len(a)) * (b @ a).to(weight.device))


def _is_saved(config: dict[str, Any], layer: str) -> bool:
    """Whether the adapter trained a layer in full: PEFT compares ends of its name and of what holds it."""
    tied = ["lm_head"] if config.get("ensure_weight_tying") else []
    return any(
        place.endswith(end) for place in holders(layer) for end in [*(config.get("modules_to_save") or []), *tied]
    )


def _replace(
    model: Any, modules: dict[str, Any], config: dict[str, Any], wholes: dict[tuple[str, str], Tensor], folder: Path
) -> None:
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for (name, kind), tensor in wholes.items():
        weight = getattr(modules.get(name), kind, None)
        if weight is None or weight.shape != tensor.shape:
            raise CheckpointError(f"the adapter in {folder} is of another model: it holds all of {name}.{kind}")
        if weight is embedding and weight is output and not config.get("ensure_weight_tying"):
            raise CheckpointError(
                f"the adapter in {folder} trained the embedding apart from the output layer; in this model they are one"
                " weight, so it can't be merged"
            )
        weight.copy_(tensor)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no PEFT folder with {CONFIG} and {WEIGHTS}: {error}") from error
    odd = {key: config[key] for key, legal in PLAIN.items() if key in config and config[key] not in legal}
    if odd or not tensors:
        raise CheckpointError(f"the adapter in {folder} is not plain LoRA: {odd or 'it is empty'}; merge it with PEFT")
    return config, tensors


def _present(name: str, modules: dict[str, Any]) -> str:
    if name not in modules:
        for pattern, newer in _OLDER:
            name = re.sub(pattern, newer, name)
    return name


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    alpha = float(_of_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: dict[str, Any] | None, name: str, usual: Any) -> Any:
    """PEFT's rule: a pattern is the end of a name, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return usual
