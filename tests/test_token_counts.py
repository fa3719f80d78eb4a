"""``image_token_count`` beside transformers' image processor of Qwen2-VL and Qwen2.5-VL, over 5,000 sizes."""

import math
import random

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mm_datafmt import image_token_count

SIZES = 5_000
LIMITS = ((3136, 12845056), (3136, 1003520), (256 * 784, 1280 * 784))  # the checkpoints', and two that people set


def sizes() -> list[tuple[int, int]]:
    """Small, usual, huge (up to 100,000 a side) and extreme sizes (an aspect of 190 to 210)."""
    chance = random.Random(20)
    found = [(1, 1), (28, 28), (14, 42), (1, 200), (1, 201), (200, 1), (3598, 3584), (100_000, 500)]
    while len(found) < SIZES:
        width = round(math.exp(chance.uniform(0, math.log(100_000))))
        kind = len(found) % 3
        if kind == 0:
            height = round(math.exp(chance.uniform(0, math.log(100_000))))
        elif kind == 1:
            height = max(1, round(width * chance.uniform(0.3, 3)))
        else:
            height = max(1, round(width / chance.uniform(190, 210)))
        found.append((width, height) if chance.random() < 0.5 else (height, width))
    return found


@pytest.mark.parametrize(("min_pixels", "max_pixels"), LIMITS)
def test_counts_are_those_of_the_processor(min_pixels: int, max_pixels: int) -> None:
    processor = Qwen2VLImageProcessorPil()
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    refused = 0
    for width, height in sizes():
        try:
            patches = processor.get_number_of_image_patches(height, width, limits)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match="aspect ratio"):
                image_token_count(width, height, **limits)
            continue
        assert 4 * image_token_count(width, height, **limits) == patches, (width, height)
    assert 500 < refused < 2_500


@pytest.mark.parametrize(("width", "height"), [(20, 20), (640, 480), (333, 777), (13, 600), (1500, 40)])
def test_counts_are_those_of_processed_pictures(width: int, height: int) -> None:
    from PIL import Image

    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    grid = processor(Image.new("RGB", (width, height)), return_tensors="pt")["image_grid_thw"][0].tolist()
    assert math.prod(grid) // 4 == image_token_count(width, height)
