"""Whole pipelines beside those of diffusers: the same weights, noise, text embeddings and noise levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_pipeline as tiny
import torch
from PIL import Image
from torch import Tensor

from wan_infer.pipeline import WanPipeline
from wan_infer.samplers import draw_noise
from wan_infer.sources import as_image

# Transformers agree to 2e-5, a step divides by nothing smaller than 1 and guidance multiplies a difference by 5.
LATENTS, VIDEO = 1e-4, 1e-4
STEPS, GUIDANCE = 5, 5.0


def picture(seed: int, size: tuple[int, int] = tiny.SIZE) -> Image.Image:
    """Soft coloured stripes."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin((x * (c + 1) + y * seed) / 9 + seed) for c in range(3)]
    return Image.fromarray(np.uint8(np.stack(waves, axis=-1) * 120 + 128))


def shared(text: Tensor, negative: Tensor, noise: Tensor) -> dict[str, Any]:
    """What diffusers' pipelines take in common."""
    return {
        "prompt_embeds": tiny.padded(text),
        "negative_prompt_embeds": tiny.padded(negative),
        "width": tiny.SIZE[0],
        "height": tiny.SIZE[1],
        "num_frames": tiny.FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "latents": noise,
        "output_type": "latent",
        "return_dict": False,
    }


def run(own: WanPipeline, text: Tensor, negative: Tensor, noise: Tensor, **sources: Any) -> Any:
    return own(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        size=tiny.SIZE,
        frames=tiny.FRAMES,
        steps=STEPS,
        guidance=GUIDANCE,
        shift=tiny.SHIFT,
        sigma_grid="diffusers",
        latents=noise,
        **sources,
    )


def noise(batch: int = 1, frames: int = 3) -> Tensor:
    return torch.stack([draw_noise((16, frames, 4, 6), seed) for seed in range(batch)])


def assert_equal(generation: Any, peer: Any, latents: Tensor) -> None:
    """Latents agree, they are no longer noise, and both decode to one video."""
    assert generation.latents.std() > 0.1
    assert (generation.latents - latents).abs().max() <= LATENTS
    scale = torch.tensor(peer.vae.config.latents_std).view(1, -1, 1, 1, 1)
    shift = torch.tensor(peer.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        video = peer.vae.decode(latents * scale + shift, return_dict=False)[0]
    assert generation.video().shape == video.shape == (len(latents), 3, tiny.FRAMES, 32, 48)
    assert (generation.video() - video).abs().max() <= VIDEO


def test_text_to_video_of_two_prompts() -> None:
    own = tiny.ours("t2v")
    peer = tiny.theirs(own)
    text, negative, start = tiny.embeds(2), tiny.embeds(2, rows=4, seed=5), noise(2)
    (latents,) = peer(**shared(text, negative, start))
    assert_equal(run(own, text, negative, start), peer, latents)


def test_without_guidance() -> None:
    own = tiny.ours("t2v")
    peer = tiny.theirs(own)
    text, start = tiny.embeds(), noise()
    arguments = shared(text, text, start) | {"guidance_scale": 1.0, "negative_prompt_embeds": None}
    (latents,) = peer(**arguments)
    generation = own(
        prompt_embeds=text,
        size=tiny.SIZE,
        frames=tiny.FRAMES,
        steps=STEPS,
        guidance=1,
        shift=tiny.SHIFT,
        sigma_grid="diffusers",
        latents=start,
    )
    assert_equal(generation, peer, latents)


@pytest.mark.parametrize("model_type", ["i2v", "flf2v"])
def test_images_to_video(model_type: str) -> None:
    own = tiny.ours(model_type)
    pictures = [picture(1), picture(2)] if model_type == "flf2v" else [picture(1)]
    tokens = torch.cat([own._clip.get()(as_image(each)[None]) for each in pictures])
    peer = tiny.theirs(own, tokens=tokens)
    text, negative, start = tiny.embeds(), tiny.embeds(rows=4, seed=5), noise()
    last = pictures[1] if model_type == "flf2v" else None
    (latents,) = peer(image=pictures[0], last_image=last, **shared(text, negative, start))
    assert_equal(run(own, text, negative, start, image=pictures[0], last_image=last), peer, latents)


def as_pictures(video: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()]


@pytest.mark.parametrize("given", ["references", "video", "video, mask and reference", "nothing"])
def test_vace(given: str) -> None:
    """diffusers puts the last reference first and the original the first, so two of them are given to it in reverse."""
    own = tiny.ours("vace")
    peer = tiny.theirs(own)
    frames = [picture(seed) for seed in range(tiny.FRAMES)]
    # A soft mask: what is encoded is cut at one half, the channels hold it as it is.
    masks = [Image.fromarray(np.uint8(np.linspace(20, 230, 48 * 32).reshape(32, 48))).convert("RGB")] * tiny.FRAMES
    references = [picture(20), picture(30, (24, 40))]  # diffusers cuts sides to multiples of 8
    theirs: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    if "video" in given:
        theirs["video"] = frames
        sources["src_video"] = torch.stack([as_image(frame) for frame in frames], dim=1)
    if "mask" in given:
        theirs["mask"] = masks
        sources["src_mask"] = torch.stack([(as_image(each)[:1] + 1) / 2 for each in masks], dim=1)
    if "reference" in given:
        used = references if given == "references" else references[:1]
        theirs["reference_images"] = used[::-1]
        sources["src_ref_images"] = used
    extra = len(sources.get("src_ref_images", ()))
    text, negative, start = tiny.embeds(), tiny.embeds(rows=4, seed=5), noise(frames=3 + extra)
    (latents,) = peer(**theirs, **shared(text, negative, start))
    assert_equal(run(own, text, negative, start, **sources), peer, latents[:, :, extra:])
