"""The records that MindSpeed MM trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..sample import ROLES, Sample
from .base import (
    Format,
    Plain,
    object_of,
    paths_of,
    rest_of,
    text_of,
    tools_of,
    turns_of,
    with_media,
    with_system,
    written_turns,
)

_NAMES = ("role", "content")
_MEDIA = ("images", "videos", "audios")
_KNOWN = frozenset(("messages", "system", "tools", *_MEDIA))


class Messages(Format):
    """``{"messages": [{"role", "content"}, …], "images": […], "videos": […], "audios": […]}``.

    Media may be missing or null when read; ``images`` is always written, the others and ``tools`` only if there are
    any. A system prompt is the first turn. A turn may carry ``loss``, its weight.
    """

    name = "messages"
    signs = "'messages' whose contents are strings"
    carries = frozenset(("videos", "audios", "tools", "loss"))
    roles: ClassVar[Mapping[str, str]] = {role: role for role in ROLES}
    speakers: ClassVar[Mapping[str, str]] = {**roles, "tool": "observation", "function_call": "function"}
    plain = Plain("messages", *_NAMES, "images", single=False, known=_KNOWN)

    def detects(self, record: Mapping[str, object]) -> int:
        """``messages``, surely with a list of media."""
        return ("messages" in record) * (1 + bool({"images", "videos", "audios"} & record.keys()))

    def parse(self, record: object) -> Sample:
        """Read the turns, the media, ``system`` and ``tools``."""
        fields = object_of(record)
        turns = turns_of(fields, "messages", _NAMES, self.speakers)
        media = [paths_of(fields, key) for key in _MEDIA]
        messages = with_system(text_of(fields, "system"), turns)
        return Sample(messages, media[0], media[1], media[2], tools_of(fields), rest_of(fields, _KNOWN))

    def emit(self, sample: Sample) -> dict[str, object]:
        """Write every turn and every path."""
        record: dict[str, object] = {"messages": written_turns(sample, self, _NAMES)}
        with_media(record, sample, images=True)
        if sample.tools is not None:
            record["tools"] = sample.tools
        return record
