"""What the terminal and the page have in common: how text from a data set, ids and sizes are written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby

from .template import IMAGE_PAD, VIDEO_PAD
from .view import PictureView, Piece, View

_PADS = re.compile(f"(?:{re.escape(IMAGE_PAD)}){{2,}}|(?:{re.escape(VIDEO_PAD)}){{2,}}")
# Cf holds the joiners that emoji and Indic scripts need; of it, only what turns the direction of the line around.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HIDDEN = ("Cc", "Cs", "Zl", "Zp")


def readable(text: str) -> str:
    """Return ``text`` with repeated pads counted, line ends marked and what could steer a terminal spelt out."""
    return spelt_out(counted(text))


def counted(text: str) -> str:
    """Return ``text`` with repeated pads as one and their number."""
    return _PADS.sub(lambda pads: f"{_first_mark(pads[0])}×{pads[0].count('<|')}", text)


def spelt_out(text: str) -> str:
    """Return ``text`` with line ends marked and what could steer a terminal as escapes."""
    return "".join(map(_shown_character, text))


def one_line(text: str) -> str:
    """Return :func:`readable` text without line breaks, for headings and notes."""
    return readable(text).replace("\n", "")


def _first_mark(pads: str) -> str:
    return pads[: pads.index(">") + 1]


def _shown_character(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t" or character.isalnum() or character == " ":
        return character
    if character in _TURNING or unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


def id_groups(ids: Sequence[int]) -> list[str]:
    """Return token ids as words, an id that repeats itself with its number."""
    groups = [(value, len(list(group))) for value, group in groupby(ids)]
    return [f"{value}×{count}" if count > 2 else " ".join([str(value)] * count) for value, count in groups]


def picture_line(picture: PictureView) -> str:
    """Return size, resized size and tokens of a picture, or why they are not known."""
    if picture.fault:
        return picture.fault
    size, seen = (f"{side[0]}×{side[1]}" if side else "?" for side in (picture.size, picture.resized))
    return f"{size}, the model sees {seen}: {picture.tokens} tokens"


def record_line(view: View) -> str:
    """Return the number of the record and its tokens."""
    where = f"record {view.record}" + ("" if view.line is None else f" (line {view.line})")
    total = view.tokens
    if total is None:
        return where
    cut = f", cut to {view.kept}" if view.kept < total else ""
    return f"{where}: {total} tokens{cut}, {view.learnt} carry loss"


def piece_line(piece: Piece) -> str:
    """Return role, loss and tokens of a piece."""
    weight = "" if piece.weight is None else f" × {piece.weight:g}"
    words = [piece.role, f"loss{weight}" if piece.loss else "no loss"]
    if piece.ids is not None:
        count = len(piece.ids)
        words.append(f"{count} tokens" if piece.kept == count else f"{piece.kept} of {count} tokens kept")
    return ", ".join(words)


def parts(piece: Piece) -> Iterator[tuple[str, str]]:
    """Yield the text of a piece with its fate: ``loss``, ``seen`` or ``cut``."""
    kept, cut = piece.text[: piece.kept_text], piece.text[piece.kept_text :]
    if kept:
        yield "loss" if piece.loss else "seen", kept
    if cut:
        yield "cut", cut
