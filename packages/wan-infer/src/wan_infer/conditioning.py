"""What images and videos become before the transformer sees them: the conditions of i2v, flf2v and vace."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_infer.errors import RequestError
from wan_infer.sources import Sources, cover, resize
from wan_infer.tasks import PIXELS, Size
from wan_infer.vae import WanVae


def fit_area(image: Tensor, size: Size) -> Size:
    """Return (width, height) of at most the area of `size` in the aspect of `image`, multiples of 16.

    As the original does it, but in whole numbers: in floating point, an image of 832*480 comes out as 832*464.

    Raises:
        RequestError: one side would be shorter than 16 pixels.
    """
    rows, columns = image.shape[1:]
    area = size[0] * size[1]
    height = math.isqrt(area * rows // columns) // PIXELS * PIXELS
    width = math.isqrt(area * columns // rows) // PIXELS * PIXELS
    if not (width and height):
        raise RequestError(
            f"an image of {image.shape[2]}*{image.shape[1]} is too narrow for an area of {size[0]}*{size[1]}; "
            "cut it, or take a larger size"
        )
    return width, height


def frames_condition(vae: WanVae, images: Sequence[Tensor], size: Size, frames: int) -> Tensor:
    """Return the condition of i2v (one image) or flf2v (first and last): mask and latents, [1, 20, T, h, w].

    The video that is encoded is the image, then zeros, then the last image; the mask is 1 where a pixel frame is given.
    Four mask channels stand for the four pixel frames of a latent frame; the first pixel frame counts four times.

    Args:
        vae: where it is encoded.
        images: [3, H, W] each, resized to `size`.
        size: (width, height) in pixels.
        frames: of the video, 4n + 1.
    """
    width, height = size
    video = torch.zeros(1, 3, frames, height, width)
    given = torch.zeros(frames)
    for place, image in zip((0, -1), images, strict=False):
        video[0, :, place] = resize(image, size)
        given[place] = 1
    latents = vae.encode(video.to(_device(vae)))
    mask = torch.cat([given[:1].repeat(4), given[1:]]).view(-1, 4).T  # [4, T]
    spread = mask[None, :, :, None, None].expand(-1, -1, -1, *latents.shape[3:])
    return torch.cat([spread.to(latents), latents], dim=1)


def vace_context(vae: WanVae, sources: Sources, size: Size, frames: int) -> Tensor:
    """Return the context of vace, [1, 96, T, h, w]: 32 channels of latents and 64 of the mask.

    What the mask keeps (up to 0.5) and what it leaves to the model are encoded apart; its channels hold it as it is.
    Every reference image is a latent frame of its own before the video, in the order given.

    Args:
        vae: where it is encoded.
        sources: video and mask of `frames` frames, which are scaled and cut to `size`. Without a video there is
            nothing to keep, without a mask all is left to the model.
        size: (width, height) in pixels.
        frames: of the video, 4n + 1.
    """
    width, height = size
    video = torch.zeros(3, frames, height, width) if sources.video is None else _covering(sources.video, size)
    mask = torch.ones(1, 1, height, width) if sources.mask is None else _covering(sources.mask, size).clamp(0, 1)
    mask = mask.expand(-1, frames, -1, -1)
    free = (mask > 0.5).float()
    kept, left = (vae.encode((video * part)[None].to(_device(vae))) for part in (1 - free, free))
    channels = torch.cat([kept, left, _mask_channels(mask, kept.shape[2:]).to(kept)], dim=1)
    before = [_reference_latents(vae, image, size) for image in sources.references]
    return torch.cat([*before, channels], dim=2)


def _covering(video: Tensor, size: Size) -> Tensor:
    return torch.stack([cover(frame, size, antialias=True) for frame in video.unbind(1)], dim=1)


def _reference_latents(vae: WanVae, image: Tensor, size: Size) -> Tensor:
    """A reference on a white page, as one latent frame with nothing left to the model, [1, 96, 1, h, w]."""
    latents = vae.encode(on_white_page(image, size)[None, :, None].to(_device(vae)))
    return F.pad(latents, (0, 0, 0, 0, 0, 0, 0, 80))


def on_white_page(image: Tensor, size: Size) -> Tensor:
    """Scale an image [3, H, W] to fit into (width, height), and put it in the middle of a white one of that size."""
    width, height = size
    scale = min(width / image.shape[2], height / image.shape[1])
    rows, columns = (max(1, int(side * scale)) for side in image.shape[1:])
    small = F.interpolate(image[None], size=(rows, columns), mode="bilinear", align_corners=False)[0]
    page = torch.ones(3, height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    page[:, top : top + rows, left : left + columns] = small
    return page


def _mask_channels(mask: Tensor, size: torch.Size) -> Tensor:
    """The mask [1, F, H, W] with the 8 × 8 pixels of a latent pixel as 64 channels, [1, 64, T, h, w]."""
    frames, rows, columns = size
    cut = mask[0].unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # [F, h, 8, w, 8]
    channels = cut.permute(2, 4, 0, 1, 3).flatten(0, 1)
    return F.interpolate(channels[None], size=(frames, rows, columns), mode="nearest-exact")


def _device(vae: WanVae) -> torch.device:
    return next(vae.parameters()).device
