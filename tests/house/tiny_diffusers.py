"""Tiny models of diffusers: what their configuration, their names and their shapes are.

mm-convert does not depend on diffusers, so its tests read what is recorded here:
``python tests/house/tiny_diffusers.py`` writes it anew, and a test compares it with the installed diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

RECORDED = Path(__file__).resolve().parents[2] / "packages/mm-convert/tests/recorded"

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "text_embed_dim": 6,
    "pooled_projection_dim": 5,
    "rope_axes_dim": (2, 2, 0),
}
COGVIDEOX = {
    "num_attention_heads": 4,
    "attention_head_dim": 4,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 6,
    "text_embed_dim": 5,
    "num_layers": 5,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 3,
}
ROTARY = {"use_rotary_positional_embeddings": True}
LEARNED = {**ROTARY, "in_channels": 8, "use_learned_positional_embeddings": True}

MODELS: Mapping[str, Callable[[], Any]] = {
    "hunyuan_video": lambda: diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN, guidance_embeds=True),
    "hunyuan_video_i2v": lambda: diffusers.HunyuanVideoTransformer3DModel(
        **HUNYUAN | {"in_channels": 9}, guidance_embeds=False, image_condition_type="latent_concat"
    ),
    # 2B: positions are sines that are not saved; 5B: rotary; 5B image to video: rotary and learned.
    "cogvideox_2b": lambda: diffusers.CogVideoXTransformer3DModel(**COGVIDEOX),
    "cogvideox": lambda: diffusers.CogVideoXTransformer3DModel(**COGVIDEOX, **ROTARY),
    "cogvideox_i2v": lambda: diffusers.CogVideoXTransformer3DModel(**COGVIDEOX | LEARNED),
    "cogvideox_1_5": lambda: diffusers.CogVideoXTransformer3DModel(
        **COGVIDEOX, **ROTARY, patch_size_t=2, patch_bias=False
    ),
    "cogvideox_1_5_i2v": lambda: diffusers.CogVideoXTransformer3DModel(
        **COGVIDEOX | {"in_channels": 8}, **ROTARY, patch_size_t=2, patch_bias=False, ofs_embed_dim=6
    ),
}


def record(model: str) -> dict[str, Any]:
    """A model's ``config.json`` and the shapes of its tensors, which diffusers saves as they are in memory."""
    with torch.device("cpu"):
        made = MODELS[model]()
    config = {k: v for k, v in json.loads(made.to_json_string()).items() if k not in ("_diffusers_version",)}
    saved = {name: list(tensor.shape) for name, tensor in sorted(made.state_dict().items())}
    return {"library": "diffusers", "config": config, "saved": saved}


def main() -> None:
    """Write every record."""
    RECORDED.mkdir(exist_ok=True)
    for model in MODELS:
        text = json.dumps(record(model), indent=None, sort_keys=True).replace("], ", "],\n")
        (RECORDED / f"{model}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
