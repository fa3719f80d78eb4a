"""How many tokens Qwen2.5-VL spends on an image of a given size: arithmetic only, no pixel is read."""

from __future__ import annotations

import math

_MAX_ASPECT = 200
_CAPPED_ASPECT = 180


def image_token_count(
    width: int,
    height: int,
    *,
    min_pixels: int = 3136,
    max_pixels: int = 12845056,
    patch_size: int = 14,
    merge_size: int = 2,
    pixel_cap: int | None = None,
    pixel_floor: int = 0,
) -> int:
    """Return the number of ``<|image_pad|>`` tokens that an image of ``width`` by ``height`` pixels becomes.

    The image is resized so that both sides are multiples of ``patch_size * merge_size`` and its area lies between
    ``min_pixels`` and ``max_pixels``; each square of ``merge_size`` by ``merge_size`` patches is one token. This is the
    rule (`smart_resize`) of the Qwen2-VL image processor in Hugging Face transformers; the default limits are those of
    the published Qwen2.5-VL checkpoints.

    ``pixel_cap`` adds the step that MindSpeed MM (``image_max_pixels``, 262144 in its examples) and LLaMA-Factory run
    before that processor: shrink to at most ``pixel_cap`` pixels, enlarge to at least ``pixel_floor`` (their
    ``image_min_pixels``), then widen a side below one square (28 pixels) to it, then shorten the long side of an image
    of aspect above 200 to 180 times the short one.

    A turned picture (an EXIF orientation that is or is not applied) costs the same: the rule is symmetric.

    >>> image_token_count(640, 480)
    391
    >>> image_token_count(640, 480, pixel_cap=262144)
    336

    Raises ``ValueError`` for sizes below 1, for limits that contradict each other, for an aspect ratio above 200 when
    no ``pixel_cap`` is given (the processor refuses such an image), and for a line so thin that the cap's shrinking
    leaves it no pixel (the trainer fails there).
    """
    factor = patch_size * merge_size
    size = resized_size(
        width,
        height,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch_size=patch_size,
        merge_size=merge_size,
        pixel_cap=pixel_cap,
        pixel_floor=pixel_floor,
    )
    return (size[0] // factor) * (size[1] // factor)


def resized_size(
    width: int,
    height: int,
    *,
    min_pixels: int = 3136,
    max_pixels: int = 12845056,
    patch_size: int = 14,
    merge_size: int = 2,
    pixel_cap: int | None = None,
    pixel_floor: int = 0,
) -> tuple[int, int]:
    """Return the width and height at which Qwen2.5-VL sees a picture: whole squares of ``patch_size * merge_size``.

    The arguments, the rule and ``ValueError`` are those of :func:`image_token_count`.
    """
    _require_positive(width=width, height=height, min_pixels=min_pixels, patch_size=patch_size, merge_size=merge_size)
    if max_pixels < min_pixels:
        raise ValueError(f"max_pixels is {max_pixels}, below min_pixels {min_pixels}")
    factor = patch_size * merge_size
    if pixel_cap is not None:
        _require_positive(pixel_cap=pixel_cap)
        width, height = _capped_size(width, height, pixel_cap, pixel_floor, factor)
    return _resized_size(width, height, min_pixels, max_pixels, factor)


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _capped_size(width: int, height: int, pixel_cap: int, pixel_floor: int, factor: int) -> tuple[int, int]:
    for wrong, pixels in ((width * height > pixel_cap, pixel_cap), (width * height < pixel_floor, pixel_floor)):
        if wrong:
            scale = math.sqrt(pixels / (width * height))
            width, height = int(width * scale), int(height * scale)
        if not width or not height:
            raise ValueError(f"shrinking the image to {pixel_cap} pixels leaves a side of none; crop the image")
    width, height = max(width, factor), max(height, factor)
    if width > _MAX_ASPECT * height:
        width = _CAPPED_ASPECT * height
    elif height > _MAX_ASPECT * width:
        height = _CAPPED_ASPECT * width
    return width, height


def _resized_size(width: int, height: int, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise ValueError(
            f"the image is {width}x{height}: Qwen2.5-VL refuses an aspect ratio above {_MAX_ASPECT}; "
            "crop the image, or give pixel_cap if your trainer shortens such images first"
        )
    # Floats on purpose, operation by operation: exact integers would differ from the processor at whole quotients.
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_width * new_height < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height
