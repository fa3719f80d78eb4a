"""Views as one HTML page: self-contained, without scripts. Every text from a file is escaped."""

from __future__ import annotations

import base64
import io
import struct
import warnings
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from ..errors import RecordError
from ..pictures import PictureFolder
from .view import PictureView, Piece, View
from .wording import id_groups, parts, picture_line, piece_line, readable, record_line

THUMBNAIL = 280
"""Longer side of a thumbnail in pixels."""

# Even if a text slipped through unescaped: no script, no request.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# What Pillow's decoders raise on a broken file; memory is bounded by the limit that headers are held to.
_FAULTS = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, RuntimeError, struct.error)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430 }
section { border-top: 1px solid #d0d5dd; padding: 1rem 0 } h1 { font-size: 1.4rem } h2 { font-size: 1.05rem }
h3 { font-size: .85rem; font-weight: 600; margin: .8rem 0 .2rem } p.note { color: #8a4b00; margin: .2rem 0 }
figure { display: inline-block; margin: 0 1rem .5rem 0; max-width: 20rem; vertical-align: top }
figcaption, details { font-size: .8rem; color: #475467; overflow-wrap: anywhere } img { max-width: 100% }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; background: #f6f7f8; padding: .4rem .6rem }
.loss { background: #c9efd3 } .cut { background: #fbd5d0; text-decoration: line-through }
"""


def page(views: Iterable[View], folder: Path, title: str) -> Iterator[str]:
    """Yield the HTML of ``views``; thumbnails are made of the pictures under ``folder``."""
    pictures = PictureFolder(folder)
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body><h1>{_text(title)}'
        '</h1>\n<p>As the model sees it: <span class="loss">carries loss</span>, <span>no loss</span>, '
        '<span class="cut">cut off</span>.</p>\n'
    )
    for view in views:
        yield f"<section><h2>{_text(record_line(view))}</h2>\n"
        yield from (f'<p class="note">{_text(note)}</p>\n' for note in view.notes)
        yield from (_figure(picture, pictures) for picture in view.pictures)
        yield from (_piece(piece) for piece in view.pieces)
        yield "</section>\n"
    yield "</body></html>\n"


def _text(text: str) -> str:
    return escape(readable(text))


def _piece(piece: Piece) -> str:
    body = "".join(f'<span class="{kind}">{_text(text)}</span>' for kind, text in parts(piece))
    ids = f"<details><summary>ids</summary>{' '.join(id_groups(piece.ids))}</details>\n" if piece.ids else ""
    return f"<h3>{_text(piece_line(piece))}</h3>\n<pre>{body}</pre>\n{ids}"


def _figure(picture: PictureView, pictures: PictureFolder) -> str:
    data = None if picture.resized is None else _thumbnail(picture.path, picture.resized, pictures)
    image = "" if data is None else f'<img alt="" src="data:image/jpeg;base64,{data}">'
    unread = "" if data is not None or picture.fault else " (its pixels cannot be read)"
    caption = f"{_text(picture.path)}<br>{_text(picture_line(picture))}{unread}"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _thumbnail(path: str, resized: tuple[int, int], pictures: PictureFolder) -> str | None:
    """Return the picture in the shape that the model sees, as base64 of a JPEG, None if it cannot be decoded."""
    from PIL import Image

    file = pictures.file(path)
    if isinstance(file, RecordError):
        return None
    scale = min(1.0, THUMBNAIL / max(resized))
    size = max(1, round(resized[0] * scale)), max(1, round(resized[1] * scale))
    out = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                image.draft("RGB", size)
                image.convert("RGB").resize(size).save(out, "JPEG", quality=80)
    except (*_FAULTS, Image.DecompressionBombError):
        return None
    return base64.b64encode(out.getvalue()).decode()
