"""Conversations that are too long, made shorter; a picture or video is kept whole or left out with its turn.

Turns are only ever left out from the end, so the pictures that stay are the first ones of the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mm_finetune.template import Block, Piece, Turn

Truncate = Literal["error", "drop", "trim_text", "drop_turns"]


@dataclass(frozen=True)
class Shortened:
    """What is left.

    Attributes:
        turns: the turns that stay; none: the conversation can't be made to fit.
        cut: something was left out.
        length: tokens before anything was.
    """

    turns: list[Turn]
    cut: bool
    length: int

    @property
    def images(self) -> int:
        """Pictures that stay."""
        return self._count(is_video=False)

    @property
    def videos(self) -> int:
        """Videos that stay."""
        return self._count(is_video=True)

    def _count(self, *, is_video: bool) -> int:
        blocks = (b for turn in self.turns for piece in (turn.source, turn.answer) for b in piece.blocks)
        return sum(block.is_video is is_video for block in blocks)


def shorten(turns: Sequence[Turn], limit: int, how: Truncate) -> Shortened:
    """Make a conversation fit into `limit` tokens.

    Args:
        turns: the conversation.
        limit: most tokens.
        how: ``drop_turns`` and ``trim_text`` as in :class:`mm_finetune.config.DataConfig`; with the others nothing is
            left of a conversation that is too long.
    """
    length = sum(_length(turn) for turn in turns)
    if length <= limit:
        return Shortened(list(turns), cut=False, length=length)
    kept = {"drop_turns": _drop, "trim_text": _trim}.get(how)
    return Shortened(kept(turns, limit) if kept else [], cut=True, length=length)


def allowances(source: int, answer: int, budget: int) -> tuple[int, int]:
    """How many tokens of a question and of its answer stay, for a budget of both: LLaMA-Factory's rule.

    The answer may take the budget if it needs less than half of it, what the question leaves if that needs less than
    half, and else its share by length; the question takes the rest.
    """
    if 2 * answer < budget:
        most = budget
    elif 2 * source < budget:
        most = budget - source
    else:
        most = int(budget * (answer / (source + answer)))
    answer_kept = min(most, answer)
    return min(max(budget - answer_kept, 0), source), answer_kept


def _length(turn: Turn) -> int:
    return len(turn.source.ids) + len(turn.answer.ids)


def _drop(turns: Sequence[Turn], limit: int) -> list[Turn]:
    kept: list[Turn] = []
    for turn in turns:
        limit -= _length(turn)
        if limit < 0:
            break
        kept.append(turn)
    return kept


def _trim(turns: Sequence[Turn], limit: int) -> list[Turn]:
    kept: list[Turn] = []
    for turn in turns:
        if limit < 1:
            break
        source, answer = allowances(len(turn.source.ids), len(turn.answer.ids), limit)
        # Pictures are never cut: where the rule leaves them too little, the rest of their turn gives way.
        source = max(source, turn.source.block_tokens)
        answer = min(answer, limit - source)
        if answer < max(1, turn.answer.block_tokens):
            break
        kept.append(Turn(_head(turn.source, source), _head(turn.answer, answer), turn.weight))
        limit -= source + answer
    return kept


def _head(piece: Piece, length: int) -> Piece:
    """All blocks and the first of the other tokens, `length` together."""
    if length >= len(piece.ids):
        return piece
    text = length - piece.block_tokens
    ids: list[int] = []
    blocks: list[Block] = []
    place = 0
    for block in piece.blocks:
        before = piece.ids[place : block.start][:text]
        text -= len(before)
        ids += before
        blocks.append(Block(len(ids), len(ids) + block.end - block.start, block.is_video))
        ids += piece.ids[block.start : block.end]
        place = block.end
    return Piece(ids + piece.ids[place:][:text], tuple(blocks))
