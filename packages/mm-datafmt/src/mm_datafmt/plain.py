"""The short way of the records that nearly all are: turns of plain text, and pictures, into ``messages``.

:class:`PlainPath` does in one function what :mod:`.judging` and :mod:`.emitting` do in many, several times faster, for
records that have no fault and nothing unusual about them. It hands back every other one; the long way then says what
it is, or what is wrong with it. Where both give a record they give the same bytes: a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any

import orjson

from .errors import RecordError
from .formats import Format
from .formats.base import Plain
from .formats.messages import Messages
from .judging import Judge
from .rules import order_faults
from .sample import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

Written = tuple[bytes, tuple[str, ...]]
"""An encoded record, and the names of its fields that have no place in it."""

_LAYOUTS = 1 << 12  # different orders of speakers or of fields that are remembered
_OTHERS = (VIDEO_PLACEHOLDER, AUDIO_PLACEHOLDER)
_SCALARS = frozenset((str, int, float, bool, type(None)))


class PlainPath:
    """From a layout of plain turns, whose speakers have these roles, to ``messages``; ``stored`` judges a picture."""

    def __init__(self, layout: Plain, speakers: Mapping[str, str], stored: Callable[[str], str | RecordError]) -> None:
        self._layout = layout
        self._speakers = speakers
        self._stored = stored
        self._speaker_of, self._text_of = itemgetter(layout.speaker), itemgetter(layout.text)
        # Data sets have few different ones.
        self._roles = lru_cache(_LAYOUTS)(self._roles_of)
        self._others = lru_cache(_LAYOUTS)(self._others_of)

    @classmethod
    def between(cls, judge: Judge, target: Format) -> PlainPath | None:
        """Return the short way from what ``judge`` judges to ``target``, None if there is none."""
        layout = judge.format.plain
        if layout is None or judge.amends or type(target) is not Messages:
            return None
        return cls(layout, judge.format.speakers, judge.media.image)

    def __call__(self, value: Any) -> Written | None:
        """Return what becomes of a record that was decoded from JSON, None if the long way has to be taken."""
        layout = self._layout
        try:
            turns = value[layout.turns]
            texts = list(map(self._text_of, turns))
            roles = self._roles(tuple(map(self._speaker_of, turns)))
            others = self._others(tuple(value))
            # No turn has fewer than two fields, so none has more if there are twice as many.
            if roles is None or others is None or sum(map(len, turns)) != 2 * len(texts):
                return None
            paths = value.get(layout.images, ())
            images = self._images((paths,) if paths.__class__ is str and layout.single else paths)
            # Text of white space alone, and NUL, are faults; so are placeholders without media.
            if images is None or not all(map(str.strip, texts)) or not _is_marked("\n".join(texts), len(images)):
                return None
            for name in others:
                if value[name].__class__ not in _SCALARS:
                    return None
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            return orjson.dumps({"messages": messages, "images": images}), others
        except (TypeError, KeyError, AttributeError):  # not of this layout, or a text that is none
            return None

    def _images(self, paths: Any) -> list[str] | None:
        """Return the paths as they are stored, None if one has a fault."""
        if paths.__class__ not in (list, tuple):
            return None
        images = []
        for path in paths:
            if not path or path.startswith("data:"):
                return None
            image = self._stored(path)
            if not isinstance(image, str):
                return None
            images.append(image)
        return images

    def _roles_of(self, speakers: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return the roles, None if their order is at fault. Raises ``KeyError`` for a speaker that is unknown."""
        roles = tuple(self._speakers[speaker] for speaker in speakers)
        return None if order_faults(roles) else roles

    def _others_of(self, names: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return the fields that the layout gives no meaning to, None if there is one beside turns and pictures."""
        layout = self._layout
        if (layout.known & set(names)) - {layout.turns, layout.images}:
            return None
        return tuple(name for name in names if name not in layout.known)


def _is_marked(text: str, images: int) -> bool:
    """Return whether a text without NUL holds ``<image>`` as often as there are images, and no other placeholder."""
    at = text.find("<")
    while at >= 0:
        if text.startswith(IMAGE_PLACEHOLDER, at):
            images -= 1
        elif text.startswith(_OTHERS, at):
            return False
        at = text.find("<", at + 1)
    return images == 0 and "\0" not in text
