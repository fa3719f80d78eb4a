"""Alpaca, with pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from ..errors import RecordError, shown
from ..sample import Message, Sample
from .base import (
    Format,
    object_of,
    paths_of,
    rest_of,
    split_system,
    text_of,
    with_extra,
    with_media,
    with_system,
)

_KNOWN = frozenset(("instruction", "input", "output", "system", "history", "image", "images", "videos", "audios"))


class Alpaca(Format):
    """``{"instruction", "input", "output", "system", "history": [[question, answer], …], "images", …}``.

    The question is ``instruction`` and, after a newline, ``input``; written, it is all in ``instruction``. ``history``
    holds the earlier turns. ``image`` is read like ``images``.
    """

    name = "alpaca"
    signs = "'instruction' and 'output'"
    columns = _KNOWN
    carries = frozenset(("videos", "audios", "extra"))
    roles: ClassVar[Mapping[str, str]] = {"system": "system", "user": "instruction", "assistant": "output"}

    def detects(self, record: Mapping[str, object]) -> int:
        """``instruction`` and ``output``."""
        return 2 * ("instruction" in record and "output" in record)

    def parse(self, record: object) -> Sample:
        """Read the history, then the question and its answer."""
        fields = object_of(record)
        question = "\n".join(filter(None, (text_of(fields, "instruction"), text_of(fields, "input"))))
        answer = fields.get("output")
        if not question or not isinstance(answer, str):
            raise RecordError(
                f"'instruction' and 'output' must be strings, not {shown(fields.get('instruction'))} "
                f"and {shown(answer)}"
            )
        turns = (*_history(fields.get("history")), Message("user", question), Message("assistant", answer))
        images = (*paths_of(fields, "image", single=True), *paths_of(fields, "images", single=True))
        media = [paths_of(fields, key, single=True) for key in ("videos", "audios")]
        messages = with_system(text_of(fields, "system"), turns)
        return Sample(messages, images, media[0], media[1], None, rest_of(fields, _KNOWN))

    def emit(self, sample: Sample) -> dict[str, object]:
        """Write pairs; anything but questions and answers in turn has no place."""
        system, rest = split_system(sample)
        for turn in rest.messages:
            self.name_of(turn.role)
        if [turn.role for turn in rest.messages] != ["user", "assistant"] * (len(rest.messages) // 2):
            raise RecordError("the alpaca format holds questions and answers in turn only", code="not_carried")
        texts = [turn.content for turn in rest.messages]
        pairs = [[question, answer] for question, answer in zip(texts[::2], texts[1::2], strict=True)]
        if not pairs:
            raise RecordError("the alpaca format needs a question and an answer", code="not_carried")
        record: dict[str, object] = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
        if system is not None:
            record["system"] = system
        if pairs[:-1]:
            record["history"] = pairs[:-1]
        return with_extra(with_media(record, sample), sample, _KNOWN)


def _history(value: object) -> Iterable[Message]:
    if value is None:
        return
    if not isinstance(value, list):
        raise RecordError(f"'history' must be a list of pairs, not {shown(value)}")
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RecordError(f"'history' must be a list of pairs of strings; one is {shown(pair)}")
        yield Message("user", pair[0])
        yield Message("assistant", pair[1])
