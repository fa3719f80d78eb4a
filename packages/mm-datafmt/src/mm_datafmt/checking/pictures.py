"""The files that a data set names, looked at as ``check`` does: header, extension, size; or every pixel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import OptionError, RecordError, shown
from ..media import LONGEST_PATH, MediaFolder, missing
from .headers import Header, decode, read_header

LOOKS = ("header", "decode", "exists", "none")
"""How closely ``check`` looks at media: an image's header, all its pixels, whether it exists, or not at all."""

_REMEMBERED = 1 << 17
_CHUNK = 32
_KINDS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), ("JPEG", "MPO")),
    ".png": ("PNG",),
    ".webp": ("WEBP",),
    ".gif": ("GIF",),
    ".bmp": ("BMP", "DIB"),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
}


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """Limits in pixels on an image's sides, and on long side ÷ short side. None: no limit."""

    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_side", "max_side", "max_aspect"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; it must be at least 1")

    def faults_of(self, header: Header) -> Iterator[RecordError]:
        """Yield the limits that an image breaks: ``image_small``, ``image_large``, ``image_aspect``."""
        sides = sorted(header[1:])
        given = f"is {header.width}x{header.height}"
        if self.min_side is not None and sides[0] < self.min_side:
            yield RecordError(f"{given}; --min_side is {self.min_side}", code="image_small")
        if self.max_side is not None and sides[1] > self.max_side:
            yield RecordError(f"{given}; --max_side is {self.max_side}", code="image_large")
        if self.max_aspect is not None and sides[1] > self.max_aspect * sides[0]:
            yield RecordError(f"{given}; --max_aspect is {self.max_aspect:g}", code="image_aspect")


class Picture(NamedTuple):
    """What was seen of an image: its path as stored or why it cannot be used, and its size (0 where unknown)."""

    stored: str | RecordError
    width: int = 0
    height: int = 0


class CheckedMedia(MediaFolder):
    """A folder of media whose images are looked at as ``look`` says (:data:`LOOKS`), each once.

    ``refusal`` says why a size cannot be trained on, if so; faults with a code in ``ignored`` are passed over.
    """

    def __init__(
        self,
        folder: Path,
        *,
        look: str,
        limits: SizeLimits,
        refusal: Callable[[int, int], str | None],
        ignored: Collection[str] = (),
    ) -> None:
        if look not in LOOKS:
            raise OptionError(f"media is {look!r}; legal are {', '.join(LOOKS)}")
        super().__init__(folder, folder, check=look if look in ("exists", "none") else "verify")
        self._read = {"header": read_header, "decode": _decoded}.get(look)
        self._limits, self._refusal, self._ignored = limits, refusal, ignored
        self._seen: dict[str, Picture] = {}
        self.image = lambda path: self.picture(path).stored

    @property
    def looks_inside(self) -> bool:
        """Whether image files are opened."""
        return self._read is not None

    def file_of(self, path: str) -> str | None:
        """Return the full path of a file that may be opened, None if there is none inside the folder."""
        try:
            return self._file(path)
        except RecordError:
            return None

    def picture(self, path: str) -> Picture:
        """Return what there is to see of an image."""
        seen = self._seen.get(path)
        if seen is None:
            self._remember([path], [seen := self._look(path)])
        return seen

    def look_ahead(self, paths: Iterable[str], pool: Executor | None) -> None:
        """Look at images that :meth:`picture` will be asked for, many at a time."""
        if pool is None:
            return
        new = [path for path in dict.fromkeys(paths) if path not in self._seen][:_REMEMBERED]
        chunks = [new[start : start + _CHUNK] for start in range(0, len(new), _CHUNK)]
        for chunk, pictures in zip(chunks, pool.map(self._look_at_all, chunks), strict=True):
            self._remember(chunk, pictures)

    def _look_at_all(self, paths: list[str]) -> list[Picture]:
        return [self._look(path) for path in paths]

    def _remember(self, paths: list[str], pictures: list[Picture]) -> None:
        for path, picture in zip(paths, pictures, strict=True):
            if len(path) <= LONGEST_PATH:  # what is longer than any path would fill the memory
                self._seen[path] = picture
        while len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]

    def _look(self, path: str) -> Picture:
        try:
            if self._read is None:
                return Picture(self._stored(self._file(path), path))
            file = self._place(path)
            header = self._header(self._read, file, path)
            return Picture(self._stored(file, path), header.width, header.height)
        except RecordError as fault:
            return Picture(fault.with_traceback(None))

    def _header(self, read: Callable[[str], Header], file: str, path: str) -> Header:
        try:
            header = read(file)
            for fault in self._faults_of(header, path):
                if fault.code not in self._ignored:
                    raise fault
        except RecordError as fault:
            if fault.code == "missing_file":
                raise missing(path, file) from None
            raise RecordError(f"image {shown(path)} {fault}", code=fault.code) from None
        return header

    def _faults_of(self, header: Header, path: str) -> Iterator[RecordError]:
        dot = path.rfind(".")
        kinds = _KINDS.get(path[dot:].lower()) if dot >= 0 else None
        if kinds is not None and header.kind not in kinds:
            yield RecordError(f"is a {header.kind} file; rename it or save it as {kinds[0]}", code="image_type")
        yield from self._limits.faults_of(header)
        refused = self._refusal(header.width, header.height)
        if refused is not None:
            yield RecordError(f"cannot be trained on: {refused}", code="image_aspect")


def _decoded(file: str) -> Header:
    header = read_header(file)
    decode(file)
    return header
