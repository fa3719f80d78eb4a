"""The configuration of each part, read from what a layout stores; `wan_infer.checkpoints.manifest` writes it.

The original layout has one ``config.json``, that of the transformer, and it is incomplete; the rest follows from the
shapes of the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from wan_infer.checkpoints.layout import Part
from wan_infer.checkpoints.names import Layout
from wan_infer.config import ModelType, TransformerConfig, VaeConfig
from wan_infer.errors import CheckpointError

CLIP_HEAD_DIM = 80  # of ViT-H/14; the original file does not tell
_MOST = 1 << 20  # no width, length or count of a real model is larger
_MOST_LAYERS = 1000


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The shape of a UMT5 encoder; `attention_dim` is that of all heads together."""

    vocab_size: int
    dim: int
    attention_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The shape of a CLIP image tower; `projection_dim` is None where the projection is not stored."""

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    projection_dim: int | None
    activation: str = "gelu"
    eps: float = 1e-5


@dataclass(frozen=True)
class Stored:
    """What is known of a part before its values are read.

    Attributes:
        place: for messages.
        layout: whose names the tensors have.
        config: the content of its ``config.json``, empty without one.
        meta: its tensors on the meta device.
    """

    place: Path
    layout: Layout
    config: Mapping[str, Any]
    meta: Mapping[str, Tensor]

    def size(self, name: str, dimension: int) -> int:
        """Return one size of a tensor from which the configuration is told.

        Raises:
            CheckpointError: it is missing or has fewer dimensions.
        """
        if name not in self.meta:
            raise CheckpointError(f"{self.place} has no tensor {name}; is it the right file?")
        shape = self.meta[name].shape
        if dimension >= len(shape) or not 0 < shape[dimension] <= 1 << 24:
            raise CheckpointError(f"{self.place}: {name} has the impossible shape {list(shape)}")
        return shape[dimension]

    def count(self, prefix: str) -> int:
        """Return how many layers there are, by the highest number after `prefix`."""
        pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
        return 1 + max((int(found[1]) for name in self.meta if (found := pattern.match(name))), default=-1)

    def integer(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        """Return a positive whole number of the configuration."""
        value = self.config.get(key, default)
        if type(value) is not int or not 0 < value <= most:
            raise self.fault(key, f"a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a positive number of the configuration."""
        value = self.config.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.fault(key, "a positive number")
        return float(value)

    def items(self, key: str, default: tuple[Any, ...], *kinds: type) -> tuple[Any, ...]:
        """Return a list of the configuration whose items are of certain types."""
        value = self.config.get(key, default)
        if not isinstance(value, list | tuple) or any(type(item) not in kinds for item in value):
            raise self.fault(key, f"a list of {' or '.join(kind.__name__ for kind in kinds)}")
        return tuple(value)

    def demand(self, **wanted: Any) -> None:
        """Refuse configuration values other than the wanted ones, which are those of Wan2.1; absent ones are fine."""
        for key, value in wanted.items():
            if self.config.get(key, value) != value:
                raise self.fault(key, f"{value!r} (all of Wan2.1 has it)")

    def fault(self, key: str, expected: str) -> CheckpointError:
        """Return the error about one key."""
        given = f"is {self.config[key]!r}" if key in self.config else "is missing"
        return CheckpointError(f"{self.place}/config.json: {key} {given}; expected is {expected}")


def transformer_config(stored: Stored) -> TransformerConfig:
    """Read the shape of a transformer.

    Raises:
        CheckpointError: the configuration is incomplete, contradicts itself, or is of another model.
    """
    config = _original_transformer(stored) if stored.layout == "original" else _diffusers_transformer(stored)
    if config.dim % config.num_heads or config.head_dim % 2:
        raise CheckpointError(
            f"{stored.place}: {config.dim} channels do not divide into {config.num_heads} heads of an even width"
        )
    layers = config.vace_layers
    if sorted(set(layers)) != list(layers) or any(not 0 <= layer < config.num_layers for layer in layers):
        raise stored.fault("vace_layers", f"rising numbers of blocks, from 0 to {config.num_layers - 1}")
    if (config.model_type == "vace") != bool(layers):
        raise stored.fault("vace_layers", "a list for vace models, and none for others")
    return config


