"""What a sample must satisfy before a trainer sees it, apart from its files."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import RecordError
from .sample import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, Sample


def faults_of(sample: Sample) -> Iterator[RecordError]:
    """Yield every rule that ``sample`` breaks: order of the turns, answers, placeholders, text."""
    yield from _turn_faults(sample.messages)
    for number, turn in enumerate(sample.messages, 1):
        if turn.role == "assistant" and not turn.content.strip():
            yield RecordError(f"turn {number}: the answer is empty", code="empty_answer")
        if not _is_unicode(turn.content):
            yield RecordError(f"turn {number}: the text holds half a surrogate pair", code="text")
    for mark, paths, kind in (
        (IMAGE_PLACEHOLDER, sample.images, "image"),
        (VIDEO_PLACEHOLDER, sample.videos, "video"),
    ):
        marks = sum(turn.content.count(mark) for turn in sample.messages)
        if marks != len(paths):
            yield RecordError(
                f"the text has {marks} {mark} but the record has {len(paths)} {kind} path(s); "
                "the numbers must be equal",
                code=f"{kind}_count",
            )


def _turn_faults(messages: tuple[Message, ...]) -> Iterator[RecordError]:
    roles = [turn.role for turn in messages]
    start = 1 if roles[:1] == ["system"] else 0
    for index, role in enumerate(roles[start:]):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            yield RecordError(
                f"turn {start + index + 1} is by {role!r}, expected {expected!r}: user and assistant "
                "take turns, after at most one system turn",
                code="role_order",
            )
            break
    if "assistant" not in roles:
        yield RecordError("no turn is by the assistant: nothing to learn", code="no_answer")
    elif roles[-1] != "assistant":
        yield RecordError(f"the last turn is by {roles[-1]!r}; it must be the assistant's", code="last_turn")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
