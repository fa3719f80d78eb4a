"""A view as lines for a terminal, or for a file: the words say all that the colours say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TextIO

from .view import Piece, View
from .wording import counted, id_groups, one_line, parts, picture_line, piece_line, record_line, spelt_out

SHOWN_TEXT = 4000
"""Characters of a text that are shown; of a longer one the beginning and the end."""

SHOWN_IDS = 24

_COLOURS = {"loss": "32", "seen": "2", "cut": "31;9", "note": "33", "head": "1"}


def wants_colour(stream: TextIO) -> bool:
    """Return whether ``stream`` is a terminal that shows colours and ``NO_COLOR`` is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_lines(view: View, *, colour: bool) -> Iterator[str]:
    """Yield the lines of ``view``."""
    paint = _coloured if colour else _plain
    yield paint(record_line(view), "head")
    for note in view.notes:
        yield paint(f"  ! {one_line(note)}", "note")
    for number, picture in enumerate(view.pictures, 1):
        yield f"  picture {number} {one_line(picture.path)}: {one_line(picture_line(picture))}"
    for piece in view.pieces:
        yield f"  {piece_line(piece)}{_ids(piece)}"
        for kind, text in parts(piece):
            if kind == "cut":
                yield paint("    ✂ cut here, what follows is lost", "note")
            shown = spelt_out(_shortened(counted(text))).removesuffix("\n")
            yield from (f"    {paint(line, kind)}" for line in shown.split("\n"))


def _plain(text: str, kind: str) -> str:
    return text


def _coloured(text: str, kind: str) -> str:
    return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m"


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_TEXT:
        return text
    half = SHOWN_TEXT // 2
    return f"{text[:half]} […{len(text) - 2 * half} characters…] {text[-half:]}"


def _ids(piece: Piece) -> str:
    if not piece.ids:
        return ""
    groups = id_groups(piece.ids)
    more = "" if len(groups) <= SHOWN_IDS else f" … {groups[-1]}"
    return f": {' '.join(groups[: SHOWN_IDS - bool(more)])}{more}"