def _original_transformer(stored: Stored) -> TransformerConfig:
    model_type = _model_type(stored)
    num_layers = stored.integer("num_layers", most=_MOST_LAYERS)
    vace = model_type == "vace"
    image = model_type in ("i2v", "flf2v")
    stored.demand(qk_norm=True, cross_attn_norm=True, window_size=[-1, -1])
    return TransformerConfig(
        model_type=model_type,
        dim=stored.integer("dim"),
        ffn_dim=stored.integer("ffn_dim"),
        num_heads=stored.integer("num_heads"),
        num_layers=num_layers,
        in_dim=stored.integer("in_dim", 16),
        out_dim=stored.integer("out_dim", 16),
        text_dim=stored.size("text_embedding.0.weight", 1),
        text_len=stored.integer("text_len", 512),
        freq_dim=stored.integer("freq_dim", 256),
        patch_size=_patch_size(stored, [stored.size("patch_embedding.weight", n) for n in (2, 3, 4)]),
        image_dim=stored.size("img_emb.proj.0.weight", 0) if image else None,
        image_tokens=stored.size("img_emb.emb_pos", 1) if model_type == "flf2v" else None,
        vace_layers=stored.items("vace_layers", tuple(range(0, num_layers, 2)), int) if vace else (),
        vace_in_dim=stored.integer("vace_in_dim", 96),
        eps=stored.number("eps", 1e-6),
    )


def _model_type(stored: Stored) -> ModelType:
    known: tuple[ModelType, ...] = ("t2v", "i2v", "flf2v", "vace")
    for model_type in known:
        if stored.config.get("model_type", "t2v") == model_type:
            return model_type
    raise stored.fault("model_type", f"one of {', '.join(known)}")


def _diffusers_transformer(stored: Stored) -> TransformerConfig:
    stored.demand(cross_attn_norm=True, qk_norm="rms_norm_across_heads")
    heads = stored.integer("num_attention_heads")
    image_dim, tokens = (
        stored.integer(key) if stored.config.get(key) is not None else None
        for key in ("image_dim", "pos_embed_seq_len")
    )
    vace_layers = stored.items("vace_layers", (), int)
    model_type: ModelType = "t2v"
    if vace_layers:
        model_type = "vace"
    elif image_dim is not None:
        model_type = "i2v" if tokens is None else "flf2v"
    return TransformerConfig(
        model_type=model_type,
        dim=heads * stored.integer("attention_head_dim"),
        ffn_dim=stored.integer("ffn_dim"),
        num_heads=heads,
        num_layers=stored.integer("num_layers", most=_MOST_LAYERS),
        in_dim=stored.integer("in_channels", 16),
        out_dim=stored.integer("out_channels", 16),
        text_dim=stored.integer("text_dim", 4096),
        text_len=stored.integer("text_len", 512),
        freq_dim=stored.integer("freq_dim", 256),
        patch_size=_patch_size(stored, stored.items("patch_size", (1, 2, 2), int)),
        image_dim=image_dim,
        image_tokens=tokens if model_type == "flf2v" else None,
        vace_layers=vace_layers,
        vace_in_dim=stored.integer("vace_in_channels", 96),
        eps=stored.number("eps", 1e-6),
    )


def _patch_size(stored: Stored, values: Sequence[int]) -> tuple[int, int, int]:
    if len(values) != 3 or min(values) < 1:
        raise stored.fault("patch_size", "three positive whole numbers")
    frames, rows, columns = values
    return frames, rows, columns


def vae_config(stored: Stored) -> VaeConfig:
    """Read the shape of a VAE, in the original layout from its tensors.

    Raises:
        CheckpointError: the configuration is of another model, or the file is.
    """
    if stored.layout == "original":
        return _original_vae(stored)
    stored.demand(is_residual=False, patch_size=None, attn_scales=[], in_channels=3, out_channels=3)
    default, base_dim = VaeConfig(), stored.integer("base_dim", 96)
    if stored.config.get("decoder_base_dim") not in (None, base_dim):
        raise stored.fault("decoder_base_dim", f"null or {base_dim}")
    config = VaeConfig(
        base_dim=base_dim,
        z_dim=stored.integer("z_dim", 16),
        dim_mult=stored.items("dim_mult", default.dim_mult, int),
        num_res_blocks=stored.integer("num_res_blocks", 2, _MOST_LAYERS),
        temporal_downsample=stored.items("temperal_downsample", default.temporal_downsample, bool),  # spelled so
        latents_mean=stored.items("latents_mean", default.latents_mean, float, int),
        latents_std=stored.items("latents_std", default.latents_std, float, int),
    )
    if not config.dim_mult or len(config.dim_mult) > 16 or min(config.dim_mult) < 1:
        raise stored.fault("dim_mult", "up to 16 positive whole numbers")
    return config


