"""ShareGPT with the columns that trainers have given it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..sample import Sample
from .base import (
    Format,
    Plain,
    object_of,
    paths_of,
    rest_of,
    split_system,
    text_of,
    tools_of,
    turns_of,
    with_extra,
    with_media,
    with_system,
    written_turns,
)

_NAMES = ("from", "value")
_MEDIA = ("images", "videos", "audios")
_KNOWN = frozenset(("conversations", "system", "tools", *_MEDIA))


class ShareGpt(Format):
    """``{"conversations": [{"from", "value"}, …], "system", "tools", "images", "videos", "audios"}``.

    Speakers are ``human``, ``gpt``, ``observation``, ``function_call`` and ``system``; ``user``, ``assistant`` and
    ``tool`` are understood. A system turn is written as the column ``system``.
    """

    name = "sharegpt"
    signs = "'conversations', with 'images', 'videos', 'audios', 'system', 'tools' or turns of tools"
    columns = _KNOWN
    turn_columns = frozenset(_NAMES)
    carries = frozenset(("videos", "audios", "tools", "extra", "turn_extra", "loss"))
    speakers: ClassVar[Mapping[str, str]] = {
        "system": "system",
        "human": "user",
        "gpt": "assistant",
        "observation": "observation",
        "function_call": "function",
        "user": "user",
        "assistant": "assistant",
        "tool": "observation",
    }
    roles: ClassVar[Mapping[str, str]] = {
        "system": "system",
        "user": "human",
        "assistant": "gpt",
        "observation": "observation",
        "function": "function_call",
    }
    plain = Plain("conversations", *_NAMES, "images", single=True, known=_KNOWN)

    def detects(self, record: Mapping[str, object]) -> int:
        """``conversations`` with something that LLaVA has not, and without its ``image`` and ``video``."""
        turns = record.get("conversations")
        if not isinstance(turns, list) or {"image", "video"} & record.keys():
            return 0
        if (_KNOWN - {"conversations"}) & record.keys():
            return 2
        speakers = {str(turn.get("from")) for turn in turns if isinstance(turn, dict)}
        return 2 if speakers & (self.speakers.keys() - {"system", "human", "gpt"}) else 0

    def parse(self, record: object) -> Sample:
        """Read the turns and the columns."""
        fields = object_of(record)
        turns = turns_of(fields, "conversations", _NAMES, self.speakers)
        media = [paths_of(fields, key, single=True) for key in _MEDIA]
        messages = with_system(text_of(fields, "system"), turns)
        return Sample(messages, media[0], media[1], media[2], tools_of(fields), rest_of(fields, _KNOWN))

    def emit(self, sample: Sample) -> dict[str, object]:
        """Write the turns, and the columns that are not empty."""
        system, rest = split_system(sample)
        record: dict[str, object] = {"conversations": written_turns(rest, self, _NAMES)}
        if system is not None:
            record["system"] = system
        if sample.tools is not None:
            record["tools"] = sample.tools
        return with_extra(with_media(record, sample), sample, _KNOWN)
