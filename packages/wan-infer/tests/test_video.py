"""Videos: what is written can be read again, and what fails leaves nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from full_disk import full_disk
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wan_infer.errors import MediaError, OutputError, RequestError
from wan_infer.sidecar import versions, write_sidecar
from wan_infer.video import VideoWriter, contact_sheet, read_frames, to_uint8

HEIGHT, WIDTH = 48, 80


def _scene(frames: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Smooth coloured waves that move, float32 [3, F, H, W] in [-0.9, 0.9]."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return 0.9 * torch.stack([torch.sin((x + 2 * t) / 13), torch.cos((y - t) / 11), torch.sin((x + y) / 17)])


def _write(path: Path, chunks: Iterable[Any], **options: Any) -> Path:
    with VideoWriter(path, **options) as video:
        for chunk in chunks:
            video.write(chunk)
    return path


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is written ------------------------------------------------------------------------------------------------


def test_an_mp4_holds_what_went_in(tmp_path: Path) -> None:
    scene = _scene(9)
    path = _write(tmp_path / "out.mp4", [scene[:, :1], scene[:, 1:5], scene[:, 5:]])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (9, 16, WIDTH, HEIGHT)
        assert [frame.time for frame in container.decode(video=0)] == [i / 16 for i in range(9)]
    decoded = read_frames(path)
    assert decoded.shape == scene.shape
    assert decoded.dtype == torch.float32
    assert (decoded - scene).abs().max() <= 0.15  # yuv420p keeps colours at half the size
    assert (decoded - scene).abs().mean() <= 0.03
    assert _left(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_colours_keep_their_value_and_say_how_to_read_them(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    path = _write(tmp_path / "out.mp4", [np.full((2, 32, 32, 3), colour, dtype=np.uint8)])
    decoded = to_uint8(read_frames(path)).astype(int)
    assert np.abs(decoded - np.array(colour)).max() <= 3
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize("fps", [8, 24, 30000 / 1001, 12.5])
def test_frames_a_second(tmp_path: Path, fps: float) -> None:
    path = _write(tmp_path / "out.mp4", [_scene(5)], fps=fps)
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        assert float(rate) == pytest.approx(fps, rel=1e-6)


def test_the_same_frames_give_the_same_bytes_however_they_come(tmp_path: Path) -> None:
    # Noise makes the encoder decide about every block.
    scene = _scene(20) + 0.1 * torch.randn(3, 20, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    whole = _write(tmp_path / "a.mp4", [scene]).read_bytes()
    for name in ("b", "c", "d"):
        assert _write(tmp_path / f"{name}.mp4", torch.tensor_split(scene, 7, dim=1)).read_bytes() == whole


def test_the_index_comes_before_the_frames(tmp_path: Path) -> None:
    data = _write(tmp_path / "out.mp4", [_scene(5)]).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_arrays_and_tensors_are_the_same_frames(tmp_path: Path) -> None:
    pixels = to_uint8(_scene(5))
    from_tensor = _write(tmp_path / "a.mp4", [_scene(5)])
    assert _write(tmp_path / "b.mp4", [pixels]).read_bytes() == from_tensor.read_bytes()
    assert _write(tmp_path / "c.mp4", list(pixels)).read_bytes() == from_tensor.read_bytes()


def test_floats_are_cut_spread_and_truncated() -> None:
    levels = torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0, -0.9999])
    pixels = to_uint8(levels.expand(3, 1, 1, 7))
    assert pixels.shape == (1, 1, 7, 3)
    assert pixels[0, 0, :, 1].tolist() == [0, 0, 127, 254, 255, 255, 0]
    assert to_uint8(levels.expand(3, 1, 1, 7).bfloat16())[0, 0, 2].tolist() == [127, 127, 127]


def test_a_png_holds_one_frame_to_the_bit(tmp_path: Path) -> None:
    path = _write(tmp_path / "out.png", [_scene(1, 33, 17)])
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), to_uint8(_scene(1, 33, 17))[0])
    assert np.array_equal(to_uint8(read_frames(path) + 1e-6), to_uint8(_scene(1, 33, 17)))
    assert _left(tmp_path) == ["out.png"]


def test_the_count_of_frames(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4") as video:
        video.write(_scene(3))
        video.write(to_uint8(_scene(1))[0])
        assert video.count == 4


def test_an_existing_video_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"out\.mp4 exists already"):
        VideoWriter(path)
    assert path.read_bytes() == b"mine"
    _write(path, [_scene(2)], overwrite=True)
    assert read_frames(path).shape == (3, 2, HEIGHT, WIDTH)


def test_a_video_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with pytest.raises(OutputError, match="exists already"), VideoWriter(path) as video:  # noqa: PT012
        video.write(_scene(2))
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert _left(tmp_path) == ["out.mp4"]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read_frames(_write(tmp_path / "out.mp4", [_scene(3)]))
    assert capfd.readouterr() == ("", "")


# ---- what fails leaves nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit", "frames"),
    [
        ("a.mp4", 0, 4),  # nothing can be written: found when the file is finished
        ("b.mp4", 10_000, 4),  # the frames held back by the encoder do not fit
        ("c.mp4", 100_000, 80),  # full while frames are coming
        ("d.png", 2_000, 1),
    ],
)
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, name: str, limit: int, frames: int) -> None:
    generator, file = torch.Generator().manual_seed(0), tmp_path / name
    noise = (torch.rand(3, 1, 96, 96, generator=generator) * 2 - 1 for _ in range(frames))
    with pytest.raises(OutputError) as error, full_disk(limit):
        _write(file, noise)
    assert str(error.value) == f"cannot write {file}: File too large; nothing was left behind"
    assert _left(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("frames", [0, 3])
def test_an_error_between_frames_passes_and_leaves_nothing(
    tmp_path: Path, error: type[BaseException], frames: int
) -> None:
    with pytest.raises(error), VideoWriter(tmp_path / "out.mp4") as video:  # noqa: PT012
        if frames:
            video.write(_scene(frames))
        raise error
    assert _left(tmp_path) == []


def test_an_error_of_the_encoder_is_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise av.FFmpegError(-28, "No space left on device")

    monkeypatch.setattr("av.open", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*out\.mp4: No space left on device; nothing was left behind"):
        _write(tmp_path / "out.mp4", [_scene(2)])
    assert _left(tmp_path) == []


def test_an_interrupt_while_the_video_is_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "out.mp4", [_scene(2)])
    assert _left(tmp_path) == []


def test_no_frame_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out\.mp4: no frame was written, so there is no file"):
        _write(tmp_path / "out.mp4", [])
    assert _left(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "chunks", "message"),
    [
        ("a.mp4", [_scene(1, 47, 80)], "frames of 80x47: an .mp4 takes an even width and an even height only"),
        ("a.mp4", [_scene(1, 48, 81)], "frames of 81x48"),
        ("a.mp4", [_scene(1), _scene(1, 64, 64)], r"a frame is 64x64, those before are 80x48"),
        ("a.png", [_scene(2)], "a .png holds one frame; name a file that ends in .mp4"),
        ("a.mp4", [torch.zeros(1, 3, 4, 16, 16)], r"frames are torch.float32 \[1, 3, 4, 16, 16\]; a tensor of them is"),
        ("a.mp4", [torch.zeros(4, 2, 16, 16)], r"\[4, 2, 16, 16\]"),
        ("a.mp4", [torch.zeros(3, 1, 16, 16, dtype=torch.uint8)], "torch.uint8"),
        ("a.mp4", [np.zeros((16, 16, 3))], r"frames are float64 \[16, 16, 3\]; an array of them is uint8"),
        ("a.mp4", [np.zeros((16, 16), dtype=np.uint8)], r"uint8 \[16, 16\]"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tmp_path: Path, name: str, chunks: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _write(tmp_path / name, chunks)
    assert _left(tmp_path) == []


@pytest.mark.parametrize("name", ["out.avi", "out", "out.mp4.gif"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=f"{name}: a video ends in .mp4, a single frame in .mp4 or .png"):
        VideoWriter(tmp_path / name)


@pytest.mark.parametrize("fps", [0, -1.0, math.nan, math.inf])
def test_fps_that_are_none_are_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(RequestError, match=r"fps is .*; it has to be a number above 0"):
        VideoWriter(tmp_path / "out.mp4", fps=fps)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the folder .*no does not exist; create it first"):
        VideoWriter(tmp_path / "no" / "out.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match=r"folder\.mp4 exists and is not a file"):
        VideoWriter(tmp_path / "folder.mp4", overwrite=True)
    with pytest.raises(OutputError, match=r"cannot write .*: File name too long"):
        _write(tmp_path / f"{'x' * 250}.mp4", [_scene(1)])


def test_frames_outside_of_the_with_statement_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="takes frames inside its with statement only"):
        VideoWriter(tmp_path / "out.mp4").write(_scene(1))


# ---- reading --------------------------------------------------------------------------------------------------------


def _text(path: Path) -> None:
    path.write_text("not a video")


def _cut(path: Path) -> None:
    _write(path, [_scene(5)])
    path.write_bytes(path.read_bytes()[:200])


def _sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        silence: NDArray[np.float32] = np.zeros((1, 4096), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.mp4", lambda path: None, r"a\.mp4: there is no such file"),
        ("a.mp4", _text, r"a\.mp4 cannot be read as a video: Invalid data found"),
        ("a.png", _text, r"a\.png cannot be read as a video: cannot identify image file"),
        ("a.mp4", _cut, r"a\.mp4 (cannot be read as a video|holds no frame)"),
        ("a.mp4", _sound, r"a\.mp4 holds no frame of a video"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, name: str, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(MediaError, match=message):
        read_frames(tmp_path / name)


# ---- the contact sheet ----------------------------------------------------------------------------------------------


def test_a_contact_sheet_shows_the_frames_row_by_row() -> None:
    pixels = np.stack([np.full((4, 6, 3), 40 * i, dtype=np.uint8) for i in range(5)])
    sheet = np.asarray(contact_sheet(pixels, columns=3, gap=1))
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1, 3)
    assert [sheet[2, 3, 0], sheet[2, 10, 0], sheet[2, 17, 0], sheet[7, 3, 0], sheet[7, 10, 0]] == [0, 40, 80, 120, 160]
    assert sheet[7, 17].tolist() == sheet[4, 3].tolist() == [255, 255, 255]


def test_a_contact_sheet_of_few_frames_is_narrow() -> None:
    assert contact_sheet(_scene(2), columns=8, gap=0).size == (2 * WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("frames", "options"), [(_scene(2), {"columns": 0}), (_scene(2), {"gap": -1}), (_scene(0), {}), (_scene(2)[0], {})]
)
def test_a_contact_sheet_of_nothing_is_refused(frames: Tensor, options: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        contact_sheet(frames, **options)


# ---- the sidecar ----------------------------------------------------------------------------------------------------


def test_the_sidecar_lies_beside_the_video(tmp_path: Path) -> None:
    record = {"seed": 2**63, "prompt": "数字 7 向上", "versions": versions("cpu"), "seconds": {"decode": 0.5}}
    path = write_sidecar(tmp_path / "out.mp4", record)
    assert path == tmp_path / "out.mp4.json"
    assert json.loads(path.read_text(encoding="utf-8")) == record
    assert "数字" in path.read_text(encoding="utf-8")
    assert _left(tmp_path) == ["out.mp4.json"]


def test_the_versions_name_everything() -> None:
    found = versions("cpu")
    assert found["torch"] == torch.__version__
    assert sorted(found) == ["device", "python", "torch", "wan-infer"]
    assert all(found.values())


def test_a_sidecar_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "out.mp4", {"seed": 1})
    with pytest.raises(OutputError, match=r"out\.mp4\.json exists already"):
        write_sidecar(tmp_path / "out.mp4", {"seed": 2})
    path = write_sidecar(tmp_path / "out.mp4", {"seed": 3}, overwrite=True)
    assert json.loads(path.read_text()) == {"seed": 3}


@pytest.mark.parametrize("value", [math.nan, object(), {1, 2}])
def test_a_record_that_is_no_json_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(RequestError, match=r"the record for .*out\.mp4\.json cannot be written as JSON"):
        write_sidecar(tmp_path / "out.mp4", {"value": value})
    assert _left(tmp_path) == []
