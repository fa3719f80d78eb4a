"""A conversation as the token ids that Qwen2.5-VL is trained on.

::

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n
    {answer}<|im_end|>\\n                                               loss on this line, for every answer

Each line is tokenised by itself, as the field's trainers do it: no token spans two of them. An ``<image>`` in the text
becomes ``<|vision_start|>``, one ``<|image_pad|>`` for each merged patch of the picture, ``<|vision_end|>``; a
``<video>`` the same with ``<|video_pad|>``. The text around it, the line break after ``<image>`` included, stays as it
is. Nothing is cut off here.

A conversation is first a list of :class:`Segment` (text), then of :class:`Turn` (tokens, a question with its answer),
then :class:`Encoded`; in between, :mod:`mm_finetune.data.truncation` may shorten the turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mm_finetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mm_datafmt import Message

IGNORE = -100
DEFAULT_SYSTEM = "You are a helpful assistant."
IMAGE, VIDEO = "<image>", "<video>"
VISION_START, IMAGE_PAD, VIDEO_PAD, VISION_END = (
    "<|vision_start|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_end|>",
)
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", VISION_START, IMAGE_PAD, VISION_END)
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Encoded:
    """One record.

    Attributes:
        input_ids: the tokens.
        labels: as long as `input_ids`: -100, or the token itself where it carries loss. Not shifted.
        weights: as long as `input_ids`: the weight of the label in the loss, 0 where it is -100.
        lengths: of the conversations that the record is made of, one behind the other; empty: it is one.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """Which tokens carry loss; by default every answer with its ``<|im_end|>`` and line break.

    Args:
        mask_history: only the last answer does.
        train_on_prompt: every token does, those of pictures included.

    Raises:
        ConfigError: both are asked for.
    """

    mask_history: bool = False
    train_on_prompt: bool = False

    def __post_init__(self) -> None:
        """Refuse the combination that means nothing."""
        if self.mask_history and self.train_on_prompt:
            raise ConfigError("data.mask_history and data.train_on_prompt exclude each other; set one of them")


class Segment(NamedTuple):
    """A piece of text that is tokenised by itself, with one pad token where a picture or video stands."""

    text: str
    is_answer: bool
    weight: float


class Block(NamedTuple):
    """Where the tokens of a picture or video stand, ``<|vision_start|>`` and ``<|vision_end|>`` included."""

    start: int
    end: int
    is_video: bool


@dataclass(frozen=True)
class Piece:
    """Tokens, and the blocks in them that must not be cut."""

    ids: list[int]
    blocks: tuple[Block, ...] = ()

    @property
    def block_tokens(self) -> int:
        """Tokens that belong to pictures and videos."""
        return sum(block.end - block.start for block in self.blocks)


@dataclass(frozen=True)
class Turn:
    """A question (the first one with the system turn before it), its answer, and the answer's weight in the loss."""

    source: Piece
    answer: Piece
    weight: float = 1.0


def encode(
    messages: Sequence[Message],
    *,
    tokenizer: Any,
    image_token_counts: Sequence[int],
    video_token_counts: Sequence[int] = (),
    rules: LabelRules | None = None,
) -> Encoded:
    """Encode a conversation that ends with an answer.

    Args:
        messages: at most one system turn (empty: the default one), then user and assistant in turn.
        tokenizer: Qwen2.5-VL's, from transformers.
        image_token_counts: for each ``<image>``, in order, the tokens of its picture (merged patches).
        video_token_counts: the same for each ``<video>``.
        rules: which tokens carry loss.

    Raises:
        DataError: the turns are out of order, or the pictures are not those of the text.
        ConfigError: the tokenizer lacks one of the special tokens.
    """
    pieces = segments(messages, images=len(image_token_counts), videos=len(video_token_counts))
    ids = tokenize([piece.text for piece in pieces], tokenizer)
    return labelled(turns(pieces, ids, tokenizer, image_token_counts, video_token_counts), rules or LabelRules())


def encode_prompt(
    messages: Sequence[Message],
    *,
    tokenizer: Any,
    image_token_counts: Sequence[int],
    video_token_counts: Sequence[int] = (),
) -> list[int]:
    """Encode a conversation that ends with a question, up to where the answer begins.

    The arguments and errors are those of :func:`encode`. The ids are the first ones of what :func:`encode` gives for
    the same conversation with its answer.
    """
    images, videos = len(image_token_counts), len(video_token_counts)
    pieces = segments(messages, images=images, videos=videos, last_role="user")
    ids = tokenize([piece.text for piece in pieces], tokenizer)
    return labelled(turns(pieces, ids, tokenizer, image_token_counts, video_token_counts), LabelRules()).input_ids


