"""Image files as ``check`` looks at them: headers beside Pillow's answer, damage, claims, extensions, limits."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_datafmt import check
from mm_datafmt.checking.headers import PIXEL_LIMIT, Header, pillow_header, read_header
from mm_datafmt.checking.pictures import SizeLimits
from mm_datafmt.errors import RecordError

WriteFile = Callable[..., Path]


def save(path: Path, size: tuple[int, int] = (37, 23), mode: str = "RGB", **options: Any) -> Path:
    Image.effect_noise(size, 60).convert(mode).save(path, **options)
    return path


def code_of(path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        read_header(str(path))
    return caught.value.code


def codes(path: Path, folder: Path, **arguments: object) -> list[str]:
    return [problem.code for problem in check(path, dataset_dir=folder, **arguments).problems]  # type: ignore[arg-type]


def naming(*names: str) -> list[dict[str, object]]:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    return [{"image": name, "conversations": turns} for name in names]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {}),
        ("a.jpg", "L", {}),
        ("a.jpg", "CMYK", {}),
        ("a.jpg", "RGB", {"progressive": True}),
        ("a.jpg", "RGB", {"exif": b"Exif\0\0" + b"x" * 60_000, "icc_profile": b"p" * 200_000}),
        ("a.png", "RGB", {}),
        ("a.png", "P", {}),
        ("a.png", "1", {}),
        ("a.png", "LA", {}),
        ("a.png", "I;16", {}),
        ("a.webp", "RGB", {}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.webp", "RGBA", {"exif": b"Exif\0\0" + b"x" * 99}),
        ("a.gif", "P", {}),
        ("a.bmp", "RGB", {}),
        ("a.tif", "RGB", {}),
    ],
)
def test_the_header_says_what_was_saved(tmp_path: Path, name: str, mode: str, options: dict[str, Any]) -> None:
    if mode == "I;16":
        Image.new("I;16", (37, 23)).save(tmp_path / name)
    else:
        save(tmp_path / name, mode=mode, **options)
    kinds = {"jpg": "JPEG", "tif": "TIFF"}
    expected = Header(kinds.get(name[2:], name[2:].upper()), 37, 23)
    assert read_header(str(tmp_path / name)) == pillow_header(str(tmp_path / name)) == expected


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.98])
def test_a_file_that_is_cut_short(tmp_path: Path, name: str, kept: float) -> None:
    path = save(tmp_path / name, (200, 150))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert code_of(path) == "bad_image"


def test_what_follows_the_picture_does_no_harm(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp"):
        path = save(tmp_path / name)
        path.write_bytes(path.read_bytes() + b"\0" * 100)
        assert read_header(str(path))[1:] == (37, 23)


def test_an_exif_orientation_does_not_turn_the_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = save(tmp_path / "a.jpg", exif=exif)
    assert read_header(str(path))[1:] == (37, 23)


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_of(path: Path, width: int, height: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    data = save(path).read_bytes()
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def test_claims_of_gigabytes_are_only_claims(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for size in ((60_000, 60_000), (2**31 - 1, 2**31 - 1)):  # 10 GB and more as RGB
        path.write_bytes(png(*size))
        assert code_of(path) == "image_bomb"
    path.write_bytes(png(13_000, 13_000))  # Pillow would open it, and reserve half a gigabyte to decode it
    assert code_of(path) == "bad_image"
    path.write_bytes(jpeg_of(tmp_path / "b.jpg", 65_000, 65_000))
    assert code_of(path) in ("bad_image", "image_bomb")
    path.write_bytes(jpeg_of(tmp_path / "b.jpg", 12_000, 12_000))
    assert code_of(path) == "bad_image"
    canvas = (50_000 - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas + canvas
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert code_of(path) == "image_bomb"
    path.write_bytes(b"BM" + struct.pack("<IIIIiiHHIIIIII", 10**6, 0, 54, 40, 50_000, 50_000, 1, 24, *[0] * 6))
    assert code_of(path) == "image_bomb"


def test_a_blank_picture_is_no_claim(tmp_path: Path) -> None:
    """deflate and JPEG's empty blocks shrink most where there is nothing to see."""
    for name in ("a.png", "a.jpg", "b.jpg"):
        Image.new("RGB", (4000, 4000)).save(tmp_path / name, optimize=True, progressive=name == "b.jpg", quality=1)
        assert read_header(str(tmp_path / name))[1:] == (4000, 4000)
    Image.new("1", (8000, 8000)).save(tmp_path / "c.png", optimize=True)
    assert read_header(str(tmp_path / "c.png"))[1:] == (8000, 8000)


