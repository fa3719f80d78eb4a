"""Conversations made to fit. Tokens here are numbers that say where they come from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_finetune.data.truncation import allowances, shorten
from mm_finetune.template import Block, LabelRules, Piece, Turn, labelled

PAD = -1


def piece(start: int, *parts: int) -> Piece:
    """Text of these lengths around pictures of 5 tokens."""
    ids: list[int] = []
    blocks = []
    for number, length in enumerate(parts):
        if number:
            blocks.append(Block(len(ids), len(ids) + 5, is_video=False))
            ids += [PAD] * 5
        ids += range(start + len(ids), start + len(ids) + length)
    return Piece(ids, tuple(blocks))


texts = st.lists(st.integers(0, 12), min_size=1, max_size=3)
conversations = st.lists(st.tuples(texts, st.integers(1, 20)), min_size=1, max_size=4).map(
    lambda turns: [
        Turn(piece(1000 * n, *parts), piece(1000 * n + 500, answer)) for n, (parts, answer) in enumerate(turns)
    ]
)


def length(turns: list[Turn]) -> int:
    return sum(len(turn.source.ids) + len(turn.answer.ids) for turn in turns)


@pytest.mark.parametrize(
    ("source", "answer", "budget", "expected"),
    [
        # From the rule's words: an answer below half of the budget stays whole, the question gets the rest.
        (100, 10, 50, (40, 10)),
        # A question below half of it stays whole, the answer gets the rest.
        (10, 100, 50, (10, 40)),
        # Both are long: by their shares. 60 : 40 of 50.
        (60, 40, 50, (30, 20)),
        (5, 5, 50, (5, 5)),
    ],
)
def test_the_budget_of_a_turn(source: int, answer: int, budget: int, expected: tuple[int, int]) -> None:
    assert allowances(source, answer, budget) == expected


@given(conversation=conversations, limit=st.integers(1, 80), how=st.sampled_from(["trim_text", "drop_turns"]))
def test_pictures_are_whole_and_the_limit_holds(conversation: list[Turn], limit: int, how: str) -> None:
    short = shorten(conversation, limit, how)  # type: ignore[arg-type]
    assert length(short.turns) <= limit
    assert short.cut == (length(conversation) > limit)
    if not short.cut:
        assert short.turns == conversation
    for before, after in zip(conversation, short.turns, strict=False):
        for old, new in ((before.source, after.source), (before.answer, after.answer)):
            assert len(new.blocks) == len(old.blocks), "a turn keeps all its pictures"
            assert all(new.ids[block.start : block.end] == [PAD] * 5 for block in new.blocks)
            assert new.ids.count(PAD) == 5 * len(new.blocks)
            text, whole = ([token for token in ids if token != PAD] for ids in (new.ids, old.ids))
            assert text == whole[: len(text)], "the head of the text stays"
    assert short.images == sum(len(turn.source.blocks) for turn in conversation[: len(short.turns)])


@given(conversation=conversations, limit=st.integers(1, 80))
def test_turns_are_dropped_from_the_end(conversation: list[Turn], limit: int) -> None:
    kept = shorten(conversation, limit, "drop_turns").turns
    assert kept == conversation[: len(kept)]
    if len(kept) < len(conversation):
        assert length(conversation[: len(kept) + 1]) > limit, "as many stay as fit"


@given(
    pairs=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4),
    limit=st.integers(2, 100),
)
def test_text_is_cut_as_the_published_rule_says(pairs: list[tuple[int, int]], limit: int) -> None:
    conversation = [Turn(piece(1000 * n, s), piece(1000 * n + 500, a)) for n, (s, a) in enumerate(pairs)]
    expected: list[int] = []
    budget = limit
    for turn, (s, t) in zip(conversation, pairs, strict=True):
        if budget <= 0:
            break
        most = budget if t * 2 < budget else budget - s if s * 2 < budget else int(budget * (t / (s + t)))
        t_kept = min(most, t)
        if length(conversation) > limit and not t_kept:
            break  # ours: a question without an answer teaches nothing
        expected += turn.source.ids[: min(max(budget - t_kept, 0), s)] + turn.answer.ids[:t_kept]
        budget -= min(max(budget - t_kept, 0), s) + t_kept
    short = shorten(conversation, limit, "trim_text")
    assert labelled(short.turns, LabelRules()).input_ids == expected


def test_a_conversation_that_cannot_fit_leaves_nothing() -> None:
    pictures = [Turn(piece(0, 2, 2, 2, 2), piece(500, 9))]
    for how in ("error", "drop", "trim_text", "drop_turns"):
        assert shorten(pictures, 15, how).turns == []
    [turn] = shorten(pictures, 16, "trim_text").turns
    assert (len(turn.source.ids), len(turn.answer.ids)) == (15, 1)
