"""Trains wan-mini: ``python -m wan_infer.mini.train FOLDER`` writes the checkpoint that this package carries.

First the VAE on clips of `wan_infer.mini.clips`; then, on latents of it, the transformer together with the text
encoder, by flow matching (arXiv 2210.02747). All weights end in bfloat16. Needs the extra ``train``.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_infer.config import LATENTS_MEAN, LATENTS_STD, TRANSFORMERS, VaeConfig
from wan_infer.mini.clips import captions, draw_clips
from wan_infer.mini.folder import write_checkpoint
from wan_infer.mini.words import make_tokenizer
from wan_infer.transformer import WanTransformer
from wan_infer.vae import WanVae

VAE = VaeConfig(base_dim=16, dim_mult=(1, 1, 2, 2), num_res_blocks=1)
TRANSFORMER = TRANSFORMERS["t2v-mini"]
TEXT = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
WITHOUT_CAPTION = 0.1  # share of samples that learn the unconditional flow, which guidance needs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast wan-mini learns.

    Attributes:
        vae_steps, vae_batch, vae_lr: of the VAE.
        clips: whose latents the transformer learns from.
        cycles: of the transformer, steps and highest learning rate; one starts from the average that the last gave.
        batch: clips in a step of the transformer.
        ema: decay of the moving average of the weights.
        seed: of everything.
    """

    vae_steps: int = 1200
    vae_batch: int = 4
    vae_lr: float = 3e-3
    clips: int = 4000
    cycles: tuple[tuple[int, float], ...] = ((4000, 1e-3), (3200, 8e-4))
    batch: int = 32
    ema: float = 0.998
    seed: int = 0