def segments(
    messages: Sequence[Message], *, images: int, videos: int = 0, last_role: str = "assistant"
) -> list[Segment]:
    """The pieces of text that are tokenised by themselves.

    Raises:
        DataError: the turns are out of order, or the numbers of pictures and videos are not those of the text.
    """
    has_system = bool(messages) and messages[0].role == "system"
    spoken = messages[1:] if has_system else messages
    _check_turns(spoken, last_role)
    _check_placeholders(messages, images, videos)
    system = messages[0].content if has_system else ""
    found = [Segment(f"<|im_start|>system\n{_fill(system) or DEFAULT_SYSTEM}<|im_end|>\n", False, 0.0)]
    for message in spoken:
        content = _fill(message.content)
        if message.role == "user":
            found.append(Segment(f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n", False, 0.0))
        else:
            found.append(Segment(f"{content}<|im_end|>\n", True, 1.0 if message.loss is None else message.loss))
    return found


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Each text by itself, without the tokens that some tokenizers add at the ends."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def turns(
    pieces: Sequence[Segment],
    ids: Sequence[Sequence[int]],
    tokenizer: Any,
    image_token_counts: Sequence[int],
    video_token_counts: Sequence[int] = (),
) -> list[Turn]:
    """Put segments and their tokens together, every picture and video with all its tokens.

    Raises:
        DataError: the text itself holds tokens that stand for pictures, or a picture has none.
        ConfigError: the tokenizer lacks one of the special tokens.
    """
    pads = _pad_tokens(tokenizer)
    _check_tokens(ids, pads, (image_token_counts, video_token_counts))
    counts = {pads[0]: iter(image_token_counts), pads[1]: iter(video_token_counts)}
    filled = [_expanded(piece, counts, pads[1]) for piece in ids]
    made: list[Turn] = []
    source = filled[0]
    for segment, piece in zip(pieces[1:], filled[1:], strict=True):
        if segment.is_answer:
            made.append(Turn(source, piece, segment.weight))
            source = Piece([])
        else:
            source = _joined(source, piece)
    return [*made, Turn(source, Piece([]))] if source.ids else made


def labelled(conversation: Sequence[Turn], rules: LabelRules) -> Encoded:
    """Tokens with what they weigh in the loss."""
    input_ids: list[int] = []
    weights: list[float] = []
    for number, turn in enumerate(conversation):
        silent = rules.mask_history and number < len(conversation) - 1
        input_ids += turn.source.ids + turn.answer.ids
        weights += [float(rules.train_on_prompt)] * len(turn.source.ids)
        weights += [0.0 if silent else turn.weight] * len(turn.answer.ids)
    labels = [token if weight else IGNORE for token, weight in zip(input_ids, weights, strict=True)]
    return Encoded(input_ids, labels, weights)


def _check_turns(spoken: Sequence[Message], last_role: str) -> None:
    for number, turn in enumerate(spoken):
        expected = ROLES[number % 2]
        if turn.role != expected:
            raise DataError(
                f"turn {number + 1} is by {turn.role!r}, expected {expected!r}:"
                " at most one system turn first, then user and assistant in turn"
            )
        if turn.loss is not None and not 0 <= turn.loss < float("inf"):
            raise DataError(f"turn {number + 1} has the weight {turn.loss} in the loss; it must be 0 or more")
    if not spoken or spoken[-1].role != last_role:
        last = f"is by {spoken[-1].role!r}" if spoken else "is missing"
        raise DataError(f"the last turn {last}; it must be by {last_role!r}")


def _check_placeholders(messages: Sequence[Message], images: int, videos: int) -> None:
    for mark, name, given in ((IMAGE, "picture(s)", images), (VIDEO, "video(s)", videos)):
        found = sum(message.content.count(mark) for message in messages)
        if found != given:
            raise DataError(f"the text has {found} {mark} but the record has {given} {name}; the numbers must be equal")


def _fill(content: str) -> str:
    filled = content.replace(IMAGE, VISION_START + IMAGE_PAD + VISION_END)
    return filled.replace(VIDEO, VISION_START + VIDEO_PAD + VISION_END)


def _pad_tokens(tokenizer: Any) -> tuple[int, int]:
    """Ids of ``<|image_pad|>`` and ``<|video_pad|>`` (-1 where the tokenizer has no videos)."""
    vocabulary = tokenizer.get_added_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ConfigError(f"the tokenizer lacks {', '.join(missing)}; take the one of a Qwen2.5-VL folder")
    return vocabulary[IMAGE_PAD], vocabulary.get(VIDEO_PAD, -1)


def _check_tokens(
    ids: Sequence[Sequence[int]], pads: tuple[int, int], counts: tuple[Sequence[int], Sequence[int]]
) -> None:
    """Both would only show as a shape error deep in the model."""
    for pad, given, token, mark in zip(pads, counts, (IMAGE_PAD, VIDEO_PAD), (IMAGE, VIDEO), strict=True):
        if min(given, default=1) < 1:
            raise DataError(f"a picture has {min(given)} tokens; it must have 1 or more")
        found = sum(piece.count(pad) for piece in ids)
        if pad == -1 and given:
            raise ConfigError(f"the tokenizer lacks {token}; take the one of a Qwen2.5-VL folder")
        if found != len(given):
            extra = found - len(given)
            raise DataError(f"the text itself holds {extra} {token}; write {mark} where a picture or video stands")


def _expanded(ids: Sequence[int], counts: dict[int, Iterator[int]], video_pad: int) -> Piece:
    if not any(pad in ids for pad in counts):
        return Piece(list(ids))
    out: list[int] = []
    blocks: list[Block] = []
    for token in ids:
        if token in counts:
            length = next(counts[token])
            blocks.append(Block(len(out) - 1, len(out) + length + 1, token == video_pad))
            out += [token] * length
        else:
            out.append(token)
    return Piece(out, tuple(blocks))


def _joined(first: Piece, second: Piece) -> Piece:
    by = len(first.ids)
    moved = tuple(Block(start + by, end + by, is_video) for start, end, is_video in second.blocks)
    return Piece(first.ids + second.ids, first.blocks + moved)
