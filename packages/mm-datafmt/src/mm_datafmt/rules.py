"""What a sample must satisfy before a trainer sees it, apart from its files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from .errors import RecordError
from .sample import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, Sample

_ASKING = ("user", "observation")
_ANSWERING = ("assistant", "function")
_MARKS = ((IMAGE_PLACEHOLDER, "image"), (VIDEO_PLACEHOLDER, "video"), (AUDIO_PLACEHOLDER, "audio"))


def faults_of(sample: Sample) -> list[RecordError]:
    """Return every rule that ``sample`` breaks: order of the turns, answers, placeholders, text.

    Codes: ``role_order``, ``no_answer``, ``last_turn``, ``empty_answer``, ``text`` (half a surrogate pair), ``nul``,
    ``image_count``, ``video_count``, ``audio_count``.
    """
    messages, images, videos, audios, _, _ = sample
    roles, marked, clean = [], "", True
    for role, content, _, _ in messages:
        roles.append(role)
        if "<" in content:
            marked = f"{marked}\n{content}" if marked else content
        if "\0" in content or not (content.isascii() or _is_unicode(content)) or not content or content.isspace():
            clean = False
    order = order_faults(tuple(roles))
    counts = (marked.count(IMAGE_PLACEHOLDER), marked.count(VIDEO_PLACEHOLDER), marked.count(AUDIO_PLACEHOLDER))
    if clean and not order and counts == (len(images), len(videos), len(audios)):
        return []
    faults = [RecordError(message, code=code) for code, message in order]
    return [*faults, *_text_faults(messages), *_count_faults(sample, counts)]


def _text_faults(messages: tuple[Message, ...]) -> Iterator[RecordError]:
    for number, (role, content, _, _) in enumerate(messages, 1):
        if role == "assistant" and not content.strip():
            yield RecordError(f"turn {number}: the answer is empty", code="empty_answer")
        if "\0" in content:
            yield RecordError(f"turn {number}: the text holds a NUL character", code="nul")
        if not _is_unicode(content):
            yield RecordError(f"turn {number}: the text holds half a surrogate pair", code="text")


def _count_faults(sample: Sample, counts: tuple[int, ...]) -> Iterator[RecordError]:
    for (mark, kind), paths, marks in zip(_MARKS, sample[1:4], counts, strict=True):
        if marks != len(paths):
            yield RecordError(
                f"the text has {marks} {mark} but the record has {len(paths)} {kind} path(s); "
                "the numbers must be equal",
                code=f"{kind}_count",
            )


@lru_cache(maxsize=1 << 12)
def order_faults(roles: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return code and message of each fault in the order of the turns; data sets have few different orders."""
    faults = []
    start = 1 if roles[:1] == ("system",) else 0
    for index, role in enumerate(roles[start:]):
        expected = (_ASKING, _ANSWERING)[index % 2]
        if role not in expected:
            message = (
                f"turn {start + index + 1} is by {role!r}, expected {expected[0]!r}: user and assistant take turns, "
                "after at most one system turn"
            )
            faults.append(("role_order", message))
            break
    if not set(_ANSWERING) & set(roles):
        faults.append(("no_answer", "no turn is by the assistant: nothing to learn"))
    elif roles[-1] not in _ANSWERING:
        faults.append(("last_turn", f"the last turn is by {roles[-1]!r}; it must be the assistant's"))
    return tuple(faults)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
