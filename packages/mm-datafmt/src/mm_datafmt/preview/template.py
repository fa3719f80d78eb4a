"""A conversation as the text that Qwen2.5-VL is trained on, in the pieces that are tokenised by themselves.

::

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n        ``tool`` for an observation
    {answer}<|im_end|>\\n                                                    loss on this line, its end included

This is the template ``qwen2vl`` of MindSpeed MM and LLaMA-Factory. An ``<image>`` becomes ``<|vision_start|>``, as many
``<|image_pad|>`` as the picture has tokens, and ``<|vision_end|>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..sample import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message

DEFAULT_SYSTEM = "You are a helpful assistant."
VISION_START, IMAGE_PAD, VIDEO_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"

_HEADERS = {"user": "user", "observation": "tool"}


class Segment(NamedTuple):
    """A piece of the text; ``turn`` is the number (from 0) of the question and answer that it belongs to."""

    role: str
    text: str
    loss: bool
    turn: int
    weight: float | None = None


def segments(
    messages: Sequence[Message],
    picture_tokens: Sequence[int],
    *,
    mask_history: bool = False,
    train_on_prompt: bool = False,
) -> list[Segment]:
    """Return the pieces of a conversation that breaks no rule (:func:`mm_datafmt.rules.faults_of`).

    Loss is on every answer (of weight 0: not), with ``mask_history`` only on the last one, and with ``train_on_prompt``
    on all else as well. The system turn belongs to the first question. ``picture_tokens`` is in order of the pictures.
    """
    blocks = (VISION_START + IMAGE_PAD * count + VISION_END for count in picture_tokens)
    has_system = messages[0].role == "system"
    system = _filled(messages[0].content, blocks) if has_system else ""
    pieces = [Segment("system", f"<|im_start|>system\n{system or DEFAULT_SYSTEM}<|im_end|>\n", train_on_prompt, 0)]
    turns = messages[1:] if has_system else messages
    last = (len(turns) - 1) // 2
    for index, (role, content, weight, _) in enumerate(turns):
        text, turn = _filled(content, blocks), index // 2
        if role in _HEADERS:
            text = f"<|im_start|>{_HEADERS[role]}\n{text}<|im_end|>\n<|im_start|>assistant\n"
            pieces.append(Segment(role, text, train_on_prompt, turn))
        else:
            loss = weight != 0 and not (mask_history and turn != last)
            pieces.append(Segment(role, f"{text}<|im_end|>\n", loss, turn, weight))
    return pieces


def _filled(content: str, blocks: Iterator[str]) -> str:
    content = content.replace(VIDEO_PLACEHOLDER, VISION_START + VIDEO_PAD + VISION_END)
    head, *rest = content.split(IMAGE_PLACEHOLDER)
    return head + "".join(next(blocks) + text for text in rest)
