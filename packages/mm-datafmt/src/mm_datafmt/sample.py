"""What every format is read into and written from.

One representation each: the system prompt is the first message, a tool's reply is an ``observation``, the call that
asked for it a ``function`` message whose content is JSON (``{"name", "arguments"}``, or a list of those). Formats that
have a column for such a thing fill it from here.

Both types are named tuples, because a data set makes millions of them: ``sample._replace(images=…)`` changes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ROLES = ("system", "user", "assistant", "observation", "function")
IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
AUDIO_PLACEHOLDER = "<audio>"
CALL_TEXT = "content"
"""The field in a ``function`` message's ``extra`` that holds a text said beside the call."""


class Message(NamedTuple):
    """One turn.

    ``role`` is one of :data:`ROLES`, ``content`` its text, placeholders included. ``loss`` is the weight of an answer
    in the loss (None: the trainer's default, 0: none). ``extra`` holds the other fields of the turn, None for none.
    """

    role: str
    content: str
    loss: float | None = None
    extra: Mapping[str, object] | None = None


class Sample(NamedTuple):
    """One conversation with the paths of its media, in the order of their placeholders.

    The n-th ``<image>`` in the text stands for ``images[n]``; so for ``<video>`` and ``<audio>``. Paths are as the file
    gives them: which folder they are relative to is not part of the sample. ``tools`` is the JSON text of the tools on
    offer. ``extra`` holds the record's fields that have no place above (an ``id``), None if there are none.
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    tools: str | None = None
    extra: Mapping[str, object] | None = None
