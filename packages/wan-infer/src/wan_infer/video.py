"""Frames to a video and back.

::

    with VideoWriter("out.mp4", fps=16) as video:
        for chunk in chunks:  # float [3, F, H, W] in [-1, 1], on any device
            video.write(chunk)

The same frames give the same bytes, as long as PyAV stays the same.
"""

from __future__ import annotations

import math
from contextlib import suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Protocol

import av
import numpy as np
import torch
from av.codec.codec import UnknownCodecError
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .errors import MediaError, OutputError, RequestError
from .output import PartialFile, require_writable, write_errors

Frames = NDArray[np.uint8]

# crf: what imageio makes of the "quality 8" of the original. mbtree: x264's tree of macroblocks, and more threads than
# one, are two things that make the bytes of two runs differ.
_X264 = {"crf": "10", "x264-params": "mbtree=0"}
_THREADS = 1
# Without a tag, players take BT.601 for small frames and BT.709 for large ones; the number is that of ITU-T H.273.
_BT709 = 1


class VideoWriter:
    """Writes frames as they come, to an ``.mp4`` (H.264) or, if there is only one, a ``.png``.

    Used in a ``with`` statement. The file appears under its name when the block ends; if an error ends it, Ctrl-C
    included, nothing is left.

    Args:
        path: where to; its suffix decides the format.
        fps: frames a second.
        overwrite: whether a file of that name is replaced.

    Attributes:
        path: as given.
        count: frames written so far.

    Raises:
        RequestError: another suffix, or fps that is not above 0.
        OutputError: the file exists already, or its folder does not.
    """

    def __init__(self, path: Path | str, *, fps: float = 16, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.count = 0
        if self.path.suffix not in _ENCODERS:
            raise RequestError(f"{self.path}: a video ends in .mp4, a single frame in .mp4 or .png")
        if not (math.isfinite(fps) and fps > 0):
            raise RequestError(f"fps is {fps}; it has to be a number above 0")
        require_writable(self.path, overwrite=overwrite)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._overwrite = overwrite
        self._file: PartialFile | None = None
        self._encoder: _Encoder | None = None

    def __enter__(self) -> VideoWriter:
        self._file = PartialFile(self.path, overwrite=self._overwrite)
        return self

    def write(self, frames: Tensor | Frames) -> None:
        """Append frames: float `[3, F, H, W]` in [-1, 1] on any device, or uint8 `[H, W, 3]` or `[F, H, W, 3]`.

        Raises:
            RequestError: another shape or dtype, an odd height or width, a size other than before, or a second frame
                for a ``.png``.
            OutputError: the file cannot be written to, the disk being full for example.
        """
        if self._file is None:
            raise RequestError("a VideoWriter takes frames inside its with statement only")
        pixels = to_uint8(frames) if isinstance(frames, Tensor) else _checked(frames)
        for frame in pixels:
            with write_errors(self.path, *_ENCODER_ERRORS):
                if self._encoder is None:
                    self._encoder = _ENCODERS[self.path.suffix](self._file.path, frame.shape[:2], self._rate)
                self._encoder.add(frame)
            self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file, encoder = self._file, self._encoder
        self._file = self._encoder = None
        assert file is not None, "__enter__ made it"
        try:
            if kind is None:
                if encoder is None:
                    raise OutputError(f"{self.path}: no frame was written, so there is no file")
                with write_errors(self.path, *_ENCODER_ERRORS):
                    encoder.close()
                file.complete()
        finally:
            if encoder is not None:
                encoder.abandon()
            file.discard()


class _Encoder(Protocol):
    """Turns frames into one file; made when the size is known."""

    def __init__(self, path: Path, size: tuple[int, ...], rate: Fraction) -> None: ...

    def add(self, frame: Frames) -> None: ...

    def close(self) -> None:
        """Write what is still held back."""

    def abandon(self) -> None:
        """Let go of the file, complete or not, without an error."""


class _Mp4:
    def __init__(self, path: Path, size: tuple[int, ...], rate: Fraction) -> None:
        height, width = size
        if height % 2 or width % 2:
            raise RequestError(f"frames of {width}x{height}: an .mp4 takes an even width and an even height only")
        self._size = size
        # The index goes to the front, so that a browser plays before it has everything; no version string is written.
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        self._container = av.open(str(path), "w", format="mp4", options=options)
        self._stream = self._container.add_stream("libx264", rate=rate, options=_X264)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        codec = self._stream.codec_context
        codec.thread_count = _THREADS
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries = codec.color_trc = _BT709

    def add(self, frame: Frames) -> None:
        if frame.shape[:2] != self._size:
            (height, width), (first_height, first_width) = frame.shape[:2], self._size
            raise RequestError(f"a frame is {width}x{height}, those before are {first_width}x{first_height}")
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        self._container.mux(self._stream.encode(yuv))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        with suppress(OSError, *_ENCODER_ERRORS):
            self._container.close()


class _Png:
    def __init__(self, path: Path, size: tuple[int, ...], rate: Fraction) -> None:
        self._path = path
        self._done = False

    def add(self, frame: Frames) -> None:
        if self._done:
            raise RequestError("a .png holds one frame; name a file that ends in .mp4 for more")
        Image.fromarray(frame).save(self._path, format="png")
        self._done = True

    def close(self) -> None: ...

    def abandon(self) -> None: ...


_ENCODERS: dict[str, type[_Encoder]] = {".mp4": _Mp4, ".png": _Png}
_ENCODER_ERRORS = (av.FFmpegError, UnknownCodecError)


def to_uint8(frames: Tensor) -> Frames:
    """Return float frames `[3, F, H, W]` as bytes `[F, H, W, 3]`: cut to [-1, 1], spread over 0 to 255, truncated.

    Raises:
        RequestError: another shape, or no floating dtype.
    """
    if frames.ndim != 4 or frames.shape[0] != 3 or not frames.is_floating_point():
        raise RequestError(
            f"frames are {frames.dtype} {list(frames.shape)}; a tensor of them is floating, [3, frames, height, width]"
        )
    levels = (frames.float().clamp(-1, 1) + 1) / 2 * 255
    return np.asarray(levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy())


def read_frames(path: Path | str, *, every: int = 1) -> Tensor:
    """Return the frames of a video, or the one of an image, as float32 `[3, F, H, W]` in [-1, 1].

    Args:
        path: of the file.
        every: 1 for all frames, n for the first of each n; what is left out is never kept.

    Raises:
        MediaError: there is no such file, or no video in it that can be read to its end.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path}: there is no such file")
    try:
        pixels = _picture(path) if path.suffix == ".png" else _decoded(path, every)
    except (OSError, ValueError, *_ENCODER_ERRORS) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{path} cannot be read as a video: {reason}") from error
    if not pixels:
        raise MediaError(f"{path} holds no frame of a video")
    return torch.from_numpy(np.stack(pixels)).permute(3, 0, 1, 2).float() / 127.5 - 1


def _picture(path: Path) -> list[Frames]:
    with Image.open(path) as picture:
        return [np.array(picture.convert("RGB"))]


def _decoded(path: Path, every: int) -> list[Frames]:
    # An absolute path, so that no part of a name can pass for one of FFmpeg's protocols.
    with av.open(str(path.absolute())) as container:
        if not container.streams.video:
            return []
        wanted = islice(container.decode(video=0), 0, None, every)
        return [np.asarray(frame.to_ndarray(format="rgb24")) for frame in wanted]


def contact_sheet(frames: Tensor | Frames, *, columns: int = 4, gap: int = 2) -> Image.Image:
    """Return all frames side by side in one image, row by row, on white; frames as :meth:`VideoWriter.write` takes.

    Raises:
        RequestError: no frames, another shape or dtype, or fewer than one column.
    """
    pixels = to_uint8(frames) if isinstance(frames, Tensor) else _checked(frames)
    if columns < 1 or gap < 0:
        raise RequestError(f"columns is {columns} and gap is {gap}; at least 1 and at least 0 are expected")
    count, height, width, _ = pixels.shape
    if count == 0:
        raise RequestError("a contact sheet needs a frame at least")
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, frame in enumerate(pixels):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(frame), (column * (width + gap), row * (height + gap)))
    return sheet


def _checked(frames: Frames) -> Frames:
    """Return uint8 frames as `[F, H, W, 3]`."""
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-1] != 3:
        raise RequestError(
            f"frames are {frames.dtype} {list(frames.shape)}; an array of them is uint8, [height, width, 3], "
            "with the number of frames before it if there are several"
        )
    return frames if frames.ndim == 4 else frames[None]
