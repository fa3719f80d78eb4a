"""Tiny parts with random weights, ours and diffusers' with the same tensors, and pipelines made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tiny_wan
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
)
from peer_transformer import peer_of
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from wan_infer import pipeline
from wan_infer.checkpoints.names import vae_names
from wan_infer.clip import ClipEncoder
from wan_infer.config import TransformerConfig
from wan_infer.transformer import WanTransformer
from wan_infer.vae import WanVae

CONFIGS: dict[str, TransformerConfig] = {
    **tiny_wan.TRANSFORMERS,
    "vace": replace(tiny_wan.TRANSFORMERS["vace"], vace_in_dim=96),
}
SIZE, FRAMES, SHIFT = (48, 32), 9, 5.0


def transformer(kind: str | TransformerConfig) -> WanTransformer:
    """A model whose every tensor matters, with outputs of a few units."""
    torch.manual_seed(0)
    model = WanTransformer(CONFIGS[kind] if isinstance(kind, str) else kind).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and "modulation" not in name
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if matrix else 0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


def vae() -> WanVae:
    torch.manual_seed(1)
    return WanVae(tiny_wan.VAE_CONFIG).eval().requires_grad_(False)


def clip() -> ClipEncoder:
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=160, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    return ClipEncoder(CLIPVisionModelWithProjection(config).eval().requires_grad_(False))


def ours(model_type: str, **parts: Any) -> pipeline.WanPipeline:
    given = {"transformer": transformer(model_type), "vae": vae()}
    if CONFIGS[model_type].image_dim:
        given["clip"] = clip()
    return pipeline.WanPipeline(config=CONFIGS[model_type], **given | parts)


def embeds(prompts: int = 1, rows: int = 7, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, rows, tiny_wan.TRANSFORMERS["t2v"].text_dim, generator=generator)


def padded(text: Tensor) -> Tensor:
    """The text as diffusers gets it from its encoder: completed with zeros."""
    return nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))


def theirs(own: pipeline.WanPipeline, *, tokens: Tensor | None = None) -> Any:
    """diffusers' pipeline with the tensors of ours.

    It takes the `tokens` of our image tower; `test_clip` compares the towers.
    """
    names = vae_names(4, tiny_wan.VAE_CONFIG.num_res_blocks)
    peer_vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1)
    peer_vae.load_state_dict({names.to_diffusers(name)[0]: value for name, value in own.vae.state_dict().items()})
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": peer_vae.eval(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SHIFT
        ),
        "transformer": peer_of(own.transformer),
    }
    kinds = {
        "t2v": WanPipeline,
        "i2v": WanImageToVideoPipeline,
        "flf2v": WanImageToVideoPipeline,
        "vace": WanVACEPipeline,
    }
    peer: Any = kinds[own.config.model_type](**parts)
    if tokens is not None:
        peer.encode_image = lambda image, device: tokens
    peer.set_progress_bar_config(disable=True)
    return peer
