"""What an image file says about itself, read from its first bytes: kind, width, height. No pixel is decoded.

JPEG, PNG and WebP are read here, several times faster than a decoder is set up; everything else, and whatever is
unusual in those three, is left to Pillow. The end of the file is looked at as well: if the mark that closes the picture
is not there, the picture is decoded to see whether it is whole.

Layouts: ITU-T T.81 (JPEG), the PNG specification (W3C), the WebP container specification (RFC 9649).
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import RecordError
from ..media import LARGEST_IMAGE

PIXEL_LIMIT = 178956970
"""Pixels above which Pillow refuses an image: twice ``Image.MAX_IMAGE_PIXELS``. So does every trainer that uses it."""

_HEAD, _TAIL = 1 << 12, 1 << 16
_PNG, _JPEG, _RIFF, _IEND = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"\0\0\0\0IEND\xaeB`\x82"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_CHUNKS = 33  # behind the signature and the first chunk
_MOST_CHUNKS = 1 << 12  # that are looked through: a file of more is decoded
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_TEXT_LIMIT, _TEXTS_LIMIT = 1 << 20, 64 << 20  # Pillow's MAX_TEXT_CHUNK and MAX_TEXT_MEMORY
_DEFLATE = 1032  # the largest factor by which deflate can shrink
_JPEG_PIXELS = 512  # of a Huffman-coded picture in a byte, at most: one bit for a block of 64
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Header(NamedTuple):
    """The kind of an image (Pillow's name of the format) and its size in pixels, as stored: not turned by EXIF."""

    kind: str
    width: int
    height: int


class _Unusual(Exception):
    """A question for Pillow."""


class _File(NamedTuple):
    handle: int
    size: int
    head: bytes

    def at(self, offset: int, size: int) -> bytes:
        if offset + size <= len(self.head):
            return self.head[offset : offset + size]
        return os.pread(self.handle, size, offset)

    def tail(self, size: int) -> bytes:
        return self.at(max(0, self.size - size), min(size, self.size))


def read_header(path: str) -> Header:
    """Return what the image at ``path`` claims to be.

    Raises :class:`RecordError` with a code: ``missing_file`` (no file there), ``bad_image`` (not an image, cut short,
    or too few bytes for what it claims), ``image_bomb`` (more pixels than :data:`PIXEL_LIMIT`).
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise RecordError("is missing", code="missing_file") from None
    except OSError as error:
        raise RecordError(f"cannot be opened: {error.strerror}", code="bad_image") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise RecordError("is not a file", code="missing_file")
        file = _File(handle, status.st_size, os.read(handle, _HEAD))
        return _header(file, path)
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror}", code="bad_image") from None
    finally:
        os.close(handle)


def _header(file: _File, path: str) -> Header:
    if not file.size:
        raise RecordError("is an empty file", code="bad_image")
    if file.size > LARGEST_IMAGE:
        raise RecordError(f"is a file of {file.size} bytes, above {LARGEST_IMAGE}", code="bad_image")
    read = next((read for sign, read in _READERS if file.head.startswith(sign)), None)
    try:
        if read is None:
            raise _Unusual
        header, whole = read(file)
    except (_Unusual, struct.error):
        return pillow_header(path)
    if header.width * header.height > PIXEL_LIMIT:
        raise _bomb(header)
    if not whole:
        decode(path)
    return header


def _bomb(header: Header) -> RecordError:
    size = f"{header.width}x{header.height}"
    return RecordError(f"claims {size} pixels, more than the {PIXEL_LIMIT} that Pillow opens", code="image_bomb")


def _read_png(file: _File) -> tuple[Header, bool]:
    length, name, width, height, depth, colour = struct.unpack(">I4sIIBB", file.at(8, 18))
    (checksum,) = struct.unpack(">I", file.at(29, 4))
    if length != 13 or name != b"IHDR" or zlib.crc32(file.at(12, 17)) != checksum:
        raise _Unusual
    if depth not in _PNG_DEPTHS.get(colour, ()) or not width or not height:
        raise _Unusual
    header = Header("PNG", width, height)
    if width * height <= PIXEL_LIMIT:
        rows = (1 + (width * depth * _PNG_CHANNELS[colour] + 7) // 8) * height
        _require_bytes(file, rows // _DEFLATE, header)
    is_whole = file.tail(12) == _IEND or _IEND in file.tail(_TAIL)
    return header, is_whole and not _has_large_text(file)


def _has_large_text(file: _File) -> bool:
    """Return whether a PNG's texts and profiles, unpacked, may be larger than Pillow allows: then it has to decide."""
    offset, total = _PNG_CHUNKS, 0
    for _ in range(_MOST_CHUNKS):
        head = file.at(offset, 8)
        if len(head) < 8:
            return False  # its end is looked at elsewhere
        length, kind = struct.unpack(">I4s", head)
        if kind in _PNG_TEXTS:
            size = _unpacked_size(kind, file.at(offset + 8, min(length, 2 * _TEXT_LIMIT)))
            total += max(size, length)
            if size > _TEXT_LIMIT or total > _TEXTS_LIMIT:
                return True
        offset += 12 + length
    return True


def _unpacked_size(kind: bytes, chunk: bytes) -> int:
    """Return how many bytes the packed part of a chunk makes, at most one beyond the limit."""
    _, _, rest = chunk.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return 0
    packed = rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:]
    try:
        return len(zlib.decompressobj().decompress(packed, _TEXT_LIMIT + 1))
    except zlib.error:
        return _TEXT_LIMIT + 1  # a case for Pillow


