"""Picture files as the patches that Qwen2.5-VL's vision tower reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_finetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CONFIG_FILE = "preprocessor_config.json"


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

    Raises:
        ConfigError: there is no readable ``preprocessor_config.json``, or the limits contradict each other.
    """

    def __init__(self, hf_dir: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        self._processor = _processor(Path(hf_dir))
        size = self._processor.size
        low = size["shortest_edge"] if min_pixels is None else min_pixels
        high = size["longest_edge"] if max_pixels is None else max_pixels
        if not 1 <= low <= high:
            raise ConfigError(
                f"pictures are limited to {low} to {high} pixels; min_pixels must be 1 or more and not above max_pixels"
            )
        self._size = {"shortest_edge": low, "longest_edge": high}

    def __call__(self, paths: Sequence[Path]) -> ImageInputs:
        """Read the pictures of one record, at least one.

        Raises:
            DataError: names the picture that is missing, damaged, or more than 200 times as long as wide.
        """
        import torch

        read = [self._patches(path) for path in paths]
        grids = torch.cat([grid for _, grid in read])
        counts = grids.prod(dim=1) // self._processor.merge_size**2
        return ImageInputs(torch.cat([patches for patches, _ in read]), grids, tuple(counts.tolist()))

    def _patches(self, path: Path) -> tuple[Tensor, Tensor]:
        picture = read_rgb(path)
        try:
            features = self._processor(images=picture, size=self._size, return_tensors="pt")
        except ValueError as error:
            width, height = picture.size
            raise DataError(f"{path} ({width} x {height}) does not fit the model: {error}") from error
        return features["pixel_values"].float(), features["image_grid_thw"].long()


def _processor(hf_dir: Path) -> Any:
    # The class is named: the automatic choice needs torchvision, or warns that it is missing.
    from transformers import Qwen2VLImageProcessorPil

    if not (hf_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{hf_dir} has no {CONFIG_FILE}; give the folder of a Qwen2.5-VL model")
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(hf_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{hf_dir / CONFIG_FILE} can't be used: {error}") from error


def read_rgb(path: Path) -> Image:
    """Open a picture file as RGB.

    Raises:
        DataError: names the picture that is missing or damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            rgb: Image.Image = picture.convert("RGB")
            return rgb
    # Pillow reports damage as OSError, ValueError, SyntaxError or EOFError, depending on the format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "does not exist; is the dataset folder right?" if missing else f"can't be read: {error}"
        raise DataError(f"picture {path} {reason}") from error
