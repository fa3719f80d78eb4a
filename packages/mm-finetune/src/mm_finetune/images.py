"""Picture files as the patches that Qwen2.5-VL's vision tower reads, and what they cost, from their size alone."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_finetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CONFIG_FILE = "preprocessor_config.json"
MAX_ASPECT, CAPPED_ASPECT = 200, 180  # the trainers' step before the processor shortens longer pictures to the latter


@dataclass(frozen=True)
class ImageInputs:
    """The pictures of one record.

    Attributes:
        pixel_values: ``[patches, channels * temporal_patch * patch * patch]`` float32 (1176 wide in Qwen2.5-VL),
            the patches of all pictures in order.
        image_grid_thw: ``[images, 3]`` int64: patches in time (1), down and across.
        token_counts: for each picture the tokens it becomes in the decoder (patches / merge_size²).
    """

    pixel_values: Tensor
    image_grid_thw: Tensor
    token_counts: tuple[int, ...]


class ImageReader:
    """Reads pictures as the processor of a model folder does: RGB, resized to whole patches, normalised.

    Args:
        hf_dir: Hugging Face folder with ``preprocessor_config.json``.
        min_pixels: area that smaller pictures are enlarged to; default: what the folder says.
        max_pixels: area that larger pictures are reduced to; default: what the folder says. Both mean what they mean
            in transformers' processor.
        pixel_cap: area that larger pictures are reduced to before that, as MindSpeed MM and LLaMA-Factory do
            (their ``image_max_pixels``): sides are cut to whole pixels, at least 28 and at most 200 times the other.
        resample: of that step, ``bicubic`` or ``nearest``.

    Raises:
        ConfigError: there is no readable ``preprocessor_config.json``, or the limits contradict each other.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        pixel_cap: int | None = None,
        resample: str = "bicubic",
    ) -> None:
        self._processor = _processor(Path(hf_dir))
        size = self._processor.size
        low = size["shortest_edge"] if min_pixels is None else min_pixels
        high = size["longest_edge"] if max_pixels is None else max_pixels
        if not 1 <= low <= high:
            raise ConfigError(
                f"pictures are limited to {low} to {high} pixels; min_pixels must be 1 or more and not above max_pixels"
            )
        self._size = {"shortest_edge": low, "longest_edge": high}
        self._pixel_cap, self._resample = pixel_cap, resample
        self.merge_size: int = self._processor.merge_size
        self.patch_size: int = self._processor.patch_size
        self.patch_width: int = 3 * self._processor.temporal_patch_size * self.patch_size**2

    @property
    def min_pixels(self) -> int:
        """Area that smaller pictures are enlarged to."""
        return int(self._size["shortest_edge"])

    @property
    def settings(self) -> tuple[object, ...]:
        """All that the grids depend on."""
        return (*self._size.values(), self._pixel_cap, self.patch_size, self.merge_size)

    def __call__(self, paths: Sequence[Path]) -> ImageInputs:
        """Read the pictures of one record, at least one.

        Raises:
            DataError: names the picture that is missing, damaged, or more than 200 times as long as wide.
        """
        import torch

        read = [self.read(path) for path in paths]
        grids = torch.cat([grid for _, grid in read])
        counts = grids.prod(dim=1) // self.merge_size**2
        return ImageInputs(torch.cat([patches for patches, _ in read]), grids, tuple(counts.tolist()))

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        """``[patches, width]`` float32 of a picture file, and its grid ``[1, 3]``.

        Raises:
            DataError: as above.
        """
        return self.patches(read_rgb(path), str(path))

    def patches(self, picture: Image, name: str) -> tuple[Tensor, Tensor]:
        """``[patches, width]`` float32 of one picture, and its grid ``[1, 3]``.

        Raises:
            DataError: the picture, called `name`, is too long for its width.
        """
        capped = self._capped(*picture.size, name)
        if capped != picture.size:
            picture = picture.resize(capped, _resampling(self._resample))
        try:
            features = self._processor(images=picture, size=self._size, return_tensors="pt")
        except ValueError as error:
            raise _unfit(name, picture.size, error) from error
        return features["pixel_values"].float(), features["image_grid_thw"].long()

    def grid(self, width: int, height: int, name: str) -> tuple[int, int, int]:
        """Patches in time, down and across that a picture of a size becomes; no pixel is read.

        Raises:
            DataError: the picture, called `name`, is too long for its width.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        capped_width, capped_height = self._capped(width, height, name)
        try:
            down, across = smart_resize(
                capped_height,
                capped_width,
                factor=self.patch_size * self.merge_size,
                min_pixels=self._size["shortest_edge"],
                max_pixels=self._size["longest_edge"],
            )
        except ValueError as error:
            raise _unfit(name, (width, height), error) from error
        return 1, down // self.patch_size, across // self.patch_size

    def _capped(self, width: int, height: int, name: str) -> tuple[int, int]:
        """The size after the step before the processor; the same without a cap."""
        if self._pixel_cap is None:
            return width, height
        factor = self.patch_size * self.merge_size
        if width * height > self._pixel_cap:
            scale = math.sqrt(self._pixel_cap / (width * height))
            width, height = int(width * scale), int(height * scale)
        if not width or not height:
            raise DataError(f"{name} is so thin that data.pixel_cap {self._pixel_cap} leaves nothing of it; crop it")
        width, height = max(width, factor), max(height, factor)
        if width > MAX_ASPECT * height:
            width = CAPPED_ASPECT * height
        elif height > MAX_ASPECT * width:
            height = CAPPED_ASPECT * width
        return width, height


def image_size(path: Path) -> tuple[int, int]:
    """Width and height that a picture file claims; only its header is read.

    Raises:
        DataError: names the picture that is missing or damaged.
    """
    with opened(path) as picture:
        size: tuple[int, int] = picture.size
        return size


def read_rgb(path: Path, content: bytes | None = None) -> Image:
    """Read a picture as RGB.

    Args:
        path: the file, or with `content` what messages call it.
        content: the bytes of a picture that is in no file of its own.

    Raises:
        DataError: names the picture that is missing or damaged.
    """
    with opened(path, content) as picture:
        try:
            rgb: Image = picture.convert("RGB")
            return rgb
        except _faults() as error:
            raise _unreadable(path, error) from error


def opened(path: Path, content: bytes | None = None) -> Image:
    """Open a picture; its pixels are not read yet. The arguments are those of :func:`read_rgb`.

    Raises:
        DataError: names the picture that is missing or damaged.
    """
    from PIL import Image

    try:
        return Image.open(path if content is None else io.BytesIO(content))
    except _faults() as error:
        raise _unreadable(path, error) from error


def _faults() -> tuple[type[Exception], ...]:
    # Pillow reports damage as one of these, depending on the format and on where the damage is.
    from PIL import Image

    usual = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError)
    return (*usual, struct.error, zlib.error, Image.DecompressionBombError)


def _unreadable(path: Path, error: Exception) -> DataError:
    missing = isinstance(error, FileNotFoundError)
    reason = "does not exist; is the dataset folder right?" if missing else f"can't be read: {error}"
    return DataError(f"picture {path} {reason}")


def _unfit(name: str, size: tuple[int, int], error: ValueError) -> DataError:
    return DataError(f"{name} ({size[0]} x {size[1]}) does not fit the model: {error}")


def _resampling(name: str) -> Any:
    from PIL import Image

    return {"bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}[name]


def _processor(hf_dir: Path) -> Any:
    # The class is named: the automatic choice needs torchvision, or warns that it is missing.
    from transformers import Qwen2VLImageProcessorPil

    if not (hf_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{hf_dir} has no {CONFIG_FILE}; give the folder of a Qwen2.5-VL model")
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(hf_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{hf_dir / CONFIG_FILE} can't be used: {error}") from error