def test_the_limit_is_pillows() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert PIXEL_LIMIT == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"<html>"])
def test_what_is_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    assert code_of(tmp_path / "a.jpg") == "bad_image"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in ("pipe.png", "folder.png", "no.png", "a\0.png", "x" * 5000):
        assert code_of(tmp_path / name) in ("missing_file", "bad_image"), name
    assert code_of(tmp_path / "loop.png") == "bad_image"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_never_says_more_than_pillow(tmp_path: Path, data: st.DataObject) -> None:
    """What both take, they take for the same kind and size; nothing but a fault with a code is raised."""
    out = io.BytesIO()
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    Image.effect_noise((40, 30), 50).save(out, kind)
    raw = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 400) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x"
    path.write_bytes(raw)
    with contextlib.suppress(RecordError):  # refused by either: damage beside the size is for --decode
        ours = read_header(str(path))
        assert pillow_header(str(path)) == ours


def test_the_extension_is_compared(images: Path, write_array: WriteFile) -> None:
    save(images / "lie.png", format="JPEG")
    save(images / "true.jpeg", format="JPEG")
    save(images / "none", format="JPEG")
    source = write_array(naming("lie.png", "true.jpeg", "none"))
    (problem,) = check(source, dataset_dir=images).problems
    assert (problem.record, problem.code) == (1, "image_type")
    assert "is a JPEG file; rename it or save it as PNG" in problem.message
    assert codes(source, images, ignore=["image_type"]) == []


def test_limits_of_size(images: Path, write_array: WriteFile) -> None:
    source = write_array(naming("a.png"))  # 8 x 6
    assert codes(source, images, limits=SizeLimits(min_side=6, max_side=8, max_aspect=1.34)) == []
    assert codes(source, images, limits=SizeLimits(min_side=7)) == ["image_small"]
    assert codes(source, images, limits=SizeLimits(max_side=7)) == ["image_large"]
    assert codes(source, images, limits=SizeLimits(max_aspect=1.33)) == ["image_aspect"]
    with pytest.raises(ValueError, match="min_side is 0; it must be at least 1"):
        SizeLimits(min_side=0)


def test_decoding_finds_what_the_header_hides(images: Path, write_array: WriteFile) -> None:
    good = save(images / "good.png", (64, 64)).read_bytes()
    middle = good.index(b"IDAT") + 40
    (images / "bad.png").write_bytes(good[:middle] + b"\0" * 20 + good[middle + 20 :])
    source = write_array(naming("bad.png", "good.png"))
    assert codes(source, images) == []
    for workers in (0, 3):
        assert codes(source, images, media="decode", workers=workers) == ["bad_image"]


def test_threads_change_nothing(images: Path, write_array: WriteFile) -> None:
    for number in range(40):
        save(images / f"{number}.png", (10 + number, 20))
    source = write_array(naming(*[f"{number}.png" for number in range(60)]))
    assert check(source, dataset_dir=images, workers=5) == check(source, dataset_dir=images, workers=0)


def test_media_may_be_left_alone(images: Path, write_array: WriteFile) -> None:
    (images / "bad.png").write_bytes(b"no image")
    source = write_array(naming("bad.png", "no.png", "../x.png"))
    assert codes(source, images) == ["bad_image", "missing_file", "path_escapes"]
    assert codes(source, images, media="exists") == ["missing_file", "path_escapes"]
    assert codes(source, images, media="none") == ["path_escapes"]
    with pytest.raises(ValueError, match="media is 'all'; legal are header, decode, exists, none"):
        check(source, dataset_dir=images, media="all")