def _original_vae(stored: Stored) -> VaeConfig:
    base_dim = stored.size("encoder.conv1.weight", 0)
    z_dim = stored.size("conv2.weight", 0)
    if z_dim != VaeConfig().z_dim:
        raise CheckpointError(
            f"{stored.place} has {z_dim} latent channels; an original file does not hold their mean and deviation, "
            f"which are known for the published {VaeConfig().z_dim} only. Use the diffusers layout"
        )
    widths, temporal, blocks = [base_dim], [], 0
    for layer in range(stored.count("encoder.downsamples.")):
        prefix = f"encoder.downsamples.{layer}"
        if f"{prefix}.resample.1.weight" in stored.meta:
            temporal.append(f"{prefix}.time_conv.weight" in stored.meta)
            widths.append(widths[-1])
        else:
            widths[-1] = stored.size(f"{prefix}.residual.2.weight", 0)
            blocks += not temporal
    return VaeConfig(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=tuple(width // base_dim for width in widths),
        num_res_blocks=max(blocks, 1),
        temporal_downsample=tuple(temporal),
    )


def text_encoder_config(stored: Stored) -> TextEncoderConfig:
    """Read the shape of a UMT5 encoder, in the original layout from its tensors.

    Raises:
        CheckpointError: the configuration or the file is of another model.
    """
    if stored.layout == "original":
        return TextEncoderConfig(
            vocab_size=stored.size("token_embedding.weight", 0),
            dim=stored.size("token_embedding.weight", 1),
            attention_dim=stored.size("blocks.0.attn.q.weight", 0),
            ffn_dim=stored.size("blocks.0.ffn.fc1.weight", 0),
            num_layers=stored.count("blocks."),
            num_heads=stored.size("blocks.0.pos_embedding.embedding.weight", 1),
            num_buckets=stored.size("blocks.0.pos_embedding.embedding.weight", 0),
        )
    stored.demand(model_type="umt5", feed_forward_proj="gated-gelu")
    return TextEncoderConfig(
        vocab_size=stored.integer("vocab_size"),
        dim=stored.integer("d_model"),
        attention_dim=stored.integer("num_heads") * stored.integer("d_kv"),
        ffn_dim=stored.integer("d_ff"),
        num_layers=stored.integer("num_layers", most=_MOST_LAYERS),
        num_heads=stored.integer("num_heads"),
        num_buckets=stored.integer("relative_attention_num_buckets", 32),
        max_distance=stored.integer("relative_attention_max_distance", 128),
        eps=stored.number("layer_norm_epsilon", 1e-6),
    )


def clip_config(stored: Stored) -> ClipConfig:
    """Read the shape of a CLIP image tower, in the original layout from its tensors.

    Raises:
        CheckpointError: the configuration or the file is of another model.
    """
    if stored.layout == "original":
        return _original_clip(stored)
    stored.demand(model_type="clip_vision_model", num_channels=3)
    projection = "visual_projection.weight"
    return ClipConfig(
        dim=stored.integer("hidden_size"),
        ffn_dim=stored.integer("intermediate_size"),
        num_layers=stored.integer("num_hidden_layers", most=_MOST_LAYERS),
        num_heads=stored.integer("num_attention_heads"),
        image_size=stored.integer("image_size"),
        patch_size=stored.integer("patch_size"),
        projection_dim=stored.size(projection, 0) if projection in stored.meta else None,
        activation=str(stored.config.get("hidden_act", "quick_gelu")),
        eps=stored.number("layer_norm_eps", 1e-5),
    )


def _original_clip(stored: Stored) -> ClipConfig:
    dim = stored.size("visual.patch_embedding.weight", 0)
    patch = stored.size("visual.patch_embedding.weight", 2)
    if dim % CLIP_HEAD_DIM:
        raise CheckpointError(
            f"{stored.place} has {dim} channels, no multiple of the {CLIP_HEAD_DIM} of a head of ViT-H/14; "
            "the file does not tell another width of a head. Use the diffusers layout"
        )
    return ClipConfig(
        dim=dim,
        ffn_dim=stored.size("visual.transformer.0.mlp.0.weight", 0),
        num_layers=stored.count("visual.transformer."),
        num_heads=dim // CLIP_HEAD_DIM,
        image_size=patch * math.isqrt(stored.size("visual.pos_embedding", 1) - 1),
        patch_size=patch,
        projection_dim=stored.size("visual.head", 1) if "visual.head" in stored.meta else None,
    )


# How the configuration of a part is read.
READERS: Mapping[Part, Callable[[Stored], Any]] = MappingProxyType(
    {
        "transformer": transformer_config,
        "vae": vae_config,
        "text_encoder": text_encoder_config,
        "clip": clip_config,
    }
)
