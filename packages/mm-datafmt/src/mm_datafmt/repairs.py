"""What ``--on_bad repair`` may change in a sample. Each repair only takes away what cannot be trained on, or adds a
placeholder for media that the record names and the text forgot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .rules import faults_of
from .sample import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, Sample

Repair = Callable[[Sample], Sample]


def repaired(sample: Sample) -> Sample | None:
    """Return ``sample`` made to satisfy all rules, or None if that is not in our power."""
    tried: set[str] = set()
    while faults := [fault.code for fault in faults_of(sample)]:
        repair = next((code for code in faults if code in REPAIRS and code not in tried), None)
        if repair is None:
            return None
        tried.add(repair)
        sample = REPAIRS[repair](sample)
    return sample


def _without_first_answers(sample: Sample) -> Sample:
    """Drop answers that stand before the first question."""
    messages = sample.messages
    start = 1 if messages[:1] and messages[0].role == "system" else 0
    end = start
    while end < len(messages) and messages[end].role in ("assistant", "function"):
        end += 1
    return sample._replace(messages=messages[:start] + messages[end:])


def _without_last_questions(sample: Sample) -> Sample:
    """Drop turns after the last answer."""
    last = max((n for n, turn in enumerate(sample.messages) if turn.role in ("assistant", "function")), default=-1)
    return sample._replace(messages=sample.messages[: last + 1])


def _until_empty_answer(sample: Sample) -> Sample:
    """End the conversation before the first empty answer's question."""
    empty = next(n for n, turn in enumerate(sample.messages) if turn.role == "assistant" and not turn.content.strip())
    return _without_last_questions(sample._replace(messages=sample.messages[:empty]))


def _cleaned(sample: Sample) -> Sample:
    """Take NUL characters out and put U+FFFD for half surrogate pairs."""
    return sample._replace(
        messages=tuple(
            turn._replace(
                content=turn.content.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            )
            for turn in sample.messages
        )
    )


def _marked(mark: str, kind: str) -> Repair:
    """Put the missing placeholders before the first question, if the text has none at all."""

    def repair(sample: Sample) -> Sample:
        first = next((n for n, turn in enumerate(sample.messages) if turn.role == "user"), None)
        if first is None or any(mark in turn.content for turn in sample.messages):
            return sample
        asked: Message = sample.messages[first]
        marks = f"{mark}\n" * len(getattr(sample, kind))
        messages = list(sample.messages)
        messages[first] = asked._replace(content=marks + asked.content)
        return sample._replace(messages=tuple(messages))

    return repair


REPAIRS: Mapping[str, Repair] = {
    "role_order": _without_first_answers,
    "last_turn": _without_last_questions,
    "empty_answer": _until_empty_answer,
    "nul": _cleaned,
    "text": _cleaned,
    "image_count": _marked(IMAGE_PLACEHOLDER, "images"),
    "video_count": _marked(VIDEO_PLACEHOLDER, "videos"),
    "audio_count": _marked(AUDIO_PLACEHOLDER, "audios"),
}
"""What each fault is repaired by; a fault that is not here, or comes back, is not repaired."""
