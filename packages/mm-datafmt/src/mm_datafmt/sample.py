"""What every format is read into and written from."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")
IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn: ``role`` is ``system``, ``user`` or ``assistant``; ``content`` is its text, placeholders included."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One conversation with the paths of its media, in the order of their placeholders.

    The n-th ``<image>`` in the text stands for ``images[n]``, the n-th ``<video>`` for ``videos[n]``. Paths are as the
    file gives them: which folder they are relative to is not part of the sample.
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
