"""A conversation as the token ids that Qwen2.5-VL is trained on.

::

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n
    {answer}<|im_end|>\\n                                               loss on this line, for every answer

Each line is tokenised by itself, as the field's trainers do it: no token spans two of them. An ``<image>`` in the text
becomes ``<|vision_start|>``, one ``<|image_pad|>`` for each merged patch of the picture, ``<|vision_end|>``. The text
around it, the line break after ``<image>`` included, stays as it is. Nothing is cut off here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm_finetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mm_datafmt import Message

IGNORE = -100
DEFAULT_SYSTEM = "You are a helpful assistant."
IMAGE, VIDEO = "<image>", "<video>"
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", VISION_START, IMAGE_PAD, VISION_END)
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Encoded:
    """One record.

    Attributes:
        input_ids: the tokens.
        labels: as long as `input_ids`: -100, or the token itself where it carries loss. Not shifted.
    """

    input_ids: list[int]
    labels: list[int]


def encode(messages: Sequence[Message], *, tokenizer: Any, image_token_counts: Sequence[int]) -> Encoded:
    """Encode a conversation that ends with an answer.

    Args:
        messages: at most one system turn (empty: the default one), then user and assistant in turn.
        tokenizer: Qwen2.5-VL's, from transformers.
        image_token_counts: for each ``<image>``, in order, the tokens of its picture (merged patches).

    Raises:
        DataError: the turns are out of order, or the pictures are not those of the text.
        ConfigError: the tokenizer lacks one of the special tokens.
    """
    segments = _segments(messages, image_token_counts, last_role="assistant")
    input_ids: list[int] = []
    labels: list[int] = []
    for text, is_answer in segments:
        ids = _tokenize(text, tokenizer)
        input_ids += ids
        labels += ids if is_answer else [IGNORE] * len(ids)
    _check_tokens(input_ids, tokenizer, image_token_counts)
    return Encoded(input_ids, labels)


def encode_prompt(messages: Sequence[Message], *, tokenizer: Any, image_token_counts: Sequence[int]) -> list[int]:
    """Encode a conversation that ends with a question, up to where the answer begins.

    The arguments and errors are those of :func:`encode`. The ids are the first ones of what :func:`encode` gives for
    the same conversation with its answer.
    """
    segments = _segments(messages, image_token_counts, last_role="user")
    input_ids = [token for text, _ in segments for token in _tokenize(text, tokenizer)]
    _check_tokens(input_ids, tokenizer, image_token_counts)
    return input_ids


def _segments(
    messages: Sequence[Message], image_token_counts: Sequence[int], *, last_role: str
) -> list[tuple[str, bool]]:
    """The pieces that are tokenised by themselves, and whether a piece carries loss."""
    has_system = bool(messages) and messages[0].role == "system"
    turns = messages[1:] if has_system else messages
    _check_turns(turns, last_role)
    system = messages[0].content if has_system else ""
    blocks = _image_blocks(messages, image_token_counts)
    # Pictures are counted from the first message on, so the system turn is filled first.
    segments = [(f"<|im_start|>system\n{_fill(system, blocks) or DEFAULT_SYSTEM}<|im_end|>\n", False)]
    for turn in turns:
        content = _fill(turn.content, blocks)
        if turn.role == "user":
            segments.append((f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n", False))
        else:
            segments.append((f"{content}<|im_end|>\n", True))
    return segments


def _check_turns(turns: Sequence[Message], last_role: str) -> None:
    for number, turn in enumerate(turns):
        expected = ROLES[number % 2]
        if turn.role != expected:
            raise DataError(
                f"turn {number + 1} is by {turn.role!r}, expected {expected!r}:"
                " at most one system turn first, then user and assistant in turn"
            )
    if not turns or turns[-1].role != last_role:
        last = f"is by {turns[-1].role!r}" if turns else "is missing"
        raise DataError(f"the last turn {last}; it must be by {last_role!r}")


def _image_blocks(messages: Sequence[Message], image_token_counts: Sequence[int]) -> Iterator[str]:
    placeholders = sum(message.content.count(IMAGE) for message in messages)
    if placeholders != len(image_token_counts):
        raise DataError(
            f"the text has {placeholders} {IMAGE} but the record has {len(image_token_counts)} picture(s);"
            " the numbers must be equal"
        )
    if any(VIDEO in message.content for message in messages):
        raise DataError(f"the text has {VIDEO}, but only pictures can be used; leave the record out")
    if min(image_token_counts, default=1) < 1:
        raise DataError(f"a picture has {min(image_token_counts)} tokens; it must have 1 or more")
    return (VISION_START + IMAGE_PAD * count + VISION_END for count in image_token_counts)


def _fill(content: str, blocks: Iterator[str]) -> str:
    head, *rest = content.split(IMAGE)
    return head + "".join(next(blocks) + text for text in rest)


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _check_tokens(input_ids: Sequence[int], tokenizer: Any, image_token_counts: Sequence[int]) -> None:
    """Both would only show as a shape error deep in the model."""
    vocabulary = tokenizer.get_added_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ConfigError(f"the tokenizer lacks {', '.join(missing)}; take the one of a Qwen2.5-VL folder")
    found, expected = input_ids.count(vocabulary[IMAGE_PAD]), sum(image_token_counts)
    if found != expected:
        raise DataError(f"the text itself holds {found - expected} {IMAGE_PAD}; write {IMAGE} where a picture stands")