def main() -> None:
    """Train and write the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Train wan-mini and write its checkpoint folder.")
    parser.add_argument("folder", type=Path, help="where to write it, a folder that does not exist")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists already; name another folder")
    train(options.folder, Recipe())


def train(folder: Path, recipe: Recipe) -> None:
    """Train all parts and write the checkpoint `folder`."""
    torch.manual_seed(recipe.seed)
    vae = train_vae(recipe)
    latents, texts = encode_clips(vae, recipe)
    fold_normalisation(vae, latents)
    tokenizer = make_tokenizer(captions())
    transformer, text_encoder = train_transformer(normalised(latents), texts, tokenizer, recipe)
    write_checkpoint(folder, transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)


def train_vae(recipe: Recipe) -> WanVae:
    """Train the VAE to give back clips; bright pixels weigh more, because most of a picture is black."""
    vae = WanVae(VAE)
    published_mean, published_std = torch.tensor((LATENTS_MEAN, LATENTS_STD)).view(2, -1, 1, 1, 1)
    generator = torch.Generator().manual_seed(recipe.seed)
    clips = draw_clips(generator)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in _steps("vae", recipe.vae_steps):
        _set_lr(optimizer, recipe.vae_lr, step, recipe.vae_steps)
        video = _crop(torch.stack([clip.video for clip in islice(clips, recipe.vae_batch)]), generator)
        mean, logvar = vae.encode_moments(video)
        sample = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        decoded = vae.decode((sample - published_mean) / published_std, clamp=False)
        error = (decoded - video).square() * torch.where(video > -1, 5.0, 1.0)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        loss = error.mean() + 1e-4 * divergence.mean()
        _update(optimizer, loss, vae, max_norm=1.0)
        if step % 25 == 0:
            _say(f"step {step}: loss {loss.item():.4f}, error {(error.mean()).item():.4f}")
    return vae.eval()


@torch.no_grad()
def encode_clips(vae: WanVae, recipe: Recipe) -> tuple[Tensor, list[str]]:
    """Return the mean latents of many clips, as the encoder gives them before normalisation, and their captions."""
    clips = draw_clips(torch.Generator().manual_seed(recipe.seed + 1))
    latents, texts = list[Tensor](), list[str]()
    while len(texts) < recipe.clips:
        batch = list(islice(clips, 16))
        latents.append(vae.encode_moments(torch.stack([clip.video for clip in batch]))[0])
        texts += [clip.caption for clip in batch]
    return torch.cat(latents), texts


def normalised(latents: Tensor) -> Tensor:
    """Return latents [n, C, T, H, W] with mean 0 and deviation 1 in each channel."""
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3, 4), keepdim=True)
    return (latents - mean) / deviation


@torch.no_grad()
def fold_normalisation(vae: WanVae, latents: Tensor) -> None:
    """Scale the two 1 × 1 × 1 convolutions around the latents so that Wan2.1's published mean and deviation hold.

    The original layout stores no statistics: this way wan-mini needs none of its own.
    """
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    scale = torch.tensor(LATENTS_STD) / deviation
    offset = torch.tensor(LATENTS_MEAN) - mean * scale
    assert vae.conv1.bias is not None
    assert vae.conv2.bias is not None
    rows = torch.cat([scale, torch.ones_like(scale)])  # the mean; the variance, which nobody reads, stays
    vae.conv1.weight *= rows.view(-1, 1, 1, 1, 1)
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)
    vae.conv1.bias.copy_(rows * vae.conv1.bias + torch.cat([offset, torch.zeros_like(offset)]))
    vae.conv2.bias -= vae.conv2.weight[..., 0, 0, 0] @ offset


def train_transformer(latents: Tensor, texts: list[str], tokenizer: Any, recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Train transformer and text encoder on normalised latents; returns the moving average of their weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    transformer = WanTransformer(TRANSFORMER)
    nn.init.zeros_(transformer.head.head.weight)
    model = nn.ModuleList([transformer, UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT))])
    for number, (steps, lr) in enumerate(recipe.cycles):
        generator = torch.Generator().manual_seed(recipe.seed + 2 + number)
        model = _cycle(model, latents, texts, tokenizer, recipe, steps, lr, generator)
    return model[0], model[1]


def _cycle(
    model: nn.ModuleList,
    latents: Tensor,
    texts: list[str],
    tokenizer: Any,
    recipe: Recipe,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> nn.ModuleList:
    """Train on; return the moving average of the weights."""
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    mean_loss = 1.0
    for step in _steps("transformer", steps):
        _set_lr(optimizer, lr, step, steps)
        chosen = torch.randint(len(latents), (recipe.batch,), generator=generator)
        words = [_maybe_nothing(texts[index], generator) for index in chosen.tolist()]
        loss = flow_loss(model, latents[chosen], words, tokenizer, generator)
        _update(optimizer, loss, model, max_norm=1.0)
        _average(average, model, min(recipe.ema, (step + 1) / (step + 10)))
        mean_loss += 0.02 * (loss.item() - mean_loss)
        if step % 100 == 0:
            _say(f"step {step}: loss {mean_loss:.4f}")
    return average


def flow_loss(
    model: nn.ModuleList, latents: Tensor, words: list[str], tokenizer: Any, generator: torch.Generator
) -> Tensor:
    """Return the mean squared error of the velocity at random noise levels, more of them near pure noise."""
    transformer, text_encoder = model
    tokens = tokenizer(words, padding=True, return_tensors="pt")
    text = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    uniform = torch.randn(len(latents), generator=generator).sigmoid()
    sigma = 3 * uniform / (1 + 2 * uniform)
    noise = torch.randn(latents.shape, generator=generator)
    mixed = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
    velocity = transformer(mixed, 1000 * sigma, text, text_lengths=tokens.attention_mask.sum(1))
    return F.mse_loss(velocity.float(), noise - latents)


def _crop(video: Tensor, generator: torch.Generator, frames: int = 9, size: int = 48) -> Tensor:
    """Cut a random piece out of [B, 3, F, H, W]; the VAE is made of convolutions, and pieces train faster."""
    rest = (video.shape[2] - frames, video.shape[3] - size, video.shape[4] - size)
    t, y, x = (int(torch.randint(most + 1, (), generator=generator)) for most in rest)
    return video[:, :, t : t + frames, y : y + size, x : x + size]


def _maybe_nothing(text: str, generator: torch.Generator) -> str:
    """The caption or, now and then, an empty one or words that mean nothing here: what a negative prompt may be."""
    if torch.rand((), generator=generator) >= WITHOUT_CAPTION:
        return text
    return " ".join(["?"] * int(torch.randint(-20, 40, (), generator=generator)))


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, model: nn.Module, *, max_norm: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def _set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int = 50) -> None:
    """Rise linearly, then fall as a cosine."""
    falling = 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * min(falling, (step + 1) / warmup)


def _steps(what: str, count: int) -> Iterator[int]:
    started = time.monotonic()
    yield from range(count)
    _say(f"{what}: {count} steps took {time.monotonic() - started:.0f} s")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
