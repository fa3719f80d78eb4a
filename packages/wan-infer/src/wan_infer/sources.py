"""The images and videos that a request starts from: read, and checked against what the model takes.

Images are float32 [3, H, W] and videos [3, F, H, W], both in [-1, 1]; masks are [1, F, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from wan_infer.config import ModelType
from wan_infer.errors import MediaError, RequestError
from wan_infer.tasks import Size
from wan_infer.video import read_frames

ImageLike = str | Path | Image.Image | Tensor
VideoLike = str | Path | Tensor

# What each kind of model has a use for. i2v and flf2v need all of theirs, vace needs none.
_TAKEN: Mapping[ModelType, tuple[str, ...]] = MappingProxyType(
    {
        "t2v": (),
        "i2v": ("image",),
        "flf2v": ("image", "last_image"),
        "vace": ("src_video", "src_mask", "src_ref_images"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a video starts from besides its prompt.

    Attributes:
        images: of i2v the first frame, of flf2v the first and the last one, which has the aspect of the first.
        video: of vace, as many frames as are made.
        mask: of vace, as many frames or one for all; 1 is where the model may paint.
        references: of vace, images of what shall appear.
    """

    images: tuple[Tensor, ...] = ()
    video: Tensor | None = None
    mask: Tensor | None = None
    references: tuple[Tensor, ...] = ()


def read_sources(
    model_type: ModelType,
    frames: int,
    *,
    image: ImageLike | None = None,
    last_image: ImageLike | None = None,
    src_video: VideoLike | None = None,
    src_mask: VideoLike | None = None,
    src_ref_images: Sequence[ImageLike] | ImageLike = (),
) -> Sources:
    """Read what was given for a video of so many frames.

    Raises:
        RequestError: something is missing, of no use to this kind of model, or of another shape or length.
        MediaError: a file cannot be read.
    """
    references = _listed(src_ref_images)
    given = {
        "image": image,
        "last_image": last_image,
        "src_video": src_video,
        "src_mask": src_mask,
        "src_ref_images": references or None,
    }
    _check_kinds(model_type, given)
    if last_image is not None and frames == 1:
        raise RequestError("frames is 1, but a first and a last image are two; ask for 5 frames at least")
    if src_mask is not None and src_video is None:
        raise RequestError("src_mask says what may change in src_video, which is missing; give both, or neither")
    images = [as_image(each) for each in (image, last_image) if each is not None]
    return Sources(
        images=tuple(crop_to_aspect(each, images[0]) for each in images),
        video=None if src_video is None else _first_frames(as_video(src_video), frames, "src_video"),
        mask=None if src_mask is None else _first_frames(as_mask(src_mask), frames, "src_mask"),
        references=tuple(as_image(each) for each in references),
    )


def _check_kinds(model_type: ModelType, given: Mapping[str, Any]) -> None:
    taken = _TAKEN[model_type]
    if idle := [name for name, value in given.items() if value is not None and name not in taken]:
        takes = ", ".join(taken) or "no image and no video"
        raise RequestError(f"a model of the type {model_type} has no use for {', '.join(idle)}; it takes {takes}")
    if model_type != "vace" and (missing := [name for name in taken if given[name] is None]):
        raise RequestError(f"a model of the type {model_type} needs {' and '.join(missing)}; give an image file each")


def as_image(image: ImageLike) -> Tensor:
    """Return an image as float32 [3, H, W] in [-1, 1], turned as its camera says; transparency is dropped.

    Args:
        image: a path, a picture of Pillow, or already such a tensor.

    Raises:
        MediaError: the file is no image, or is damaged.
        RequestError: a tensor of another shape or dtype.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise RequestError(
                f"an image is {image.dtype} {list(image.shape)}; a tensor of one is floating, [3, height, width], "
                "in [-1, 1]"
            )
        return image.float().cpu()
    try:
        pixels = _pixels(image) if isinstance(image, Image.Image) else _pixels_of_file(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"the image {image} cannot be read: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def _pixels_of_file(path: str | Path) -> Any:
    with Image.open(path) as picture:
        return _pixels(picture)


def _pixels(picture: Image.Image) -> Any:
    return np.array(ImageOps.exif_transpose(picture).convert("RGB"))


def as_video(video: VideoLike) -> Tensor:
    """Return a video, or an image as a video of one frame, as float32 [3, F, H, W] in [-1, 1].

    Raises:
        MediaError: the file is no video, or is damaged.
        RequestError: a tensor of another shape or dtype.
    """
    if not isinstance(video, Tensor):
        return read_frames(video)
    if video.ndim != 4 or video.shape[0] != 3 or not video.is_floating_point():
        raise RequestError(
            f"a video is {video.dtype} {list(video.shape)}; a tensor of one is floating, [3, frames, height, width], "
            "in [-1, 1]"
        )
    return video.float().cpu()


def as_mask(mask: VideoLike) -> Tensor:
    """Return a mask as float32 [1, F, H, W] in [0, 1]; in a file, white is 1.

    Raises:
        MediaError: the file is no video or image, or is damaged.
        RequestError: a tensor of another shape.
    """
    if not isinstance(mask, Tensor):
        return (read_frames(mask).mean(0, keepdim=True) + 1) / 2
    if mask.ndim != 4 or mask.shape[0] != 1:
        raise RequestError(f"a mask has the shape {list(mask.shape)}; [1, frames, height, width] is expected")
    return mask.float().cpu()


def _first_frames(video: Tensor, frames: int, what: str) -> Tensor:
    """Return the first frames; a mask of one frame is for all."""
    if video.shape[1] < frames and not (what == "src_mask" and video.shape[1] == 1):
        fewer = max(1, (video.shape[1] - 1) // 4 * 4 + 1)
        raise RequestError(f"{what} has {video.shape[1]} frames and {frames} are to be made; ask for {fewer} at most")
    return video[:, :frames]


def _listed(images: Sequence[ImageLike] | ImageLike) -> list[ImageLike]:
    """One image may stand where several are taken."""
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, Tensor) and images.ndim == 3):
        return [images]
    return list(images)


def crop_to_aspect(image: Tensor, like: Tensor) -> Tensor:
    """Scale an image [C, H, W] to cover one of another size, and cut off evenly what stands out."""
    return cover(image, (like.shape[2], like.shape[1]), antialias=False)


def cover(image: Tensor, size: Size, *, antialias: bool) -> Tensor:
    """Scale an image [C, H, W] to cover (width, height), and cut off evenly what stands out."""
    width, height = size
    if image.shape[1:] == (height, width):
        return image
    scale = max(height / image.shape[1], width / image.shape[2])
    covering = (max(width, round(image.shape[2] * scale)), max(height, round(image.shape[1] * scale)))
    large = resize(image, covering, antialias=antialias)
    top, left = (large.shape[1] - height) // 2, (large.shape[2] - width) // 2
    return large[:, top : top + height, left : left + width]


def resize(image: Tensor, size: Size, *, antialias: bool = False) -> Tensor:
    """Resize an image [C, H, W] bicubically to (width, height)."""
    return F.interpolate(image[None], size=size[::-1], mode="bicubic", align_corners=False, antialias=antialias)[0]
