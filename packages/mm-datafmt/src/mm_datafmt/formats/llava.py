"""LLaVA-Instruct and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..sample import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, Sample
from .base import Format, Plain, object_of, paths_of, rest_of, turns_of, with_extra, written_turns

_NAMES = ("from", "value")
_KNOWN = frozenset(("conversations", "image", "video"))


class Llava(Format):
    """``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, …]}``, ``video`` in LLaVA-Video.

    ``image`` and ``video`` may be missing, null or empty (text only), a path, or a list of paths (interleaved sets). A
    leading turn ``"from": "system"`` is allowed. LLaVA-Video marks a video by ``<image>``; it becomes ``<video>``.
    """

    name = "llava"
    signs = "'conversations', with 'image' or 'video'"
    columns = _KNOWN
    turn_columns = frozenset(_NAMES)
    carries = frozenset(("videos", "extra", "turn_extra", "loss"))
    speakers: ClassVar[Mapping[str, str]] = {"system": "system", "human": "user", "gpt": "assistant"}
    roles: ClassVar[Mapping[str, str]] = {role: name for name, role in speakers.items()}
    plain = Plain("conversations", *_NAMES, "image", single=True, known=_KNOWN)

    def detects(self, record: Mapping[str, object]) -> int:
        """``conversations``, surely with ``image`` or ``video``."""
        return ("conversations" in record) * (1 + ("image" in record or "video" in record))

    def parse(self, record: object) -> Sample:
        """Read ``conversations``, ``image`` and ``video``; the text is taken over as it is."""
        fields = object_of(record)
        turns = turns_of(fields, "conversations", _NAMES, self.speakers)
        images = paths_of(fields, "image", single=True)
        videos = paths_of(fields, "video", single=True) if "video" in fields else ()
        if videos and not images:
            turns = _video_marks(turns)
        return Sample(turns, images, videos, (), None, rest_of(fields, _KNOWN))

    def emit(self, sample: Sample) -> dict[str, object]:
        """Write ``image`` and ``video`` as a path for one and as a list for several."""
        self.require_media(sample)
        record: dict[str, object] = {}
        for key, paths in (("image", sample.images), ("video", sample.videos)):
            if paths:
                record[key] = paths[0] if len(paths) == 1 else list(paths)
        record["conversations"] = written_turns(sample, self, _NAMES)
        return with_extra(record, sample, _KNOWN)


def _video_marks(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    if any(VIDEO_PLACEHOLDER in turn.content for turn in turns):
        return turns
    return tuple(turn._replace(content=turn.content.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)) for turn in turns)
