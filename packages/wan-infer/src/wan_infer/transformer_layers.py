"""The building blocks of the diffusion transformer.

Shape suffixes: B batch, S latent tokens, T text tokens, C channels (`dim`), N heads, D channels of a head. The residual
stream, norms and modulation are float32; linear layers compute in the dtype of their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from wan_infer.config import TransformerConfig
from wan_infer.ops import attention, gated, modulated_norm, next_norm, rms_norm, rotate

KeyValue = tuple[Tensor, Tensor]  # [B, T, N, D] each
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys and values [B, S, N, D] to the same shape


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and the last are modulated by the timestep."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = (nn.LayerNorm(dim, config.eps, elementwise_affine=False) for _ in range(2))
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x_BSC: Tensor,
        modulation_B6C: Tensor,
        rope: Tensor,
        keys_values: tuple[KeyValue, ...],
        key_bias: Tensor,
        attend: Attend = attention,
    ) -> Tensor:
        """Return the next state of the residual stream, float32 [B, S, C]; `attend` is the self-attention."""
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (self.modulation + modulation_B6C).unbind(1)
        dtype = self.cross_attn.q.weight.dtype
        normed = modulated_norm(self.norm1, x_BSC, scale_sa, shift_sa).to(dtype)
        update: Tensor = self.self_attn(normed, rope, attend)
        x_BSC, normed = next_norm(self.norm3, x_BSC, update, gate_BC=gate_sa)
        update = self.cross_attn(normed.to(dtype), keys_values, key_bias)
        x_BSC, normed = next_norm(self.norm2, x_BSC, update, modulation=(scale_ff, shift_ff))
        update = self.ffn(normed.to(dtype))
        return gated(x_BSC, update, gate_ff)


class VaceBlock(Block):
    """A block of the VACE branch: it takes in the main stream once, and hands out a hint each time."""

    def __init__(self, config: TransformerConfig, *, first: bool) -> None:
        super().__init__(config)
        if first:
            self.before_proj = nn.Linear(config.dim, config.dim)
        self.after_proj = nn.Linear(config.dim, config.dim)
        self.first = first

    def enter(self, branch_BSC: Tensor, x_BSC: Tensor) -> Tensor:
        """Return what this block works on: in the first block, the main stream is added to the branch."""
        if not self.first:
            return branch_BSC
        entered: Tensor = self.before_proj(branch_BSC.to(self.before_proj.weight.dtype)) + x_BSC
        return entered

    def leave(self, branch_BSC: Tensor) -> Tensor:
        """Return the hint for the main stream."""
        hint: Tensor = self.after_proj(branch_BSC.to(self.after_proj.weight.dtype))
        return hint


class Attention(nn.Module):
    """The projections, and the norms over all channels of queries and keys, that both kinds of attention have."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.num_heads = config.num_heads


class SelfAttention(Attention):
    """Attention of all latent tokens to each other, with rotary positions."""

    def forward(self, x_BSC: Tensor, rope: Tensor, attend: Attend = attention) -> Tensor:
        """Return the update of the residual stream, [B, S, C]; `attend` knows the tokens that are elsewhere."""
        q = split_heads(self.norm_q(self.q(x_BSC)), self.num_heads)
        k = split_heads(self.norm_k(self.k(x_BSC)), self.num_heads)
        q, k = rotate(q, k, rope)
        v = split_heads(self.v(x_BSC), self.num_heads)
        update: Tensor = self.o(attend(q, k, v).flatten(2))
        return update


class CrossAttention(Attention):
    """Attention of the latent tokens to the text and, in i2v and flf2v, to the CLIP tokens; the two are added."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.image_dim is not None:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def project(self, text_BTC: Tensor, image_BTC: Tensor | None = None) -> tuple[KeyValue, ...]:
        """Return keys and values of the text and, when given, of the CLIP tokens."""
        pairs = [(self.norm_k(self.k(text_BTC)), self.v(text_BTC))]
        if image_BTC is not None:
            pairs.append((self.norm_k_img(self.k_img(image_BTC)), self.v_img(image_BTC)))
        return tuple((split_heads(k, self.num_heads), split_heads(v, self.num_heads)) for k, v in pairs)

    def forward(self, x_BSC: Tensor, keys_values: tuple[KeyValue, ...], key_bias: Tensor) -> Tensor:
        """Return the update of the residual stream, [B, S, C]."""
        q = split_heads(self.norm_q(self.q(x_BSC)), self.num_heads)
        text, *image = keys_values
        attended = attention(q, *text, key_bias_T=key_bias)
        for k, v in image:
            attended = attended + attention(q, k, v)
        update: Tensor = self.o(attended.flatten(2))
        return update


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed tensor in the dtype of `x`."""
        return rms_norm(x, self.weight, self.eps)


class Head(nn.Module):
    """The last norm, modulated by the timestep, and the projection to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)

    def forward(self, x_BSC: Tensor, time_BC: Tensor) -> Tensor:
        """Return patches, float32 [B, S, frames·rows·columns of a patch·channels]."""
        shift, scale = (self.modulation + time_BC[:, None]).unbind(1)
        patches: Tensor = self.head(modulated_norm(self.norm, x_BSC, scale, shift))
        return patches


class ImageEmbedding(nn.Module):
    """CLIP tokens to the width of the model; flf2v gives the tokens of its two images learned positions."""

    emb_pos: nn.Parameter  # flf2v only

    def __init__(self, image_dim: int, dim: int, tokens: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )
        if tokens is not None:
            self.emb_pos = nn.Parameter(torch.zeros(1, tokens, image_dim))

    def forward(self, clip: Tensor) -> Tensor:
        """Return float32 [B, tokens, dim] for CLIP tokens [B, tokens, image_dim]."""
        first, inner, activation, outer, last = self.proj
        weight = next(inner.parameters())
        clip = clip.to(weight.device, torch.float32)
        if hasattr(self, "emb_pos"):
            clip = clip + self.emb_pos
        x = outer(activation(inner(first(clip).to(weight.dtype))))
        embedded: Tensor = last(x.float())
        return embedded


def split_heads(x_BSC: Tensor, heads: int) -> Tensor:
    """View [B, S, C] as [B, S, N, D]."""
    heads_last: Tensor = x_BSC.unflatten(2, (heads, -1))
    return heads_last
