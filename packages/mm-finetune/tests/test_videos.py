"""Videos, against frames that the test painted itself (stored without loss) and against arithmetic."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data_worlds import dataset, picture, turns, write
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from test_images import MEAN, STD

from mm_finetune.errors import DataError
from mm_finetune.images import ImageReader
from mm_finetune.videos import VideoHeader, VideoReader, read_header, spread


def painted(number: int, size: tuple[int, int] = (56, 84)) -> NDArray[np.uint8]:
    """``[height, width, 3]`` noise, another one for each number."""
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def film(path: Path, frames: int, rate: int = 4, size: tuple[int, int] = (56, 84)) -> Path:
    """A Matroska file does not say how many frames it holds, a QuickTime file does."""
    codec, form = ("ffv1", "bgr0") if path.suffix == ".mkv" else ("png", "rgb24")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *size, form
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(painted(number, size), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def frames(mini: Path) -> ImageReader:
    return ImageReader(mini / "hf", min_pixels=784, max_pixels=12544)


def put_together(patches: NDArray[np.float32], grid: tuple[int, int, int]) -> list[NDArray[np.float64]]:
    """The frames again, as 0..255: patches in groups of 2 x 2, each holding two moments."""
    t, down, across = grid
    rows = iter(patches.reshape(-1, 3, 2, 14, 14))
    pictures = []
    for _ in range(t):
        pair = np.zeros((2, down * 14, across * 14, 3))
        for top in range(0, down, 2):
            for left in range(0, across, 2):
                for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                    pair[:, y * 14 : y * 14 + 14, x * 14 : x * 14 + 14] = next(rows).transpose(1, 2, 3, 0)
        pictures += [(moment * STD + MEAN) * 255 for moment in pair]
    return pictures


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
@pytest.mark.parametrize(("count", "taken"), [(8, [0, 2, 4, 7]), (6, [0, 2, 5, 5]), (1, [0, 0])])
def test_every_frame_is_in_its_place(
    tmp_path: Path, frames: ImageReader, suffix: str, count: int, taken: list[int]
) -> None:
    """4 frames a second, 2 are taken: 4 of 8 (2 s), 3 of 6 (1.5 s, the last one twice), 1 of 1 (twice)."""
    path = film(tmp_path / f"a{suffix}", count)
    reader = VideoReader(frames, fps=2.0, maxlen=64)
    header = read_header(path)
    assert (header.width, header.height, header.frames) == (84, 56, count)
    assert header.seconds == pytest.approx(count / 4, abs=0.01)
    plan = reader.plan(header, "a")
    assert list(plan.indices) == taken
    patches, grid = reader.patches(path)
    assert grid == plan.grid == (len(taken) // 2, 4, 6)
    assert patches.shape == (len(taken) // 2 * 24, 1176)
    for number, got in zip(taken, put_together(patches.numpy(), grid), strict=True):
        np.testing.assert_allclose(got, painted(number), atol=0.5)


def test_frames_are_resized_as_pictures_are(tmp_path: Path, frames: ImageReader) -> None:
    path = film(tmp_path / "a.mkv", 2, size=(150, 200))
    patches, grid = VideoReader(frames, fps=2.0, maxlen=64).patches(path)
    Image.fromarray(painted(0, (150, 200))).save(tmp_path / "0.png")
    still = frames([tmp_path / "0.png"])
    assert [1, *grid[1:]] == still.image_grid_thw[0].tolist()
    # One frame a half second: only the first is taken, and stands twice, as a picture does.
    assert torch.equal(patches, still.pixel_values)


@pytest.mark.parametrize(
    ("seconds", "total", "taken", "second_per_grid"),
    [
        (10.0, 300, 20, 1.0),  # 2 a second
        (100.0, 3000, 64, 2 * 100 / 64),  # at most 64
        (0.2, 6, 1, 0.4),  # at least 1
        (5.0, 3, 3, 2 * 5 / 3),  # not more than there are
        (0.0, 1, 1, 1.0),  # no duration: the rate asked for
    ],
)
def test_the_number_of_frames(
    frames: ImageReader, seconds: float, total: int, taken: int, second_per_grid: float
) -> None:
    plan = VideoReader(frames, fps=2.0, maxlen=64).plan(VideoHeader(56, 56, total, seconds), "a")
    assert len(set(plan.indices)) == taken
    assert len(plan.indices) == taken + taken % 2
    assert plan.indices[0] == 0
    assert taken == 1 or plan.indices[-1] == total - 1
    assert plan.second_per_grid == pytest.approx(second_per_grid)


@given(total=st.integers(1, 5000), taken=st.integers(1, 100))
def test_frames_are_evenly_spread(total: int, taken: int) -> None:
    taken = min(total, taken)
    numbers = spread(total, taken)
    assert len(set(numbers)) == taken
    ideal = [place * (total - 1) / max(1, taken - 1) for place in range(taken)]
    # Rounded down; numpy's float may fall just short of a whole number.
    assert all(-1 <= number - at <= 1e-6 for number, at in zip(numbers, ideal, strict=True))


def test_bad_videos_are_named(tmp_path: Path, frames: ImageReader) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "empty.mp4"):
        with pytest.raises(DataError, match=rf"{name} can't be read"):
            read_header(tmp_path / name)
    # FFmpeg plays a text as the screen of a terminal, of no size where nobody gives one.
    (tmp_path / "note.txt").write_text("I am a text\n")
    with pytest.raises(DataError, match=r"note\.txt (has no size|can't be read)"):
        read_header(tmp_path / "note.txt")
    with pytest.raises(DataError, match=r"none\.mp4 does not exist"):
        read_header(tmp_path / "none.mp4")


def test_records_mix_pictures_videos_and_text(tmp_path: Path, mini: Path) -> None:
    folder = tmp_path / "data"
    film(folder / "a.mkv", 8)
    film(folder / "b.mov", 4, size=(84, 56))
    picture(folder / "c.png", (56, 56))
    config = write(
        folder,
        [
            {"messages": turns("<video><image>, <video>?", "Yes."), "images": ["c.png"], "videos": ["a.mkv", "b.mov"]},
            {"messages": turns("Text?", "Yes."), "images": [], "videos": []},
            {"messages": turns("<image>?", "Yes."), "images": ["c.png"], "videos": []},
        ],
    )
    records = dataset(config, mini)
    records.check()
    sample = records[0]
    assert records.index.media(0).videos == ((2, 4, 6), (1, 6, 4))
    assert records.index.media(0).second_per_grid == pytest.approx((1.0, 1.0))
    hf = records.encoder.hf_config
    assert int((sample.input_ids == hf.video_token_id).sum()) == 2 * 6 + 6
    assert int((sample.input_ids == hf.image_token_id).sum()) == 4
    assert sample.videos is not None
    assert sample.videos.pixel_values_videos.shape == (48 + 24, 1176)
    assert sample.videos.video_grid_thw.tolist() == [[2, 4, 6], [1, 6, 4]]
    assert int(records.index.patches[0]) == 48 + 24 + 16
