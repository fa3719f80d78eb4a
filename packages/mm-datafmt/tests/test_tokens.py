"""Token counts against numbers from elsewhere and against the rule in exact integers."""

from math import isqrt

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mm_datafmt import image_token_count

SQUARE = 28
MIN_PIXELS, MAX_PIXELS = 3136, 12845056


# From `smart_resize(height, width, 28, 3136, 12845056)` of transformers 5.24.0's qwen2_vl image processor.
@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        (1, 1, 4), (14, 14, 4), (20, 20, 4), (28, 28, 4), (42, 42, 4), (57, 55, 4), (70, 70, 4), (98, 98, 16),
        (1, 200, 29), (200, 1, 29), (13, 2600, 29), (30000, 150, 5355), (224, 224, 64), (333, 777, 336),
        (500, 375, 234), (640, 427, 345), (640, 480, 391), (1024, 1024, 1369), (1920, 1080, 2691),
        (3584, 3584, 16384), (3598, 3584, 16384), (3840, 2160, 10549), (4000, 3000, 15301), (8000, 6000, 16170),
        (12000, 9000, 16170), (16384, 16384, 16384),
    ],
)  # fmt: skip
def test_counts_of_the_published_processor(width: int, height: int, tokens: int) -> None:
    assert image_token_count(width, height) == tokens


# Counts that MindSpeed MM's preprocessing gives with image_max_pixels 262144.
@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(640, 480, 336), (640, 427, 330), (500, 375, 234), (1024, 1024, 324), (224, 224, 64), (20, 20, 4)],
)
def test_counts_with_the_cap_of_mindspeed_mm(width: int, height: int, tokens: int) -> None:
    assert image_token_count(width, height, pixel_cap=262144) == tokens


def test_the_cap_steps_by_hand() -> None:
    # 10x4000: 40000 pixels are under the cap; 10 is widened to 28; 4000 > 200 * 28 is false; 1 x 143 squares.
    assert image_token_count(10, 4000, pixel_cap=262144) == round(4000 / 28)
    # 28x8000: 224000 pixels are under the cap; 8000 > 200 * 28, so 8000 becomes 180 * 28: 1 x 180 squares.
    assert image_token_count(28, 8000, pixel_cap=262144) == 180
    assert image_token_count(8000, 28, pixel_cap=262144) == 180
    # Without the last step an aspect above 200 is refused.
    with pytest.raises(ValueError, match=r"28x8000.*above 200.*pixel_cap"):
        image_token_count(28, 8000)
    assert image_token_count(28, 5600) == 200


def largest_multiple(side: int, other: int, area: int) -> int:
    """The largest k with (28 k)² · other ≤ side · area: floor(side · sqrt(area / (side · other)) / 28), exactly."""
    return isqrt(side * area // other) // SQUARE


@given(st.integers(1, 40000), st.integers(1, 40000))
@example(1, 200)
@example(3584, 3584)
def test_the_rule_in_exact_integers(width: int, height: int) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    near = [(side + SQUARE // 2) // SQUARE for side in (width, height)]
    # round() goes to even on a tie
    near = [
        n - 1 if side % SQUARE == SQUARE // 2 and n % 2 else n for n, side in zip(near, (width, height), strict=True)
    ]
    area = near[0] * near[1] * SQUARE**2
    if area > MAX_PIXELS:
        down = largest_multiple(width, height, MAX_PIXELS), largest_multiple(height, width, MAX_PIXELS)
        for k, side, other in ((down[0], width, height), (down[1], height, width)):
            assume((k * SQUARE) ** 2 * other != side * MAX_PIXELS)  # a whole quotient: the float may fall either side
        expected = max(1, down[0]) * max(1, down[1])
    elif area < MIN_PIXELS:
        up = []
        for side, other in ((width, height), (height, width)):
            k = largest_multiple(side, other, MIN_PIXELS)
            assume((k * SQUARE) ** 2 * other != side * MIN_PIXELS)
            up.append(k + 1)
        expected = up[0] * up[1]
    else:
        expected = near[0] * near[1]
    assert image_token_count(width, height) == expected


@given(st.integers(1, 10**6), st.integers(1, 10**6))
@example(1, 262144)
def test_with_a_cap_every_size_has_a_count_and_the_sides_may_be_swapped(width: int, height: int) -> None:
    assume(min(width, height) ** 2 * 262144 >= width * height or width * height <= 262144)
    count = image_token_count(width, height, pixel_cap=262144)
    assert count == image_token_count(height, width, pixel_cap=262144)
    assert 4 <= count <= MAX_PIXELS // SQUARE**2


def test_a_line_that_the_cap_leaves_no_pixel_of() -> None:
    # 1 x 300000: scaled by sqrt(262144 / 300000) = 0.93, the width is int(0.93) = 0, and Pillow refuses that size.
    for size in ((1, 300_000), (300_000, 1)):
        with pytest.raises(ValueError, match="shrinking the image to 262144 pixels leaves a side of none"):
            image_token_count(*size, pixel_cap=262144)
    assert image_token_count(1, 262_144, pixel_cap=262144) == 180  # under the cap; widened to 28, then 28 x 28 * 180


def test_the_floor_by_hand() -> None:
    # 10 x 10 below 589824 = 768²: scaled by 76.8 to 768 x 768, which is 27 x 27 squares (27.4 rounded).
    assert image_token_count(10, 10, pixel_cap=1 << 20, pixel_floor=589824) == 27 * 27
    assert image_token_count(1000, 1000, pixel_cap=1 << 20, pixel_floor=589824) == 36 * 36  # 35.7; not touched
    assert image_token_count(10, 10, pixel_cap=1 << 20, pixel_floor=0) == 4


def test_other_patches_and_limits() -> None:
    assert image_token_count(64, 32, patch_size=8, merge_size=1, min_pixels=1) == 8 * 4
    assert image_token_count(1000, 1000, max_pixels=56 * 56) == 4
    assert image_token_count(28, 28, min_pixels=784) == 1


@pytest.mark.parametrize("name", ["min_pixels", "patch_size", "merge_size", "pixel_cap"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        image_token_count(10, 10, **{name: 0})


def test_sizes_and_limits_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="width is 0"):
        image_token_count(0, 10)
    with pytest.raises(ValueError, match="height is -1"):
        image_token_count(10, -1)
    with pytest.raises(ValueError, match="max_pixels is 10, below min_pixels 3136"):
        image_token_count(10, 10, max_pixels=10)
