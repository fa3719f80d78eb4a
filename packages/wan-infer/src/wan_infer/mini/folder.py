"""Writes the checkpoint folder of wan-mini."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan_infer.checkpoints.convert import convert
from wan_infer.checkpoints.layout import PLACES
from wan_infer.checkpoints.manifest import transformer_json
from wan_infer.checkpoints.names import UMT5, UMT5_ALIAS
from wan_infer.config import TRANSFORMERS
from wan_infer.vae import WanVae


def write_checkpoint(
    folder: Path,
    *,
    transformer: nn.Module,  # a WanTransformer of the shape of wan-mini
    vae: WanVae,
    text_encoder: nn.Module,  # a transformers UMT5EncoderModel
    tokenizer: Any,  # a transformers tokenizer
) -> None:
    """Write `folder` in the diffusers layout, all tensors in bfloat16, by way of the original layout."""
    with tempfile.TemporaryDirectory() as scratch:
        places = {part: Path(scratch) / place for part, place in PLACES["original"].items()}
        config = transformer_json(TRANSFORMERS["t2v-mini"], "original")
        (Path(scratch) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(_low(transformer.state_dict()), Path(scratch) / "diffusion_pytorch_model.safetensors")
        torch.save(_low(vae.state_dict()), places["vae"])
        states = {name: value for name, value in text_encoder.state_dict().items() if name != UMT5_ALIAS[0]}
        torch.save({UMT5.to_original(name): value for name, value in _low(states).items()}, places["text_encoder"])
        tokenizer.save_pretrained(places["tokenizer"])
        convert(scratch, folder, to="diffusers")


def _low(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().bfloat16().contiguous() for name, tensor in tensors.items()}
