"""Video files as patches: frames at a rate, at most so many, two of them in each step of the grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_finetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mm_finetune.images import ImageReader


@dataclass(frozen=True)
class VideoInputs:
    """The videos of one record.

    Attributes:
        pixel_values_videos: ``[patches, width]`` float32, the patches of all videos in order.
        video_grid_thw: ``[videos, 3]`` int64: patches in time, down and across.
        second_per_grid_ts: for each video the seconds between two steps of its grid.
    """

    pixel_values_videos: Tensor
    video_grid_thw: Tensor
    second_per_grid_ts: tuple[float, ...]


@dataclass(frozen=True)
class VideoHeader:
    """What a container says of its first video stream: size in pixels, number of frames, seconds."""

    width: int
    height: int
    frames: int
    seconds: float


@dataclass(frozen=True)
class VideoPlan:
    """Which frames are taken and what they become.

    Attributes:
        indices: numbers of the frames that are taken, not falling; an even number, the last one twice if need be.
        grid: patches in time, down and across.
        second_per_grid: seconds between two steps of the grid.
    """

    indices: tuple[int, ...]
    grid: tuple[int, int, int]
    second_per_grid: float


class VideoReader:
    """Reads videos with PyAV.

    Args:
        frames: reads a frame as a picture, with the limits of frames.
        fps: frames taken of a second.
        maxlen: most frames taken.
    """

    def __init__(self, frames: ImageReader, *, fps: float, maxlen: int) -> None:
        self._frames, self._fps, self._maxlen = frames, fps, maxlen

    @property
    def settings(self) -> tuple[object, ...]:
        """All that the grids depend on."""
        return (*self._frames.settings, self._fps, self._maxlen)

    def plan(self, header: VideoHeader, name: str) -> VideoPlan:
        """Choose the frames, as MindSpeed MM does: evenly, first and last included.

        Raises:
            DataError: the video, called `name`, is too long for its width.
        """
        taken = min(header.frames, self._maxlen, max(1, int(header.seconds * self._fps)))
        indices = spread(header.frames, taken)
        rate = taken / header.seconds if header.seconds > 0 else self._fps
        even = indices + indices[-1:] * (taken % 2)
        _, down, across = self._frames.grid(header.width, header.height, name)
        return VideoPlan(even, (len(even) // 2, down, across), 2 / rate)

    def patches(self, path: Path) -> tuple[Tensor, tuple[int, int, int]]:
        """``[patches, width]`` float32 of a video, and its grid.

        Raises:
            DataError: names the video that is missing or damaged.
            ConfigError: PyAV is not installed.
        """
        import torch

        plan = self.plan(read_header(path), str(path))
        pictures = _pictures(path, plan.indices)
        single = [self._frames.patches(picture, str(path))[0] for picture in pictures]
        # A picture's patches hold it twice, once for each of two times: the second one gives way to the next frame.
        width = single[0].shape[1] // 3
        halves = [patches.view(-1, 3, 2, width // 2) for patches in single]
        steps = [
            torch.stack([first[:, :, 0], second[:, :, 1]], dim=2).flatten(1)
            for first, second in zip(halves[::2], halves[1::2], strict=True)
        ]
        return torch.cat(steps), plan.grid


def spread(total: int, taken: int) -> tuple[int, ...]:
    """`taken` numbers from 0 to `total` - 1, evenly, both ends included; one alone is the first."""
    import numpy as np

    # numpy's own rounding, because it is that of the trainers that this is compared with.
    return tuple(np.linspace(0, total - 1, taken).astype(int).tolist())


def read_header(path: Path) -> VideoHeader:
    """What a video says of itself; packets are counted where the container does not say how many there are.

    Raises:
        DataError: names the video that is missing or damaged.
        ConfigError: PyAV is not installed.
    """
    with _stream(path) as (container, stream):
        frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        if not frames:
            raise DataError(f"video {path} has no frames")
        if not stream.width or not stream.height:  # text is taken for a film of a terminal
            raise DataError(f"video {path} has no size; is it a video?")
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (container.duration or 0) / 1e6
        return VideoHeader(stream.width, stream.height, frames, seconds)


def _pictures(path: Path, indices: Sequence[int]) -> list[Image]:
    """The frames of these numbers; where the file holds fewer than it said, the last one stands in."""
    wanted = set(indices)
    found: dict[int, Image] = {}
    with _stream(path) as (container, stream):
        last = None
        for number, frame in enumerate(container.decode(stream)):
            last = frame
            if number in wanted:
                found[number] = frame.to_image()
            if number >= indices[-1]:
                break
        if last is None:
            raise DataError(f"video {path} has no frames")
        stand_in = last.to_image()
    return [found.get(number, stand_in) for number in indices]


@contextmanager
def _stream(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ConfigError("videos need PyAV: pip install 'mm-finetune[video]'") from error
    if not path.is_file():
        raise DataError(f"video {path} does not exist; is the dataset folder right?")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"video {path} has no pictures, only sound")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"video {path} can't be read: {error}") from error
