"""The files that samples name: where they are, how they are stored, and whether they can be opened."""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from .errors import FolderError, OptionError, RecordError, shown

_REMEMBERED = 1 << 17
_PLAIN = re.compile(r"[\w-][\w .-]*(?:/[\w-][\w .-]*)*", re.ASCII)  # nothing to resolve, on no system

MEDIA_CHECKS = ("verify", "exists", "none")
"""How closely media are looked at: opened and verified, looked for, or not at all (paths are checked as text)."""

LARGEST_IMAGE = 128 << 20
"""Largest image file in bytes that is opened: Pillow reads some kinds whole, and others byte by byte."""

LONGEST_PATH = 4096  # Linux's PATH_MAX; other systems allow less


class MediaFolder:
    """Media paths relative to ``image_dir``, to be stored relative to ``dataset_dir``.

    ``check`` is one of :data:`MEDIA_CHECKS`. Raises :class:`FolderError` where either is not a folder. Verdicts are
    remembered: sets in the manner of LLaVA name each image several times.
    """

    def __init__(self, image_dir: Path, dataset_dir: Path, *, check: str = "verify") -> None:
        if check not in MEDIA_CHECKS:
            raise OptionError(f"check is {check!r}; legal are {', '.join(MEDIA_CHECKS)}")
        for name, folder in (("image_dir", image_dir), ("dataset_dir", dataset_dir)):
            if not folder.is_dir():
                raise FolderError(f"{name} {shown(str(folder), 300)} is not an existing folder")
        self._image_dir = _absolute(image_dir)
        self._dataset_dir = _absolute(dataset_dir)
        self._check = check
        self._prefix = self._image_dir.rstrip("/") + "/"
        root = self._dataset_dir.rstrip("/") + "/"
        # How a path that needs no resolving is stored: with this before it, if one folder is within the other.
        self._stored_prefix = self._prefix[len(root) :] if self._prefix.startswith(root) else None
        # Each returns the stored form of a path, or why it cannot be used; of images alone the content is looked at.
        self.image: Callable[[str], str | RecordError] = self._remembering("image")
        self.video: Callable[[str], str | RecordError] = self._remembering("video")
        self.audio: Callable[[str], str | RecordError] = self._remembering("audio")

    def _remembering(self, kind: str) -> Callable[[str], str | RecordError]:
        remembered = lru_cache(maxsize=_REMEMBERED)(partial(self._judge, kind))
        # What is longer than any path would fill the memory.
        return lambda path: remembered(path) if len(path) <= LONGEST_PATH else self._judge(kind, path)

    def _judge(self, kind: str, path: str) -> str | RecordError:
        if self._check == "none" and self._stored_prefix is not None and _PLAIN.fullmatch(path):
            return self._stored_prefix + path
        try:
            file = self._file(path)
            if self._check == "verify":
                self._verify(file, path, kind)
            return self._stored(file, path)
        except RecordError as fault:
            return fault.with_traceback(None)  # the frames would be remembered with it

    def _verify(self, file: str, path: str, kind: str) -> None:
        if kind == "image" and (fault := _image_fault(file)) is not None:
            raise RecordError(f"image {shown(path)} {fault}", code="bad_image")
        if kind != "image" and not Path(file).stat().st_size:
            raise RecordError(f"{kind} {shown(path)} is an empty file", code=f"bad_{kind}")

    def _place(self, path: str) -> str:
        """Return the full path that ``path`` means, inside ``image_dir``; ``..`` is resolved as text."""
        if _PLAIN.fullmatch(path):
            file = self._prefix + path
        else:
            file = os.path.normpath(os.path.join(self._image_dir, path))  # noqa: PTH118 - pathlib keeps ".."
        if not _is_inside(file, self._image_dir):
            raise RecordError(
                f"path {shown(path)} leads out of the folder {shown(self._image_dir, 300)}; "
                "paths must be relative to image_dir and stay inside it",
                code="path_escapes",
            )
        return file

    def _file(self, path: str) -> str:
        """Return the full path of an existing file inside ``image_dir``."""
        file = self._place(path)
        if self._check == "none":
            return file
        # False also for a NUL, a lone surrogate, a name too long, a loop of links.
        if not os.path.isfile(file):  # noqa: PTH113 - pathlib takes several times as long
            raise missing(path, file)
        return file

    def _stored(self, file: str, path: str) -> str:
        if _is_inside(file, self._dataset_dir):
            return file[len(self._dataset_dir.rstrip(os.sep)) + 1 :].replace(os.sep, "/")
        # As written it is outside; is it, once links are followed?
        place, folder = Path(file).resolve(), Path(self._dataset_dir).resolve()
        if place.is_relative_to(folder):
            return place.relative_to(folder).as_posix()
        raise RecordError(
            f"{shown(path)} is {shown(file, 300)}, outside the dataset folder {shown(self._dataset_dir, 300)}: "
            "an absolute path would not survive a move; set --dataset_dir to a folder that holds the images",
            code="outside_dataset_dir",
        )


def missing(path: str, file: str) -> RecordError:
    """Return the fault of a ``path`` that would be ``file``, where there is none."""
    return RecordError(f"{shown(path)} is missing: no file {shown(file, 300)}", code="missing_file")


def _is_inside(file: str, folder: str) -> bool:
    """Return whether a normal path lies in a folder, as text: pathlib would take as long as decoding the record."""
    return file.startswith(folder.rstrip(os.sep) + os.sep)


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
            with Path(file).open("rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                if size > LARGEST_IMAGE:
                    return f"is a file of {size} bytes; files above {LARGEST_IMAGE} are not opened"
                with Image.open(handle) as image:
                    image.verify()
    except Image.DecompressionBombError as error:
        return f"claims too many pixels: {error}"
    except UnidentifiedImageError:
        return "is not an image that Pillow knows"
    except (*faults, RuntimeError, struct.error, zlib.error) as error:
        return f"cannot be read as an image: {error}"
    return None
