"""What the diffusers layout says about a model beside its tensors, and the ``config.json`` of the original layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wan_infer.checkpoints.metadata import ClipConfig, TextEncoderConfig
from wan_infer.checkpoints.names import Layout
from wan_infer.clip import MEAN, STD
from wan_infer.config import TransformerConfig, VaeConfig

# The oldest release that reads all of this; nothing depends on it.
_DIFFUSERS = "0.34.0"
_PIPELINES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "t2v": ("WanPipeline", "WanTransformer3DModel"),
        "i2v": ("WanImageToVideoPipeline", "WanTransformer3DModel"),
        "flf2v": ("WanImageToVideoPipeline", "WanTransformer3DModel"),
        "vace": ("WanVACEPipeline", "WanVACETransformer3DModel"),
    }
)
# As published; other sizes than 480p want another flow_shift, which a pipeline sets.
SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": _DIFFUSERS,
        "final_sigmas_type": "zero",
        "flow_shift": 3.0,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "timestep_spacing": "linspace",
        "use_flow_sigmas": True,
    }
)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, sorted, as transformers and diffusers do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(value), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_index(config: TransformerConfig, clip: ClipConfig | None, tokenizer_class: str) -> dict[str, Any]:
    """Return ``model_index.json``: the pipeline and the class of each part."""
    pipeline, transformer = _PIPELINES[config.model_type]
    index = {
        "_class_name": pipeline,
        "_diffusers_version": _DIFFUSERS,
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_class],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if clip is not None:
        index["image_encoder"] = ["transformers", _clip_class(clip)]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    return index


def transformer_json(config: TransformerConfig, layout: Layout) -> dict[str, Any]:
    """Return the ``config.json`` of a transformer."""
    return _original_json(config) if layout == "original" else _diffusers_json(config)


def _original_json(config: TransformerConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "_class_name": "VaceWanModel" if config.vace_layers else "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_dim,
        "model_type": config.model_type,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_dim,
        "text_len": config.text_len,
    }
    if config.vace_layers:
        values |= {"vace_layers": list(config.vace_layers), "vace_in_dim": config.vace_in_dim}
    return values


def _diffusers_json(config: TransformerConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "_class_name": _PIPELINES[config.model_type][1],
        "_diffusers_version": _DIFFUSERS,
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_dim,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": config.image_tokens,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
    if config.vace_layers:
        values |= {"vace_layers": list(config.vace_layers), "vace_in_channels": config.vace_in_dim}
    if config.text_len != TransformerConfig.text_len:
        values["text_len"] = config.text_len  # diffusers has no such key, and would ignore it
    return values


def vae_json(config: VaeConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a VAE."""
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": _DIFFUSERS,
        "attn_scales": [],
        "base_dim": config.base_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def text_encoder_json(config: TextEncoderConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a UMT5 encoder."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": config.ffn_dim,
        "d_kv": config.attention_dim // config.num_heads,
        "d_model": config.dim,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "umt5",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
    }


def clip_json(config: ClipConfig) -> dict[str, Any]:
    """Return the ``config.json`` of an image tower."""
    return {
        "architectures": [_clip_class(config)],
        "hidden_act": config.activation,
        "hidden_size": config.dim,
        "image_size": config.image_size,
        "intermediate_size": config.ffn_dim,
        "layer_norm_eps": config.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
        "patch_size": config.patch_size,
        "projection_dim": config.projection_dim or config.dim,
    }


def image_processor_json(config: ClipConfig) -> dict[str, Any]:
    """Return the ``preprocessor_config.json`` that belongs to an image tower."""
    return {
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": config.image_size},
    }


def _clip_class(config: ClipConfig) -> str:
    return "CLIPVisionModel" if config.projection_dim is None else "CLIPVisionModelWithProjection"
