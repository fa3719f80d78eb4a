"""Wan2.1 video generation on plain PyTorch: a prompt, an image or a video in, a video out, on NPU, CUDA and CPU.

A video in three lines, with the small model that this package carries, or with any Wan2.1 checkpoint::

    from wan_infer import WanPipeline, wan_mini

    pipe = WanPipeline.from_pretrained(wan_mini())
    pipe("the digit 3 moves left", seed=1).save("three.mp4")

Or as a stream, while it is decoded::

    for frames in pipe.generate("the digit 3 moves left", seed=1):  # [1, 3, 1 or 4, 64, 64] in [-1, 1]
        show(frames)

Or each part by itself, from either layout of a checkpoint::

    transformer = load_transformer("Wan2.1-T2V-1.3B", device="npu", dtype=torch.bfloat16)
    velocity = transformer(latents, timestep, text)        # [B, 16, T, H, W]
    video = load_vae("Wan2.1-T2V-1.3B").decode(latents)    # [B, 3, 4 (T - 1) + 1, 8 H, 8 W]

    sampler = make_sampler("unipc", steps=50, shift=5.0)
    for timestep in sampler.timesteps:
        latents = sampler.step(predict(latents, timestep), latents)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan_infer.checkpoints.loading import (
        load_clip,
        load_prompt_encoder,
        load_text_encoder,
        load_transformer,
        load_vae,
    )
    from wan_infer.config import TRANSFORMERS, TransformerConfig, VaeConfig
    from wan_infer.denoise import Step
    from wan_infer.errors import (
        CheckpointError,
        MediaError,
        NumericsError,
        OutputError,
        ProcessError,
        RequestError,
        WanError,
    )
    from wan_infer.generation import Generation, Settings
    from wan_infer.mini import wan_mini
    from wan_infer.parallel import Parallel
    from wan_infer.pipeline import WanPipeline
    from wan_infer.rope import rope_table
    from wan_infer.samplers import Sampler, draw_noise, guide, make_sampler
    from wan_infer.transformer import TextContext, WanTransformer
    from wan_infer.vae import WanVae
    from wan_infer.vae_tiling import Tiling, decode_tiled
    from wan_infer.video import VideoWriter, contact_sheet, read_frames

# Where each public name lives; torch is imported when the first of them is used.
_HOMES = {
    "WanPipeline": "pipeline",
    "Generation": "generation",
    "Settings": "generation",
    "Step": "denoise",
    "Parallel": "parallel",
    "wan_mini": "mini",
    "load_transformer": "checkpoints.loading",
    "load_vae": "checkpoints.loading",
    "load_text_encoder": "checkpoints.loading",
    "load_prompt_encoder": "checkpoints.loading",
    "load_clip": "checkpoints.loading",
    "WanTransformer": "transformer",
    "TextContext": "transformer",
    "WanVae": "vae",
    "TransformerConfig": "config",
    "VaeConfig": "config",
    "decode_tiled": "vae_tiling",
    "Tiling": "vae_tiling",
    "TRANSFORMERS": "config",
    "make_sampler": "samplers",
    "Sampler": "samplers",
    "draw_noise": "samplers",
    "guide": "samplers",
    "rope_table": "rope",
    "VideoWriter": "video",
    "read_frames": "video",
    "contact_sheet": "video",
    "WanError": "errors",
    "CheckpointError": "errors",
    "RequestError": "errors",
    "MediaError": "errors",
    "OutputError": "errors",
    "NumericsError": "errors",
    "ProcessError": "errors",
}

__all__ = [
    "WanPipeline",
    "Generation",
    "Settings",
    "Step",
    "Parallel",
    "wan_mini",
    "load_transformer",
    "load_vae",
    "load_text_encoder",
    "load_prompt_encoder",
    "load_clip",
    "WanTransformer",
    "TextContext",
    "WanVae",
    "TransformerConfig",
    "VaeConfig",
    "decode_tiled",
    "Tiling",
    "TRANSFORMERS",
    "make_sampler",
    "Sampler",
    "draw_noise",
    "guide",
    "rope_table",
    "VideoWriter",
    "read_frames",
    "contact_sheet",
    "WanError",
    "CheckpointError",
    "RequestError",
    "MediaError",
    "OutputError",
    "NumericsError",
    "ProcessError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
