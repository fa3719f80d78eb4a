"""The shapes of Wan2.1's transformers and VAE: what a checkpoint's ``config.json`` says, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

ModelType = Literal["t2v", "i2v", "flf2v", "vace"]

# Per channel of the 16 latent channels, as published with the Wan2.1 VAE.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of one transformer.

    Attributes:
        model_type: what it is conditioned on besides text.
        dim, ffn_dim, num_heads, num_layers: width, inner width of the feed-forward, attention heads, blocks.
        in_dim: channels of the latents and the condition together; i2v and flf2v take 16 + 4 + 16 = 36.
        out_dim: channels of the velocity.
        text_dim: width of the text encoder's output.
        text_len: rows to which the text is zero-padded; the padding is attended, it is part of the model.
        freq_dim: width of the sinusoid of the timestep.
        patch_size: (frames, rows, columns) of latents in one token.
        image_dim: width of the CLIP tokens, or None without an image branch.
        image_tokens: CLIP tokens with a learned position (flf2v: two images of 257), or None without positions.
        vace_layers: blocks after which a hint of the VACE branch is added.
        vace_in_dim: channels of the VACE context.
        eps: of every norm.
    """

    model_type: ModelType = "t2v"
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    image_dim: int | None = None
    image_tokens: int | None = None
    vace_layers: tuple[int, ...] = ()
    vace_in_dim: int = 96
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The shape of the causal video VAE.

    Attributes:
        base_dim: channels at full resolution.
        z_dim: latent channels.
        dim_mult: channels of each level as multiples of `base_dim`; each step between levels halves rows and columns.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        temporal_downsample: whether a step between levels halves the frames as well.
        latents_mean, latents_std: per latent channel; latents are normalised with them.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent row or column stands for."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        """Frames a latent frame stands for, the first one excepted."""
        return int(2 ** sum(self.temporal_downsample))


_SMALL = TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_LARGE = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

# The published transformers, by the name of the task that they are for.
TRANSFORMERS = MappingProxyType(
    {
        "t2v-1.3B": _SMALL,
        "t2v-14B": _LARGE,
        "t2i-14B": _LARGE,
        "i2v-14B": replace(_LARGE, model_type="i2v", in_dim=36, image_dim=1280),
        "flf2v-14B": replace(_LARGE, model_type="flf2v", in_dim=36, image_dim=1280, image_tokens=514),
        "vace-1.3B": replace(_SMALL, model_type="vace", vace_layers=tuple(range(0, 30, 2))),
        "vace-14B": replace(_LARGE, model_type="vace", vace_layers=tuple(range(0, 40, 5))),
        # wan-mini, which this package carries.
        "t2v-mini": TransformerConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=6, text_dim=64, text_len=64),
    }
)