def _read_jpeg(file: _File) -> tuple[Header, bool]:
    offset = 2
    while True:
        mark, code, length = struct.unpack(">BBH", file.at(offset, 4))
        if mark != 0xFF or length < 2:
            raise _Unusual
        if code in _FRAMES:
            break
        if code in (0xFF, 0xD9, 0xDA) or 0xD0 <= code <= 0xD7:
            raise _Unusual
        offset += 2 + length
    precision, height, width, components = struct.unpack(">BHHB", file.at(offset + 4, 6))
    if code not in _HUFFMAN_FRAMES or precision != 8 or components not in (1, 3, 4) or not width or not height:
        raise _Unusual
    header = Header("JPEG", width, height)
    _require_bytes(file, width * height // _JPEG_PIXELS, header)
    return header, file.tail(2) == b"\xff\xd9" or b"\xff\xd9" in file.tail(_TAIL)


def _read_webp(file: _File) -> tuple[Header, bool]:
    size, webp, kind = struct.unpack("<I4s4s", file.at(4, 12))
    if webp != b"WEBP":
        raise _Unusual
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(file.at(offset, 3), "little") for offset in (24, 27))
    elif kind == b"VP8L" and file.at(20, 1) == b"\x2f":
        (bits,) = struct.unpack("<I", file.at(21, 4))
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and file.at(23, 3) == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", file.at(26, 4)))
    else:
        raise _Unusual
    if not width or not height:
        raise _Unusual
    return Header("WEBP", width, height), 8 + size <= file.size


_READERS: tuple[tuple[bytes, Callable[[_File], tuple[Header, bool]]], ...] = (
    (_JPEG, _read_jpeg),
    (_PNG, _read_png),
    (_RIFF, _read_webp),
)


def _require_bytes(file: _File, least: int, header: Header) -> None:
    """Raise if no picture of this size fits into the file: a decoder would reserve memory for a claim."""
    if file.size < least:
        size = f"{header.width}x{header.height}"
        raise RecordError(f"claims {size} pixels, which {file.size} bytes cannot hold", code="bad_image")


def pillow_header(path: str) -> Header:
    """Return what Pillow takes an image for, or raise as :func:`read_header` does."""
    return _opened(path, load=False)


def decode(path: str) -> Header:
    """Decode every pixel of an image of a sane size, or raise as :func:`read_header` does."""
    return _opened(path, load=True)


def _opened(path: str, *, load: bool) -> Header:
    from PIL import Image, UnidentifiedImageError

    size = Path(path).stat().st_size
    if size > LARGEST_IMAGE:
        raise RecordError(f"is a file of {size} bytes; files above {LARGEST_IMAGE} are not decoded", code="bad_image")
    faults = (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, MemoryError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                header = Header(image.format or "", image.width, image.height)
                if load:
                    image.load()
    except Image.DecompressionBombError as error:
        raise RecordError(f"claims too many pixels: {error}", code="image_bomb") from None
    except UnidentifiedImageError:
        raise RecordError("is not an image that Pillow knows", code="bad_image") from None
    except (*faults, RuntimeError, struct.error, zlib.error) as error:
        raise RecordError(f"cannot be read as an image: {error}", code="bad_image") from None
    return header
