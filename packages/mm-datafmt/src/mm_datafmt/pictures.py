"""The pictures that a trainer would find, and the size at which the model sees them. No pixel is decoded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from .checking.headers import Header, read_header
from .errors import RecordError, shown
from .media import MediaFolder

PIXEL_CAP = 262144
"""``image_max_pixels`` in the published MindSpeed MM configurations of Qwen2.5-VL (512 x 512)."""

_FACTOR = 28
_REMEMBERED = 1 << 17


def token_count(size: tuple[int, int]) -> int:
    """Return the tokens of a picture whose resized ``size`` is given."""
    return (size[0] // _FACTOR) * (size[1] // _FACTOR)


class PictureFolder:
    """The pictures under one folder, by the paths that samples give. Headers are remembered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._media = MediaFolder(folder, folder, check="exists")
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._look)

    def __call__(self, path: str) -> Header | RecordError:
        """Return the header of the picture at ``path``, or why it cannot be used (codes as in ``check``)."""
        return self._remembered(path)

    def file(self, path: str) -> Path | RecordError:
        """Return the file at ``path``, or why there is none inside the folder."""
        stored = self._media.image(path)
        return stored if isinstance(stored, RecordError) else self._folder / stored

    def _look(self, path: str) -> Header | RecordError:
        file = self.file(path)
        if isinstance(file, RecordError):
            return file
        try:
            return read_header(str(file))
        except RecordError as fault:
            return RecordError(f"image {shown(path)} {fault}", code=fault.code)
