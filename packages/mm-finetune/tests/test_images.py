"""Pictures, against arithmetic: token counts from the size alone, pixels put together again by hand."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mm_datafmt import image_token_count
from mm_finetune.errors import ConfigError, DataError
from mm_finetune.images import ImageReader, image_size

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def saved(path: Path, size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def put_together(patches: NDArray[Any], down: int, across: int) -> NDArray[Any]:
    """``[height, width, 3]`` of 0..255 from patches: groups of 2 x 2 in reading order, each with its time twice."""
    picture = np.zeros((down * 14, across * 14, 3))
    rows = iter(patches.reshape(-1, 3, 2, 14, 14))
    for top in range(0, down, 2):
        for left in range(0, across, 2):
            for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                patch = next(rows)
                np.testing.assert_array_equal(patch[:, 0], patch[:, 1])
                picture[y * 14 : y * 14 + 14, x * 14 : x * 14 + 14] = patch[:, 0].transpose(1, 2, 0)
    grey: NDArray[Any] = (picture * STD + MEAN) * 255
    return grey


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (57, 41), (20, 20), (14, 900), (2000, 30), (112, 56)])
@pytest.mark.parametrize(("low", "high"), [(3136, 262144), (3136, 12544), (50176, 12845056)])
def test_token_counts_follow_from_the_size(
    mini: Path, tmp_path: Path, size: tuple[int, int], low: int, high: int
) -> None:
    inputs = ImageReader(mini / "hf", min_pixels=low, max_pixels=high)([saved(tmp_path / "a.png", size)])
    expected = image_token_count(*size, min_pixels=low, max_pixels=high)
    assert inputs.token_counts == (expected,)
    assert inputs.pixel_values.shape == (expected * 4, 1176)
    assert inputs.image_grid_thw.prod() == expected * 4


def test_the_limits_of_the_folder_hold(mini: Path, tmp_path: Path) -> None:
    reader = ImageReader(mini / "hf")
    assert reader([saved(tmp_path / "small.png", (8, 8))]).token_counts == (4,)
    assert reader([saved(tmp_path / "large.png", (900, 900))]).token_counts == (16,)


def test_every_pixel_is_in_its_place(mini: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", (112, 56))
    inputs = ImageReader(mini / "hf")([path])
    assert inputs.image_grid_thw.tolist() == [[1, 4, 8]]
    picture = put_together(inputs.pixel_values.numpy(), 4, 8)
    # Half a grey value: rounding of float32 is far below, the next value is 1 away.
    np.testing.assert_allclose(picture, np.asarray(Image.open(path)), atol=0.5)


def test_several_pictures_are_those_one_by_one(mini: Path, tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{n}.png", size, seed=n) for n, size in enumerate([(56, 56), (112, 84), (90, 40)])]
    reader = ImageReader(mini / "hf")
    together, single = reader(paths), [reader([path]) for path in paths]
    assert torch.equal(together.pixel_values, torch.cat([one.pixel_values for one in single]))
    assert torch.equal(together.image_grid_thw, torch.cat([one.image_grid_thw for one in single]))
    assert together.token_counts == tuple(count for one in single for count in one.token_counts)
    assert together.pixel_values.dtype == torch.float32
    assert together.image_grid_thw.dtype == torch.int64


@pytest.mark.parametrize(
    ("mode", "name"), [("L", "a.png"), ("P", "a.png"), ("RGBA", "a.png"), ("1", "a.png"), ("CMYK", "a.tif")]
)
def test_other_modes_become_rgb(mini: Path, tmp_path: Path, mode: str, name: str) -> None:
    path = saved(tmp_path / name, (56, 56), mode)
    inputs = ImageReader(mini / "hf")([path])
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_allclose(put_together(inputs.pixel_values.numpy(), 4, 4), expected, atol=0.5)


def test_bad_pictures_are_named(mini: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    whole = saved(tmp_path / "whole.png", (300, 300)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.png").mkdir()
    reader = ImageReader(mini / "hf")
    for name in ("text.png", "empty.png", "cut.png", "folder.png"):
        with pytest.raises(DataError, match=rf"{name} can't be read"):
            reader([tmp_path / "whole.png", tmp_path / name])
    with pytest.raises(DataError, match=r"none\.png does not exist; is the dataset folder right"):
        reader([tmp_path / "none.png"])
    with pytest.raises(DataError, match=r"long\.png \(2100 x 10\) does not fit.*200"):
        reader([saved(tmp_path / "long.png", (2100, 10))])


def test_a_folder_without_usable_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json; give the folder"):
        ImageReader(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be used"):
        ImageReader(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(0, None), (-5, 10), (20_000, None), (400, 300)])
def test_limits_that_contradict_each_other_are_refused(mini: Path, low: int, high: int | None) -> None:
    with pytest.raises(ConfigError, match="min_pixels must be 1 or more and not above max_pixels"):
        ImageReader(mini / "hf", min_pixels=low, max_pixels=high)


def test_a_published_configuration_is_read(tmp_path: Path) -> None:
    published = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": MEAN.tolist(), "image_std": STD.tolist(), "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    picture = saved(tmp_path / "a.png", (640, 480))
    assert ImageReader(tmp_path)([picture]).token_counts == (image_token_count(640, 480),)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), cap=st.none() | st.sampled_from([16384, 262144]))
def test_the_grid_follows_from_the_size_as_the_tokens_do(mini: Path, width: int, height: int, cap: int | None) -> None:
    limits = {"min_pixels": 3136, "max_pixels": 12845056, "pixel_cap": cap}
    reader = reader_of(str(mini / "hf"), *limits.values())
    try:
        expected = image_token_count(width, height, **limits)  # type: ignore[arg-type]
    except ValueError:
        with pytest.raises(DataError, match=r"does not fit|so thin"):
            reader.grid(width, height, "picture")
        return
    t, h, w = reader.grid(width, height, "picture")
    assert (t, t * h * w // 4) == (1, expected)


@lru_cache
def reader_of(folder: str, low: int, high: int, cap: int | None) -> ImageReader:
    return ImageReader(folder, min_pixels=low, max_pixels=high, pixel_cap=cap)


@pytest.mark.parametrize("resample", ["bicubic", "nearest"])
def test_the_cap_is_a_resize_before_the_processor(mini: Path, tmp_path: Path, resample: str) -> None:
    """640 x 480 under 262144 pixels becomes 591 x 443, then 588 x 448: 336 tokens (published example)."""
    path = saved(tmp_path / "a.png", (640, 480))
    capped = ImageReader(mini / "hf", min_pixels=3136, max_pixels=12845056, pixel_cap=262144, resample=resample)
    inputs = capped([path])
    assert inputs.image_grid_thw.tolist() == [[1, 32, 42]]
    assert inputs.token_counts == (336,)
    how = Image.Resampling.BICUBIC if resample == "bicubic" else Image.Resampling.NEAREST
    Image.open(path).resize((591, 443), how).save(tmp_path / "b.png")
    by_hand = ImageReader(mini / "hf", min_pixels=3136, max_pixels=12845056)([tmp_path / "b.png"])
    assert torch.equal(inputs.pixel_values, by_hand.pixel_values)


def test_the_grid_from_the_header_is_that_of_the_pixels(mini: Path, tmp_path: Path) -> None:
    for number, size in enumerate([(56, 56), (640, 480), (31, 900), (8, 8)]):
        path = saved(tmp_path / f"{number}.png", size)
        assert image_size(path) == size
        for cap in (None, 16384):
            reader = ImageReader(mini / "hf", pixel_cap=cap)
            assert [list(reader.grid(*size, "x"))] == reader([path]).image_grid_thw.tolist()
