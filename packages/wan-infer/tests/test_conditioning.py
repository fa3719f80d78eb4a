"""What images, videos and masks become; `test_pipeline_parity` compares whole conditions with those of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipeline as tiny
import torch
from PIL import Image
from torch import Tensor

from wan_infer.conditioning import fit_area, frames_condition, on_white_page, vace_context
from wan_infer.errors import MediaError, RequestError
from wan_infer.pipeline import WanPipeline
from wan_infer.sources import Sources, as_image, as_mask, as_video, cover, crop_to_aspect, read_sources
from wan_infer.video import VideoWriter

SIZE = (48, 32)


@pytest.fixture(scope="module")
def vae() -> Any:
    return tiny.vae()


# ---- reading --------------------------------------------------------------------------------------------------------


def test_an_image_is_spread_over_minus_one_to_one(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 1] = (255, 51, 0)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for given in (tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels)):
        image = as_image(given)
        assert (image.shape, image.dtype) == ((3, 2, 3), torch.float32)
        assert torch.allclose(image[:, 0, 1], torch.tensor([1.0, -0.6, -1.0]))
        assert image[:, 1].eq(-1).all()
    assert torch.equal(as_image(image.double()), image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    assert as_image(Image.new(mode, (5, 4))).shape == (3, 4, 5)


def test_a_photo_stands_upright(tmp_path: Path) -> None:
    """A camera that was held upright stores its pixels lying, and says so in the EXIF tag 0x0112."""
    picture = Image.new("RGB", (8, 4), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    picture.save(tmp_path / "photo.png", exif=exif)
    image = as_image(tmp_path / "photo.png")
    assert image.shape == (3, 8, 4)
    assert image[:, 0, 3].eq(1).all()


def test_a_mask_is_white_where_it_is_one(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255], [51, 255]], dtype=np.uint8)).save(tmp_path / "mask.png")
    mask = as_mask(tmp_path / "mask.png")
    assert mask.shape == (1, 1, 2, 2)
    assert torch.allclose(mask[0, 0], torch.tensor([[0, 1], [0.2, 1]]), atol=1e-6)
    assert torch.equal(as_mask(torch.ones(1, 2, 3, 4, dtype=torch.bool)), torch.ones(1, 2, 3, 4))


def test_videos_come_from_files_and_are_cut_to_length(tmp_path: Path) -> None:
    scene = torch.linspace(-0.8, 0.8, 6)[None, :, None, None].expand(3, -1, 32, 32)
    with VideoWriter(tmp_path / "in.mp4") as writer:
        writer.write(scene)
    sources = read_sources("vace", 5, src_video=tmp_path / "in.mp4", src_mask=str(tmp_path / "in.mp4"))
    assert sources.video is not None
    assert sources.mask is not None
    assert sources.video.shape == (3, 5, 32, 32)
    assert sources.mask.shape == (1, 5, 32, 32)
    assert (sources.video - scene[:, :5]).abs().max() < 0.05
    assert (sources.mask - (scene[:1, :5] + 1) / 2).abs().max() < 0.05
    assert as_video(scene).shape == (3, 6, 32, 32)


def test_one_reference_may_stand_for_a_list(tmp_path: Path) -> None:
    picture = Image.new("RGB", (9, 7), "red")
    picture.save(tmp_path / "red.png")
    for given in (picture, tmp_path / "red.png", str(tmp_path / "red.png"), as_image(picture), [picture]):
        assert [each.shape for each in read_sources("vace", 5, src_ref_images=given).references] == [(3, 7, 9)]


def test_a_last_image_takes_the_aspect_of_the_first() -> None:
    wide, tall = torch.zeros(3, 20, 40), torch.linspace(-1, 1, 60)[None, :, None].expand(3, 60, 20)
    first, last = read_sources("flf2v", 5, image=wide, last_image=tall).images
    assert first.shape == last.shape == (3, 20, 40)
    # Scaled to 120 × 40, of which the 20 rows in the middle are left: values about 0.
    assert last.mean().abs() < 1e-3
    assert last.max() - last.min() < 0.5


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    with pytest.raises(MediaError, match=r"the image .*photo\.jpg cannot be read: "):
        as_image(tmp_path / "photo.jpg")
    with pytest.raises(MediaError, match="cannot be read: No such file or directory"):
        as_image(tmp_path / "other.jpg")


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "size", "expected"),
    [
        ((832, 480), (832, 480), (832, 480)),
        ((480, 832), (832, 480), (480, 832)),
        ((1000, 1000), (832, 480), (624, 624)),  # √399360 = 631.9
        ((1920, 1080), (1280, 720), (1280, 720)),
        ((100, 200), (64, 64), (32, 80)),  # 45.3 and 90.5
    ],
)
def test_area_from_the_size_and_aspect_from_the_image(
    image: tuple[int, int], size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit_area(torch.empty(3, image[1], image[0]), size) == expected


def test_an_image_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(RequestError, match=r"an image of 2\*4000 is too narrow for an area of 64\*64; cut it, or take"):
        fit_area(torch.empty(3, 4000, 2), (64, 64))


@pytest.mark.parametrize("antialias", [True, False])
def test_covering_keeps_the_middle(antialias: bool) -> None:
    ramp = torch.linspace(-1, 1, 90)[None, None, :].expand(3, 30, 90)
    covered = cover(ramp, (48, 48), antialias=antialias)
    assert covered.shape == (3, 48, 48)
    assert covered.mean().abs() < 1e-3
    assert torch.equal(cover(ramp, (90, 30), antialias=antialias), ramp)
    assert torch.equal(crop_to_aspect(ramp, torch.empty(3, 48, 48)), cover(ramp, (48, 48), antialias=False))


def test_a_reference_stands_on_white() -> None:
    page = on_white_page(torch.full((3, 8, 4), -1.0), (48, 32))
    assert page.shape == (3, 32, 48)
    black = page.lt(0).all(0)
    assert black.any(1).sum() == 32  # as high as the page
    assert black.any(0).nonzero().flatten().tolist() == list(range(16, 32))
    assert page[:, ~black].eq(1).all()
    assert torch.equal(on_white_page(page, (48, 32)), page)
    assert on_white_page(torch.zeros(3, 1, 4000), (48, 32)).lt(1).any()  # a line does not vanish


# ---- conditions -----------------------------------------------------------------------------------------------------


def mask_by_hand(given: list[int], frames: int) -> Tensor:
    """[4, T]: the four pixel frames of each latent frame, the first of which has only one, four times."""
    pixels = [1 if frame in given else 0 for frame in range(frames)]
    rows = [[pixels[0]] * 4] + [pixels[first : first + 4] for first in range(1, frames, 4)]
    return torch.tensor(rows, dtype=torch.float32).T


@pytest.mark.parametrize(("count", "frames"), [(1, 1), (1, 9), (2, 5), (2, 13)])
def test_frames_condition(vae: Any, count: int, frames: int) -> None:
    images = [torch.full((3, 32, 48), 0.5), torch.full((3, 32, 48), -0.5)][:count]
    condition = frames_condition(vae, images, SIZE, frames)
    latent_frames = (frames - 1) // 4 + 1
    assert condition.shape == (1, 20, latent_frames, 4, 6)
    given = [0, frames - 1][:count]
    assert torch.equal(condition[0, :4, :, 1, 2], mask_by_hand(given, frames))
    assert condition[:, :4].eq(condition[:, :4, :, :1, :1]).all()
    video = torch.zeros(1, 3, frames, 32, 48)
    for place, image in zip(given, images, strict=True):
        video[0, :, place] = image
    assert torch.equal(condition[:, 4:], vae.encode(video))


def test_images_are_resized_to_the_video(vae: Any) -> None:
    flat = torch.full((3, 100, 150), 0.25)
    small, exact = (frames_condition(vae, [image], SIZE, 5) for image in (flat, torch.full((3, 32, 48), 0.25)))
    assert torch.allclose(small, exact, atol=1e-5)


def test_vace_without_anything_leaves_all_to_the_model(vae: Any) -> None:
    context = vace_context(vae, Sources(), SIZE, 5)
    nothing = vae.encode(torch.zeros(1, 3, 5, 32, 48))
    assert context.shape == (1, 96, 2, 4, 6)
    assert torch.equal(context[:, :16], nothing)
    assert torch.equal(context[:, 16:32], nothing)
    assert context[:, 32:].eq(1).all()


def test_vace_splits_a_video_by_its_mask(vae: Any) -> None:
    video = torch.rand(3, 5, 32, 48) * 2 - 1
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 24:] = 1
    context = vace_context(vae, Sources(video=video, mask=mask), SIZE, 5)
    kept, left = video.clone(), video.clone()
    kept[..., 24:], left[..., :24] = 0, 0
    assert torch.equal(context[:, :16], vae.encode(kept[None]))
    assert torch.equal(context[:, 16:32], vae.encode(left[None]))
    assert context[:, 32:, :, :, :3].eq(0).all()
    assert context[:, 32:, :, :, 3:].eq(1).all()


def test_the_channels_of_a_mask_are_the_pixels_of_a_latent_pixel(vae: Any) -> None:
    mask = torch.rand(1, 5, 32, 48)
    context = vace_context(vae, Sources(video=torch.zeros(3, 5, 32, 48), mask=mask), SIZE, 5)
    # Two latent frames stand for five pixel frames; the nearest to their middles are 1 and 3.
    for row, column, frame, source in [(0, 0, 0, 1), (3, 5, 1, 3), (2, 1, 1, 3)]:
        block = mask[0, source, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert torch.equal(context[0, 32:, frame, row, column], block.flatten())


def test_vace_references_come_before_the_video_in_order(vae: Any) -> None:
    references = (torch.full((3, 32, 48), -1.0), torch.full((3, 32, 48), 0.5))
    context = vace_context(vae, Sources(references=references), SIZE, 5)
    assert context.shape == (1, 96, 4, 4, 6)
    for frame, image in enumerate(references):
        assert torch.equal(context[:, :16, frame], vae.encode(image[None, :, None])[:, :, 0])
        assert context[:, 16:, frame].eq(0).all()
    assert torch.equal(context[:, :, 2:], vace_context(vae, Sources(), SIZE, 5))


def test_references_are_not_part_of_the_video() -> None:
    pipe: WanPipeline = tiny.ours("vace")
    seen: list[torch.Size] = []
    made = pipe(
        prompt_embeds=tiny.embeds(2),
        guidance=1,
        size=SIZE,
        frames=5,
        steps=2,
        seed=1,
        src_ref_images=[torch.zeros(3, 16, 16)] * 3,
        on_step=lambda step: seen.append(step.latents.shape),
    )
    assert seen[0] == (2, 16, 5, 4, 6)
    assert made.latents.shape == (2, 16, 2, 4, 6)
    assert made.video().shape == (2, 3, 5, 32, 48)


def test_large_sources_are_scaled_to_the_video(vae: Any) -> None:
    flat = torch.full((3, 5, 64, 96), 0.25)
    sources = Sources(video=flat, mask=torch.full((1, 1, 96, 144), 1.0))
    exact = Sources(video=flat[..., :32, :48], mask=torch.ones(1, 1, 32, 48))
    assert torch.allclose(vace_context(vae, sources, SIZE, 5), vace_context(vae, exact, SIZE, 5), atol=1e-5)
