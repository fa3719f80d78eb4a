"""The Wan2.1 diffusion transformer: latents, a timestep and text in, the velocity of the flow out.

It knows no process groups and reads like the paper (arXiv 2503.20314). Parameters carry the names of the
original checkpoints. Linear layers compute in the dtype of their weights (bfloat16 as a rule); the path of the
timestep, modulation, norms, rotary positions, the residual stream and the head stay in float32, as in the original.

Shape suffixes: B batch, S latent tokens, T text tokens, C channels (`dim`), N heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_infer.config import TransformerConfig
from wan_infer.errors import RequestError
from wan_infer.parallel import Alone, Whole
from wan_infer.rope import rope_table
from wan_infer.transformer_layers import Block, Head, ImageEmbedding, KeyValue, VaceBlock


@dataclass(frozen=True)
class TextContext:
    """What cross-attention needs of a prompt, computed once, because it does not change between steps.

    Attributes:
        blocks: keys and values for each block; the pair of the text, then that of the image where there is one.
        vace_blocks: the same for the blocks of the VACE branch.
        key_bias: [T], added to the scores of the text keys.
    """

    blocks: tuple[tuple[KeyValue, ...], ...]
    vace_blocks: tuple[tuple[KeyValue, ...], ...]
    key_bias: Tensor


class WanTransformer(nn.Module):
    """Predicts the velocity ``noise - data`` of the flow.

    Args:
        config: the shape; `wan_infer.config.TRANSFORMERS` has the published ones.
    """

    img_emb: ImageEmbedding  # i2v and flf2v only
    vace_patch_embedding: nn.Conv3d  # vace only, like the next
    vace_blocks: nn.ModuleList

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.image_tokens)
        if config.vace_layers:
            self.vace_patch_embedding = nn.Conv3d(config.vace_in_dim, dim, config.patch_size, config.patch_size)
            self.vace_blocks = nn.ModuleList(VaceBlock(config, first=n == 0) for n in range(len(config.vace_layers)))

    @staticmethod
    def keeps_float32(name: str) -> bool:
        """Whether the parameter `name` stays in float32 when the model is loaded in a lower precision."""
        is_norm = "norm" in name or name.startswith(("img_emb.proj.0.", "img_emb.proj.4."))
        return is_norm or "modulation" in name or name.startswith(("time_", "head."))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        *,
        text_lengths: Tensor | None = None,
        clip: Tensor | None = None,
        condition: Tensor | None = None,
        condition_scale: float = 1.0,
        parallel: Alone | None = None,
    ) -> Tensor:
        """Return the velocity, float32 [B, out_dim, T, H, W].

        Args:
            latents: [B, C, T, H, W], any size; odd rows and columns are completed with zeros and cut off again.
            timestep: [B], from 0 to 1000.
            text: embeddings [B, L, text_dim], or what `prepare_text` made of them.
            text_lengths: [B], rows of each prompt that are text; the others count as zeros. All rows without it.
            clip: CLIP tokens [B, tokens, image_dim] of i2v and flf2v, tokens being 257 an image.
            condition: i2v and flf2v: the other input channels, [B, in_dim - C, T, H, W]. vace: the context,
                [B, vace_in_dim, T, H, W].
            condition_scale: strength of the VACE context.
            parallel: who computes which tokens; all are computed here when None.

        Raises:
            RequestError: a shape does not fit, or an input that this model needs is missing.
        """
        self._check(latents, timestep, condition)
        if isinstance(text, Tensor):
            text = self.prepare_text(text, text_lengths=text_lengths, clip=clip)
        vace = condition if self.config.model_type == "vace" else None
        if condition is not None and vace is None:
            latents = torch.cat([latents, condition.to(latents.dtype)], dim=1)
        x_BSC, grid = self._embed(self.patch_embedding, latents)
        time_BC, modulation_B6C = self._embed_time(timestep, x_BSC.device)
        rope = rope_table(grid, self.config.head_dim, device=x_BSC.device)
        shards = (parallel or Alone()).shards(x_BSC.shape[1])
        x_BSC, rope = shards.split(x_BSC, 1), shards.split(rope, 0)
        hints = {} if vace is None else self._hints(vace, x_BSC, modulation_B6C, rope, text, shards)
        for index, block in enumerate(self.blocks):
            x_BSC = block(x_BSC, modulation_B6C, rope, text.blocks[index], text.key_bias, shards.attend)
            if index in hints:
                x_BSC = x_BSC + condition_scale * hints.pop(index)
        patches = shards.gather(self.head(x_BSC, time_BC), 1)
        return unpatchify(patches, grid, self.config.patch_size, latents.shape[2:])

    def prepare_text(
        self, text: Tensor, *, text_lengths: Tensor | None = None, clip: Tensor | None = None
    ) -> TextContext:
        """Embed a prompt and project it to the keys and values of every block; arguments as in `forward`.

        The original completes the text with zero rows up to `text_len` and attends them. They all give one and the
        same key and value, so one of them stands for all, with the logarithm of their number added to its score.

        Raises:
            RequestError: the text has another width or more rows than the model takes, or `clip` is missing.
        """
        self._check_text(text, clip)
        text_BTC, key_bias = self._embed_text(text, text_lengths)
        sources = [text_BTC]
        if clip is not None:
            sources.append(self.img_emb(clip).to(text_BTC.dtype))
        vace_blocks = self.vace_blocks if self.config.vace_layers else ()
        return TextContext(
            blocks=tuple(block.cross_attn.project(*sources) for block in _as_blocks(self.blocks)),
            vace_blocks=tuple(block.cross_attn.project(*sources) for block in _as_blocks(vace_blocks)),
            key_bias=key_bias,
        )

    def _embed_text(self, text: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        text = text.to(self.patch_embedding.weight)
        if lengths is not None:
            rows = torch.arange(text.shape[1], device=text.device)
            text = text * (rows < lengths.to(text.device)[:, None])[..., None]
        kept = min(self.config.text_len, -(text.shape[1] + 1) // 8 * -8)  # a multiple of 8: kernels like it
        text = F.pad(text, (0, 0, 0, kept - text.shape[1]))
        bias = torch.zeros(kept, device=text.device, dtype=text.dtype)
        bias[-1] = math.log(self.config.text_len - kept + 1)
        return self.text_embedding(text), bias

    def _embed(self, embedding: nn.Conv3d, latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        patches, grid = patchify(latents, self.config.patch_size)
        weight, bias = embedding.weight, embedding.bias
        return F.linear(patches.to(weight.dtype), weight.flatten(1), bias).float(), grid

    def _embed_time(self, timestep: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        sinusoid = timestep_sinusoid(timestep, self.config.freq_dim).to(device)
        time_BC = self.time_embedding(sinusoid)
        return time_BC, self.time_projection(time_BC).unflatten(1, (6, -1))

    def _hints(
        self, context: Tensor, x_BSC: Tensor, modulation_B6C: Tensor, rope: Tensor, text: TextContext, shards: Whole
    ) -> dict[int, Tensor]:
        """What the VACE branch adds after which block."""
        branch_BSC = shards.split(self._embed(self.vace_patch_embedding, context)[0], 1)
        hints = {}
        for layer, module, keys_values in zip(self.config.vace_layers, self.vace_blocks, text.vace_blocks, strict=True):
            block = cast(VaceBlock, module)
            branch_BSC = block.enter(branch_BSC, x_BSC)
            branch_BSC = block(branch_BSC, modulation_B6C, rope, keys_values, text.key_bias, shards.attend)
            hints[layer] = block.leave(branch_BSC)
        return hints

    def _check(self, latents: Tensor, timestep: Tensor, condition: Tensor | None) -> None:
        config = self.config
        if latents.ndim != 5:
            raise RequestError(f"latents have the shape {list(latents.shape)}; [B, C, T, H, W] is expected")
        if timestep.shape != latents.shape[:1]:
            raise RequestError(f"timestep has the shape {list(timestep.shape)}; [{latents.shape[0]}] is expected")
        vace = config.model_type == "vace"
        wanted = config.vace_in_dim if vace else config.in_dim - latents.shape[1]
        if vace and latents.shape[1] != config.in_dim:
            raise RequestError(f"latents have {latents.shape[1]} channels; this model takes {config.in_dim}")
        given = 0 if condition is None else condition.shape[1]
        if given != wanted:
            raise RequestError(
                f"latents of {latents.shape[1]} and a condition of {given} channels were given; this "
                f"{config.model_type} model takes {config.in_dim} input channels and a condition of {wanted}"
            )
        if condition is not None and (condition.shape[0], *condition.shape[2:]) != (
            latents.shape[0],
            *latents.shape[2:],
        ):
            raise RequestError(
                f"the condition has the shape {list(condition.shape)}; batch, frames, rows and columns of the latents "
                f"are {[latents.shape[0], *latents.shape[2:]]}"
            )

    def _check_text(self, text: Tensor, clip: Tensor | None) -> None:
        config = self.config
        if text.ndim != 3 or text.shape[2] != config.text_dim or text.shape[1] > config.text_len:
            raise RequestError(
                f"text has the shape {list(text.shape)}; [B, up to {config.text_len}, {config.text_dim}] is expected"
            )
        if (clip is None) != (config.image_dim is None):
            need = "no clip tokens" if config.image_dim is None else f"clip tokens [B, tokens, {config.image_dim}]"
            raise RequestError(f"this {config.model_type} model takes {need}")


def _as_blocks(modules: Iterable[nn.Module]) -> list[Block]:
    return cast("list[Block]", list(modules))


def timestep_sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Return float32 [B, width]: cosines, then sines, of timestep · 10000^(-2i/width).

    The angles are computed in float64 on the host: at a timestep of 999, float32 would move the output of the model by
    up to 3e-5, and not every accelerator has float64.
    """
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(timestep.to("cpu", torch.float64), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def patchify(latents: Tensor, patch: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut [B, C, T, H, W] into tokens [B, S, C·patch]; return them and the token grid.

    Frames, rows and columns that do not fill a patch are completed with zeros at the end.
    """
    missing = [-size % of for size, of in zip(latents.shape[2:], patch, strict=True)]
    if any(missing):
        latents = F.pad(latents, (0, missing[2], 0, missing[1], 0, missing[0]))
    t, h, w = (size // of for size, of in zip(latents.shape[2:], patch, strict=True))
    cut = latents.unflatten(4, (w, -1)).unflatten(3, (h, -1)).unflatten(2, (t, -1))  # [B, C, t, pt, h, ph, w, pw]
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3), (t, h, w)


def unpatchify(
    patches: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int], size: tuple[int, ...]
) -> Tensor:
    """Put tokens [B, S, patch·C] together to [B, C, T, H, W] of the given size (T, H, W)."""
    cut = patches.unflatten(1, grid).unflatten(4, (*patch, -1))  # [B, t, h, w, pt, ph, pw, C]
    whole: Tensor = cut.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
    return whole[:, :, : size[0], : size[1], : size[2]].contiguous()
