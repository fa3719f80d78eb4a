"""The files that samples name: where they are, how they are stored, and whether they can be opened."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from functools import lru_cache
from pathlib import Path, PurePath

from .errors import FolderError, RecordError, shown

_REMEMBERED = 1 << 17


class MediaFolder:
    """Media paths relative to ``image_dir``, to be stored relative to ``dataset_dir``.

    Raises :class:`FolderError` where either is not a folder. Verdicts are remembered: sets in the manner of LLaVA
    name each image several times.
    """

    def __init__(self, image_dir: Path, dataset_dir: Path) -> None:
        for name, folder in (("image_dir", image_dir), ("dataset_dir", dataset_dir)):
            if not folder.is_dir():
                raise FolderError(f"{name} {shown(str(folder), 300)} is not an existing folder")
        self._image_dir = _absolute(image_dir)
        self._dataset_dir = _absolute(dataset_dir)
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._judge)

    def image(self, path: str) -> str | RecordError:
        """Return the stored form of an image's ``path``, or why it cannot be used."""
        return self._remembered(path, True)

    def video(self, path: str) -> str | RecordError:
        """Return the stored form of a video's ``path``, or why not; its content is not looked at."""
        return self._remembered(path, False)

    def _judge(self, path: str, is_image: bool) -> str | RecordError:
        try:
            file = self._file(path)
            if is_image and (fault := _image_fault(file)) is not None:
                raise RecordError(f"image {shown(path)} {fault}", code="bad_image")
            if not is_image and not Path(file).stat().st_size:
                raise RecordError(f"video {shown(path)} is an empty file", code="bad_video")
            return self._stored(file, path)
        except RecordError as fault:
            return fault.with_traceback(None)  # the frames would be remembered with it

    def _file(self, path: str) -> str:
        """Return the full path of an existing file inside ``image_dir``; ``..`` is resolved as text."""
        file = os.path.normpath(os.path.join(self._image_dir, path))  # noqa: PTH118 - pathlib keeps ".."
        if not PurePath(file).is_relative_to(self._image_dir):
            raise RecordError(
                f"path {shown(path)} leads out of the folder {shown(self._image_dir, 300)}; "
                "paths must be relative to image_dir and stay inside it",
                code="path_escapes",
            )
        try:
            found = Path(file).is_file()
        except (OSError, ValueError):  # a NUL, a lone surrogate, a name too long, a loop of links
            found = False
        if not found:
            raise RecordError(f"{shown(path)} is missing: no file {shown(file, 300)}", code="missing_file")
        return file

    def _stored(self, file: str, path: str) -> str:
        place, folder = Path(file), Path(self._dataset_dir)
        if not place.is_relative_to(folder):  # as written it is outside; is it, once links are followed?
            place, folder = place.resolve(), folder.resolve()
        if place.is_relative_to(folder):
            return place.relative_to(folder).as_posix()
        raise RecordError(
            f"{shown(path)} is {shown(file, 300)}, outside the dataset folder {shown(self._dataset_dir, 300)}: "
            "an absolute path would not survive a move; set --dataset_dir to a folder that holds the images",
            code="outside_dataset_dir",
        )


def _absolute(folder: Path) -> str:
    return os.path.abspath(folder)  # noqa: PTH100 - links must stay: data sets are linked together


def _image_fault(file: str) -> str | None:
    """Return what is wrong with an image, or None. Reads the header and lets Pillow verify the file; decodes no pixel.

    Pillow refuses a header that claims more than twice ``Image.MAX_IMAGE_PIXELS``; so would the trainer. Its warnings,
    among them the one between that limit and its double, concern images that can be trained on.
    """
    from PIL import Image, UnidentifiedImageError

    faults = (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Path(file).open("rb") as handle, Image.open(handle) as image:
                image.verify()
    except Image.DecompressionBombError as error:
        return f"claims too many pixels: {error}"
    except UnidentifiedImageError:
        return "is not an image that Pillow knows"
    except (*faults, RuntimeError, struct.error, zlib.error) as error:
        return f"cannot be read as an image: {error}"
    return None
